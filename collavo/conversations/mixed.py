"""Records of several files as one sequence, read from their stores when they are asked for."""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple, overload

import numpy as np

from collavo import writing
from collavo.conversations.cache import Cache
from collavo.conversations.inspection import Inspection, Inspector, inspect
from collavo.conversations.mixture import Source, chosen, repeated
from collavo.conversations.records import Record, place_name
from collavo.conversations.store import DamagedStoreError, Fault, RecordStore
from collavo.panoptic.coco_index import Skipped
from collavo.prepared.streaming import skip_line
from collavo.processing.labels import OverlongError


class Opened(NamedTuple):
    """A file that has been looked at.

    Attributes:
        source: The file.
        cache: What is kept of it.
        store: Its records.
        found: What is known of them.
    """

    source: Source
    cache: Cache
    store: RecordStore
    found: Inspection


class MixedRecords(Sequence[Record]):
    """Records by position; none is held in memory, and a pickle holds paths and numbers alone.

    Args:
        opened: The files.
        inspector: Brings images in order.
        seed: Draws parts of files.
    """

    def __init__(self, opened: Sequence[Opened], inspector: Inspector, seed: int) -> None:
        self.inspector = replace(inspector, processor=None)  # which a pickle need not hold
        self.files = [(one.source.path, one.cache, one.store) for one in opened]
        self.skipped: list[Skipped] = []
        self.overlong: list[Skipped] = []
        parts, files, lengths, cut = [], [], [], []
        for number, one in enumerate(opened):
            rng = np.random.default_rng([seed % 2**63, number])
            wanted = np.zeros(one.store.entries, np.bool_)
            wanted[chosen(one.source, one.store.entries, rng)] = True
            taken = wanted[one.store.numbers]
            faulty = np.zeros(len(one.store), np.bool_)
            faulty[list(one.found.faults)] = True
            for skipped, kind in _left_out(one, wanted, np.flatnonzero(taken & faulty).tolist()):
                self.skipped.append(skipped)
                self.overlong += [skipped] if kind == "length" else []
            rows = repeated(np.flatnonzero(taken & ~faulty), one.source.weight, rng)
            parts.append(rows)
            files.append(np.full(len(rows), number, np.int32))
            lengths.append(one.found.lengths[rows])
            cut.append(one.found.cut[rows])
        self.rows = np.concatenate(parts).astype(np.int32)
        self.file = np.concatenate(files)
        self.lengths = np.concatenate(lengths)
        self.cut = np.concatenate(cut)
        # An image behind the cut is none: a step of images must not have a record without one.
        images = [
            one.store.with_image[rows].astype(np.bool_) & ~one.found.blind[rows]
            for one, rows in zip(opened, parts, strict=True)
        ]
        self.with_image = np.concatenate(images)

    def __len__(self) -> int:
        return len(self.rows)

    @overload
    def __getitem__(self, index: int) -> Record: ...

    @overload
    def __getitem__(self, index: slice) -> list[Record]: ...

    def __getitem__(self, index: int | slice) -> Record | list[Record]:
        """Return a record with its name and its images in order; images are paths.

        Args:
            index: 0..len-1, or counted from the end.

        Raises:
            IndexError: if there is no such record.
            ValueError: naming the file, if it has become another since it was opened.
        """
        if isinstance(index, slice):
            return [self[one] for one in range(len(self))[index]]
        path, store, row, stored = self._stored(index)
        number = int(store.numbers[row])
        return {
            "image": stored["image"],
            "conversation": self.inspector.conversation(stored, number),
            "name": _name(path, number, stored["id"]),
        }

    def fingerprint(self) -> str:
        """Return what differs where other files, parts of them or places of images are read."""
        contents = [store.content for _, _, store in self.files]
        total = hashlib.sha256(repr((contents, self.inspector.drawn_order)).encode())
        for numbers in (self.file, self.rows):
            total.update(numbers.tobytes())
        return total.hexdigest()

    def _stored(self, index: int) -> tuple[Path, RecordStore, int, dict[str, Any]]:
        position = range(len(self))[index]
        file, row = int(self.file[position]), int(self.rows[position])
        path, cache, store = self.files[file]
        try:
            return path, store, row, store[row]
        except DamagedStoreError as error:
            again = _again(cache, store, error)
            self.files[file] = (path, cache, again)
            return path, again, row, again[row]


