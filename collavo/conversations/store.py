"""The records of a file as a file of this package's: mapped into memory, found by number.

A store holds the records as JSON lines, then arrays (where each line begins, its checksum, its
number in the source and whether it has an image), then a description in JSON. Processes that map
it share one copy of the text, and a pickle holds its path alone.
"""

from __future__ import annotations

import hashlib
import json
import mmap
import os
import struct
import zlib
from array import array
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from collavo.conversations.llava import read_file

# A change of what is stored, or of how records are read, leaves old stores unread.
_FORMAT = 1
_MAGIC = b"collavo\n"
_END = struct.Struct("<q32s8s")
_ARRAYS = (("bounds", "q"), ("sums", "I"), ("numbers", "i"), ("with_image", "B"))


class DamagedStoreError(ValueError):
    """A store that is not what was written, or is another content's."""


class Fault(NamedTuple):
    """A record of a file that cannot be used.

    Attributes:
        number: Its place in the file.
        id: Its id as messages show it, or None.
        reason: What is wrong with it.
    """

    number: int
    id: str | None
    reason: str


class RecordStore:
    """The records of one file that can be used, by row, and the faults of the others.

    It may be pickled and forked; whoever reads first maps the file.

    Args:
        path: The store's file.
        content: What the source's bytes have to be, by their SHA-256; None takes any.

    Raises:
        DamagedStoreError: if the file is damaged or holds another content.
        OSError: if there is no such file.
    """

    def __init__(self, path: Path, content: str | None = None) -> None:
        self.path = path
        self.content = content
        self._open()

    def _open(self) -> None:
        with self.path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            if size < _END.size:
                raise DamagedStoreError(f"{self.path}: it is empty or cut off")
            self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        start, digest, magic = _END.unpack_from(self._map, size - _END.size)
        tail = self._map[start : size - _END.size] if 0 <= start < size else b""
        if magic != _MAGIC or hashlib.sha256(tail).digest() != digest:
            raise DamagedStoreError(f"{self.path}: it is damaged")
        (length,) = struct.unpack_from("<q", tail, len(tail) - 8)
        about = json.loads(tail[len(tail) - 8 - length : len(tail) - 8])
        if about["format"] != _FORMAT or self.content not in (None, about["content"]):
            raise DamagedStoreError(f"{self.path}: it holds the records of another content")
        self.content = about["content"]
        self.entries: int = about["entries"]
        self.faults = [Fault(*one) for one in about["faults"]]
        rows: int = about["rows"]
        for name, code in _ARRAYS:
            count = rows + (name == "bounds")
            values = np.frombuffer(self._map, np.dtype(code), count, start)
            setattr(self, name, values)
            start += values.nbytes
        self.bounds: np.ndarray[Any, Any]
        self.sums: np.ndarray[Any, Any]
        self.numbers: np.ndarray[Any, Any]
        self.with_image: np.ndarray[Any, Any]

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, row: int) -> dict[str, Any]:
        """Return a row: ``image``, ``conversation`` and ``id`` as messages show it, or None.

        Args:
            row: 0..len-1.

        Raises:
            DamagedStoreError: if it is not what was written.
        """
        line = self._map[self.bounds[row] : self.bounds[row + 1]]
        if zlib.crc32(line) != self.sums[row]:
            raise DamagedStoreError(f"{self.path}: row {row} is damaged")
        record: dict[str, Any] = json.loads(str(line, "utf-8"))
        return record

    def __getstate__(self) -> dict[str, Any]:
        return {"path": self.path, "content": self.content}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**state)  # type: ignore[misc]


def write_store(source: Path, file: BinaryIO, on_bytes: Callable[[int], object] = bool) -> str:
    """Write the store of a file of records in LLaVA's format.

    Args:
        source: The file.
        file: Where the store is written.
        on_bytes: Called with the number of bytes that were read, each time.

    Returns:
        The SHA-256 of the source's bytes.

    Raises:
        FileNotFoundError: if there is no such source.
        ValueError: naming the source, if it is no list of records.
    """
    content = hashlib.sha256()

    def take(chunk: bytes) -> None:
        content.update(chunk)
        on_bytes(len(chunk))

    arrays = {name: array(code) for name, code in _ARRAYS}
    arrays["bounds"].append(0)
    faults: list[Fault] = []
    entries = 0
    for number, name, record, fault in read_file(source, take):
        entries += 1
        if record is None:
            faults.append(Fault(number, name, fault))
            continue
        stored = {"image": record["image"], "conversation": record["conversation"], "id": name}
        line = (json.dumps(stored, ensure_ascii=False) + "\n").encode()
        file.write(line)
        arrays["bounds"].append(arrays["bounds"][-1] + len(line))
        arrays["sums"].append(zlib.crc32(line))
        arrays["numbers"].append(number)
        arrays["with_image"].append(bool(record["image"]))
    about = {
        "format": _FORMAT,
        "content": content.hexdigest(),
        "entries": entries,
        "rows": len(arrays["numbers"]),
        "faults": faults,
    }
    description = json.dumps(about).encode()
    # The arrays are read in place, so the first begins at a multiple of its items' size.
    start = -(-arrays["bounds"][-1] // 8) * 8
    file.write(bytes(start - arrays["bounds"][-1]))
    tail = b"".join(values.tobytes() for values in arrays.values())
    tail += description + struct.pack("<q", len(description))
    file.write(tail + _END.pack(start, hashlib.sha256(tail).digest(), _MAGIC))
    return content.hexdigest()
