"""JSON as other tools write it: any Unicode encoding, numbers in any spelling, faults by name."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from numbers import Integral, Real
from pathlib import Path
from typing import Any, TypeVar

_T = TypeVar("_T")

# Longer ones name nothing, and Python refuses to read thousands of digits.
_DIGITS = re.compile(r"[+-]?[0-9]{1,20}")
_FLAGS = {"0": False, "1": True, "false": False, "true": True}


def read_json(path: str | Path, *, utf8: bool = False) -> Any:
    """Read a JSON file in UTF-8, UTF-16 or UTF-32, with or without a byte order mark.

    Args:
        path: The file.
        utf8: Whether UTF-8 without a mark is all that is taken: transformers, which will read the
            file too, takes no other.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: naming the file, if it is in another encoding or no JSON.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = Path(folder) / "one.json"
        ...     _ = path.write_text('{"id": 1}', encoding="utf-8-sig")
        ...     read_json(path)
        {'id': 1}
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: there is no such file")
    try:
        content = path.read_bytes()
        return json.loads(content.decode() if utf8 else _text(content))
    except UnicodeDecodeError as error:
        encodings = "UTF-8" if utf8 else "UTF-8, UTF-16 or UTF-32"
        raise ValueError(
            f"{path}: expected JSON in {encodings}, got other bytes ({error}); save it as UTF-8"
        ) from error
    except (ValueError, RecursionError) as error:
        lines = isinstance(error, json.JSONDecodeError) and error.msg == "Extra data"
        hint = "; of JSON lines, one object a line, make one list" if lines else ""
        raise ValueError(f"{path}: not a JSON file ({error}){hint}") from error


def read_object(path: str | Path, *, utf8: bool = False) -> dict[str, Any]:
    """Read a JSON file that holds one object.

    Args:
        path: The file.
        utf8: As of :func:`read_json`.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: naming the file, if it is no JSON or holds something else.
    """
    content = read_json(path, utf8=utf8)
    if not isinstance(content, dict):
        raise ValueError(f"{path}: expected a JSON object, got {type(content).__name__}")
    return content


def _text(content: bytes) -> str:
    # As json.loads does, which would keep both copies of a large file until it is parsed.
    return content.decode(json.detect_encoding(content), "surrogatepass")


def integer(value: object) -> int | None:
    """Return a number as other tools write it (12, 12.0, 1e3, "12", NumPy's) as an int, or None.

    Args:
        value: Of a JSON, or of what a segmenter returns. True and False are no numbers.

    Example:
        >>> integer(12.0), integer("0139"), integer(1e3), integer(1.5), integer(True)
        (12, 139, 1000, None, None)
    """
    if type(value) is int:  # by far the commonest, in files of a million segments
        return value
    if isinstance(value, bool):
        return None
    if isinstance(value, Integral):
        return int(value)
    if isinstance(value, Real):
        number = float(value)
        return int(number) if math.isfinite(number) and number.is_integer() else None
    if isinstance(value, str) and _DIGITS.fullmatch(value.strip()):
        return int(value)
    return None


def flag(value: object) -> bool | None:
    """Return a yes or no as other tools write it (true, 1, 1.0, "0", "False") as a bool, or None.

    Args:
        value: Of a JSON.

    Example:
        >>> flag(1), flag("0"), flag(True), flag("maybe"), flag(2)
        (True, False, True, None, None)
    """
    if isinstance(value, bool):
        return value
    if isinstance(value, str):
        return _FLAGS.get(value.strip().lower())
    number = integer(value)
    return bool(number) if number in (0, 1) else None


def list_of(content: Mapping[str, Any], key: str, where: str) -> list[Any]:
    """Return a list of a JSON object.

    Args:
        content: The object.
        key: The list's key.
        where: What to call the object in messages.

    Raises:
        ValueError: naming ``where`` and the key, if there is no list.
    """
    value = content.get(key) if isinstance(content, Mapping) else None
    if not isinstance(value, list):
        raise ValueError(f"{where}: expected a list {key!r}, got {type(value).__name__}")
    return value


def key_of(entry: object, key: str, kind: type[_T], where: str) -> _T:
    """Return a value of a JSON object.

    Args:
        entry: What should be an object.
        key: The value's key.
        kind: The value's type; an int may be spelled in any way that :func:`integer` reads.
        where: What to call the object in messages.

    Raises:
        ValueError: naming ``where`` and the key, if there is no such value.
    """
    value = entry.get(key) if isinstance(entry, Mapping) else None
    read = integer(value) if kind is int else value
    # JSON's true and false are integers to Python.
    if not isinstance(read, kind) or isinstance(read, bool):
        raise ValueError(f"{where}: expected {key!r} as {kind.__name__}, got {shown(value)}")
    return read


def shown(value: object, most: int = 120) -> str:
    """Return a value as messages show it: on one line, of a long one the beginning.

    Args:
        value: Anything of a file.
        most: How many characters are shown.

    Example:
        >>> shown("a" * 200, 8)
        "'aaaaaaa..."
    """
    try:
        text = repr(value)
    except RecursionError:
        text = f"a deep {type(value).__name__}"
    # Half of a surrogate pair, which JSON can hold in a list too, cannot be printed.
    text = text.encode("utf-8", "backslashreplace").decode("utf-8")
    return text if len(text) <= most else f"{text[:most]}..."