def open_source(
    source: Source,
    inspector: Inspector,
    *,
    folder: str | Path | None,
    workers: int | None,
    progress: bool,
) -> Opened:
    """Open a file: read it, look at its records, or find what was kept of both.

    Args:
        source: The file.
        inspector: Looks at a record.
        folder: Where results are kept, or None.
        workers: Processes.
        progress: Whether bars are shown.

    Raises:
        FileNotFoundError: if there is no such file.
        OSError: if nothing can be kept anywhere.
        ValueError: naming the file, if it is no list of records.
    """
    cache = Cache(source.path, folder)
    store = cache.records(progress=progress)
    try:
        found = inspect(store, inspector, cache, workers=workers, progress=progress)
    except DamagedStoreError as error:
        store = _again(cache, store, error)
        found = inspect(store, inspector, cache, workers=workers, progress=progress)
    return Opened(source, cache, store, found)


def _again(cache: Cache, damaged: RecordStore, error: DamagedStoreError) -> RecordStore:
    warnings.warn(f"{error}; it is made again from {cache.source}", stacklevel=5)
    return cache.made_again(damaged)


def report_skipped(
    opened: Sequence[Opened],
    records: MixedRecords,
    *,
    strict: bool,
    to: Callable[[Skipped], None] | None,
) -> None:
    """Tell of the records that are left out, and list them beside what is kept of their files.

    Args:
        opened: The files.
        records: What is taken of them.
        strict: Whether a fault is an error.
        to: Called with each, in place of a warning.

    Raises:
        OverlongError: naming the first record that is too long, if that is to be an error.
        ValueError: naming the first fault, if it is an error or there is nothing else; or the
            files, if they have no records.
    """
    skipped = records.skipped
    for one in opened:
        start = f"{one.source.path}: "
        lines = "".join(skip_line(each) for each in skipped if each.name.startswith(start))
        _list(one.store.path.with_name("skipped.jsonl"), lines)
    if records.overlong and records.inspector.overlong == "raise":
        first = records.overlong[0]
        raise OverlongError(f"{first.name}: {first.reason}")
    if skipped and (strict or not len(records)):
        raise ValueError(f"{skipped[0].name}: {skipped[0].reason}")
    if not len(records):
        raise ValueError(f"{opened[0].source.path}: expected records, got none")
    if to is not None:
        for each in skipped:
            to(each)
    elif skipped:
        place = opened[0].store.path.parent
        names = [str(one.source.path) for one in opened]
        warnings.warn(
            f"{', '.join(names[:3])}: {len(skipped)} of {len(skipped) + len(records)} records are "
            f"left out and listed in 'skipped' and in {place / 'skipped.jsonl'}; the first: "
            f"{skipped[0].name}: {skipped[0].reason}",
            stacklevel=3,
        )


def _list(path: Path, lines: str) -> None:
    with suppress(OSError):  # a folder that was kept for reading alone; they are in 'skipped' too
        if lines:
            writing.write_file(path, lines.encode(), sync=False)
        else:
            path.unlink(missing_ok=True)


def _left_out(
    opened: Opened, wanted: np.ndarray[Any, Any], rows: list[int]
) -> list[tuple[Skipped, str]]:
    """Return the faults of the records that are taken, in the order of the file, by their kind."""
    path, store = opened.source.path, opened.store
    faults = [(fault, "words") for fault in store.faults if wanted[fault.number]]
    for row in rows:
        one = opened.found.faults[row]
        faults.append((Fault(int(store.numbers[row]), one.id, one.reason), one.kind))
    return [
        (Skipped(_name(path, fault.number, fault.id), fault.reason), kind)
        for fault, kind in sorted(faults, key=lambda one: one[0].number)
    ]


def _name(path: Path, number: int, id_: str | None) -> str:
    return place_name(f"{path}: [{number}]", id_)
