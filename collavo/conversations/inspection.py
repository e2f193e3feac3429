"""All records of a store looked at once: images that are there, answers that fit; in parallel."""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from collavo import writing
from collavo.conversations.cache import Cache
from collavo.conversations.llava import ImageOrder, order_images
from collavo.conversations.store import RecordStore
from collavo.panoptic.file_names import inner_name
from collavo.panoptic.images import read_image_size
from collavo.processing.labels import OverlongError

# A change of what is kept leaves old files unread.
_FORMAT = 2
# Below, processes cost more than they save.
_FEWEST = 512
_BATCH = 128
_MOST_WORKERS = 8
# What a processor calls the record, which has a longer name elsewhere.
_WORDS = "conversation"

Overlong = Literal["cut", "skip", "raise"]


class RowFault(NamedTuple):
    """What is wrong with a row of a store.

    Attributes:
        id: The record's as messages show it, or None.
        reason: The sentence.
        kind: ``"image"``, which may yet come, ``"length"`` or ``"words"``.
    """

    id: str | None
    reason: str
    kind: str


class Inspection(NamedTuple):
    """What is known of the rows of a store.

    Attributes:
        lengths: Tokens of each, int32; -1 where it is not known or there is a fault.
        cut: Which are longer than allowed, and lose their last answers, bool.
        blind: Which have lost all their images with those, bool.
        faults: By row, what is wrong with it.
    """

    lengths: np.ndarray[Any, Any]
    cut: np.ndarray[Any, Any]
    blind: np.ndarray[Any, Any]
    faults: dict[int, RowFault]


@dataclass(frozen=True)
class Inspector:
    """Says of a record whether it can be used, and how long it is.

    Args:
        images: Folder that image paths start from, and do not leave; None takes paths as they are.
        order: Of images and words.
        seed: That ``"random"`` goes by.
        processor: Measures conversations; None measures nothing.
        max_length: In tokens, images included.
        overlong: What becomes of longer ones; ``"cut"`` after their last whole answer that fits.
    """

    images: Path | None
    order: ImageOrder
    seed: int
    processor: Any
    max_length: int | None
    overlong: Overlong

    def key(self, content: str) -> str:
        """Return what the results follow from, but for the images themselves.

        Args:
            content: Of the records.
        """
        settings = {
            "format": _FORMAT,
            "content": content,
            # Without a folder, names start from the working one.
            "images": os.path.abspath(self.images or "."),
            "pixels": Image.MAX_IMAGE_PIXELS,
            "order": self.drawn_order,
            "processor": self._fingerprint,
            "length": [self.max_length, self.overlong == "cut"],
        }
        return hashlib.sha256(json.dumps(settings).encode()).hexdigest()

    @property
    def drawn_order(self) -> tuple[ImageOrder, int]:
        """The order of images, and the seed where it is drawn, else 0."""
        return self.order, self.seed if self.order == "random" else 0

    @cached_property
    def _fingerprint(self) -> str | None:
        # Of a large vocabulary it takes a while, and a mixture has many files.
        return None if self.processor is None else str(self.processor.fingerprint())

    def path(self, name: str) -> Path:
        """Return an image's path.

        Args:
            name: As the record has it.

        Raises:
            ValueError: if it leads out of the folder.
        """
        return Path(name) if self.images is None else self.images / inner_name(name, "image")

    def conversation(self, record: dict[str, Any], number: int) -> list[dict[str, Any]]:
        """Return a stored record's messages with their images in order.

        Args:
            record: Of a store.
            number: The record's in its source.
        """
        return order_images(record["conversation"], self.order, seed=self.seed, number=number)

    def measure(
        self, record: dict[str, Any], number: int, sizes: Sequence[tuple[int, int]]
    ) -> tuple[int, bool, bool]:
        """Return a record's tokens, whether it is cut, and whether that took all its images.

        Args:
            record: Of a store.
            number: The record's in its source.
            sizes: Height and width of each image.

        Returns:
            -1 tokens where nothing measures.

        Raises:
            ValueError: if no answer is left within the limit, or the template refuses it.
        """
        if self.processor is None:
            return -1, False, False
        measured = self.processor.measure(
            self.conversation(record, number),
            sizes,
            max_length=self.max_length,
            overlong="cut" if self.overlong == "cut" else "raise",
            name=_WORDS,
        )
        return measured.tokens, measured.cut, bool(sizes) and not measured.image_tokens


