"""Files of records, read entry by entry: lists in JSON and JSON lines, of any size."""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from collavo.panoptic.json_files import shown

# Of bytes read at once; a longer record is read in doubling steps.
_CHUNK = 1 << 20
_BLANKS = re.compile(r"[ \t\n\r]*")
# As many characters as a literal such as -Infinity may lack at the end of what was read.
_TAIL = 16
_LINES = (".jsonl", ".ndjson")
_IS_LIST = "; name a file that is one list .json"


class Entry(NamedTuple):
    """An entry of a file.

    Attributes:
        number: Its place in the file, from 0.
        value: What JSON says there.
        fault: Why that cannot be told, or the empty text.
    """

    number: int
    value: Any
    fault: str = ""


def read_entries(path: Path, on_chunk: Callable[[bytes], object] = len) -> Iterator[Entry]:
    """Read the entries of a list in JSON, or of JSON lines (``.jsonl``, ``.ndjson``), one by one.

    Args:
        path: In UTF-8, UTF-16 or UTF-32, with or without a byte order mark.
        on_chunk: Called with all bytes of the file, in order.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: naming the file, if it is in another encoding, no JSON or no list. A line that
            is no JSON is an entry with a fault.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = Path(folder) / "two.json"
        ...     _ = path.write_text('[{"id": 1}, 2]')
        ...     [entry.value for entry in read_entries(path)]
        [{'id': 1}, 2]
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path}: there is no such file")
    reader = _Reader(_decoded(path, on_chunk), path)
    if path.suffix.lower() in _LINES:
        yield from reader.lines()
        return
    start = reader.peek()
    if start != "[":
        kind = type(reader.value("in the file")).__name__ if start else "an empty file"
        hint = "" if start != "{" else "; name a file of JSON lines .jsonl"
        raise ValueError(f"{path}: expected a list of records, got {kind}{hint}")
    reader.at += 1
    number = 0
    closed = reader.peek() == "]"
    while not closed:
        yield Entry(number, reader.value(f"in [{number}]"))
        closed = reader.comma_or_end(f"behind [{number}]")
        number += 1
    reader.at += 1
    if reader.peek():
        raise reader.fault("Extra data", reader.at, "behind the list")


def _decoded(path: Path, on_chunk: Callable[[bytes], object]) -> Iterator[str]:
    taken = 0
    try:
        with path.open("rb") as file:
            chunk = file.read(_CHUNK)
            encoding = json.detect_encoding(chunk)
            decoder = codecs.getincrementaldecoder(encoding)("surrogatepass")
            while chunk:
                on_chunk(chunk)
                taken += len(chunk)
                yield decoder.decode(chunk)
                chunk = file.read(_CHUNK)
            yield decoder.decode(b"", final=True)
    except UnicodeDecodeError as error:
        place = taken - len(error.object) + error.start
        raise ValueError(
            f"{path}: expected JSON in UTF-8, UTF-16 or UTF-32, got other bytes at byte {place} "
            f"({error.encoding}: {error.reason}); save it as UTF-8"
        ) from error


class _Reader:
    """Reads values off a text that comes in parts; ``text`` is what is held of it."""

    def __init__(self, parts: Iterator[str], path: Path) -> None:
        self.parts, self.path = parts, path
        self.text = ""
        self.at = 0
        self.dropped = 0
        self._decode = json.JSONDecoder().raw_decode

    def more(self) -> bool:
        """Read on, at least as much again as is held and not yet taken; False at the end."""
        goal = 2 * (len(self.text) - self.at)
        self.dropped += self.at
        self.text, self.at = self.text[self.at :], 0
        before = len(self.text)
        for part in self.parts:
            self.text += part
            if len(self.text) > max(goal, before):
                break
        return len(self.text) > before

    def peek(self) -> str:
        """Return the next character that is no blank, or the empty text at the end."""
        while True:
            blanks = _BLANKS.match(self.text, self.at)
            self.at = blanks.end() if blanks else self.at
            if self.at < len(self.text):
                return self.text[self.at]
            if not self.more():
                return ""

    def value(self, name: str) -> Any:
        """Take the value that begins at the next character."""
        self.peek()
        while True:
            try:
                value, end = self._decode(self.text, self.at)
            except json.JSONDecodeError as error:
                fault = self.fault(error.msg, error.pos, name)
                inside = error.pos + _TAIL < len(self.text)
                if (inside and "Unterminated" not in error.msg) or not self.more():
                    raise fault from error
                continue
            except (ValueError, RecursionError) as error:  # a number of thousands of digits
                raise self.fault(str(error), self.at, name) from error
            size = end - self.at
            if end < len(self.text) or not self.more():  # else a number may go on
                self.at += size
                return value

    def comma_or_end(self, name: str) -> bool:
        """Take a comma; say whether the list ends instead."""
        found = self.peek()
        if found == "]":
            return True
        if found != ",":
            raise self.fault("Expecting ',' delimiter", self.at, name)
        self.at += 1
        return False

    def lines(self) -> Iterator[Entry]:
        """Take the rest as JSON lines; blank ones are none."""
        number = 0
        while True:
            end = self.text.find("\n", self.at)
            if end < 0 and self.more():
                continue
            line = self.text[self.at : end if end >= 0 else len(self.text)].strip()
            if line:
                yield _line(number, line)
                number += 1
            if end < 0:
                return
            self.at = end + 1

    def fault(self, reason: str, place: int, name: str) -> ValueError:
        """Return the error that names the file, the entry and the character."""
        return ValueError(
            f"{self.path}: not a JSON file ({reason}: character {self.dropped + place}, {name})"
        )


def _line(number: int, line: str) -> Entry:
    try:
        value = json.loads(line)
    except (ValueError, RecursionError) as error:
        fault = f"expected an object in JSON on this line, got {shown(line, 40)} ({error})"
        return Entry(number, None, fault + _IS_LIST * line.startswith("["))
    return Entry(number, value)