def inspect(
    store: RecordStore,
    inspector: Inspector,
    cache: Cache,
    *,
    workers: int | None = None,
    progress: bool = False,
) -> Inspection:
    """Look at all records of a store, or at what was found out about them before.

    Faults of images are looked at again each time. An image that was there and has gone is not
    noticed here but when it is read.

    Args:
        store: The records.
        inspector: Looks at one.
        cache: Where results are kept.
        workers: Processes; 0 is this one, None as many as there are cores, at most eight.
        progress: Whether a bar shows how far it is.
    """
    key = inspector.key(str(store.content))
    known = _read(cache, key, len(store))
    if known is not None and not any(one.kind == "image" for one in known.faults.values()):
        return known
    with cache.alone() as place:
        known = _read(cache, key, len(store))  # of a process that was faster
        rows: Sequence[int] = range(len(store))
        nowhere = np.zeros(len(rows), np.bool_)
        found = Inspection(np.full(len(rows), -1, np.int32), nowhere, nowhere.copy(), {})
        if known is not None:
            found = known
            rows = [row for row, one in known.faults.items() if one.kind == "image"]
        before = dict(found.faults)
        with tqdm(total=len(rows), disable=not progress, desc="checking records") as bar:
            for batch in _looked_at(store, inspector, rows, workers):
                for row, length, cut, blind, fault in batch:
                    found.faults.pop(row, None)
                    found.lengths[row], found.cut[row], found.blind[row] = length, cut, blind
                    if fault is not None:
                        found.faults[row] = fault
                bar.update(len(batch))
        if known is None or found.faults != before:
            _write(place, key, found)
    return found


_Seen = list[tuple[int, int, bool, bool, RowFault | None]]


def _looked_at(
    store: RecordStore, inspector: Inspector, rows: Sequence[int], workers: int | None
) -> Iterator[_Seen]:
    batches = [rows[start : start + _BATCH] for start in range(0, len(rows), _BATCH)]
    if workers is None:
        affinity = getattr(os, "sched_getaffinity", None)  # where a system has it
        workers = min(_MOST_WORKERS, len(affinity(0)) if affinity else os.cpu_count() or 1)
    # A process that is a loader's worker may have no processes of its own.
    alone = workers < 2 or len(rows) < _FEWEST or multiprocessing.current_process().daemon
    if alone:
        for batch in batches:
            yield _look(store, inspector, batch)
        return
    pool = ProcessPoolExecutor(workers, initializer=_begin, initargs=(store, inspector))
    try:
        yield from pool.map(_look_as_begun, batches)
    except BrokenProcessPool as error:
        raise RuntimeError(
            f"workers: one of {workers} processes that look at records was killed, as by a system "
            "out of memory; try fewer"
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


_begun: tuple[RecordStore, Inspector]


def _begin(store: RecordStore, inspector: Inspector) -> None:
    global _begun
    _begun = (store, inspector)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # who started this process ends it
    torch.set_num_threads(1)  # as a loader's workers: a fork has no threads of its parent's pool
    parent = multiprocessing.parent_process()
    if parent is not None:
        threading.Thread(target=_end_with, args=(parent,), daemon=True).start()


def _end_with(parent: Any) -> None:
    # Else a worker of a process that was killed waits for work forever, and holds its claims.
    parent.join()
    os._exit(1)


def _look_as_begun(rows: Sequence[int]) -> _Seen:
    return _look(*_begun, rows)


def _look(store: RecordStore, inspector: Inspector, rows: Sequence[int]) -> _Seen:
    seen: _Seen = []
    for row in rows:
        record = store[row]
        kind = "image"
        try:
            sizes = [read_image_size(inspector.path(name)) for name in record["image"]]
            kind = "words"
            measured = inspector.measure(record, int(store.numbers[row]), sizes)
            seen.append((row, *measured, None))
        except (ValueError, OSError) as error:
            kind = "length" if isinstance(error, OverlongError) else kind
            reason = str(error).removeprefix(f"{_WORDS}: ")
            seen.append((row, -1, False, False, RowFault(record["id"], reason, kind)))
    return seen


def _file(place: Path, key: str) -> Path:
    return place / f"checked-{key[:16]}.bin"


def _read(cache: Cache, key: str, rows: int) -> Inspection | None:
    for place in cache.places:
        try:
            content = _file(place, key).read_bytes()
        except OSError:
            continue
        digest, body = content[:32], content[32:]
        if hashlib.sha256(body).digest() != digest:
            continue  # cut off, or damaged
        line, _, arrays = body.partition(b"\n")
        about = json.loads(line)
        if about["key"] == key and len(arrays) == 6 * rows:
            lengths = np.frombuffer(arrays, np.int32, rows)
            cut = np.frombuffer(arrays, np.bool_, rows, lengths.nbytes)
            faults = {row: RowFault(*one) for row, *one in about["faults"]}
            blind = np.frombuffer(arrays, np.bool_, rows, lengths.nbytes + cut.nbytes)
            return Inspection(lengths.copy(), cut.copy(), blind.copy(), faults)
    return None


def _write(place: Path, key: str, found: Inspection) -> None:
    about = {"key": key, "faults": [[row, *fault] for row, fault in found.faults.items()]}
    arrays = (found.lengths, found.cut, found.blind)
    body = json.dumps(about).encode() + b"\n" + b"".join(one.tobytes() for one in arrays)
    with suppress(OSError):  # it is looked at again then
        content = hashlib.sha256(body).digest() + body
        writing.write_file(_file(place, key), content, sync=False)
