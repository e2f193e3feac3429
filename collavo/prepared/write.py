"""From a COCO panoptic folder to shards of crayon rows and instructions: no PNG is read again.

PNGs are decoded by a pool of threads, which Pillow lets run side by side; their colours go to the
lookup in chunks. The same inputs and settings give the same bytes, whatever the number of threads
and however often the run was broken off. Instructions hold every choice there is, so nothing is
drawn here: training draws among them.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor
from tqdm.auto import tqdm

from collavo import writing
from collavo._arguments import expect_like
from collavo.panoptic.categories import NUM_CLASSES
from collavo.panoptic.coco import check_folders, check_sizes
from collavo.panoptic.coco_index import CocoFolder, CocoIndex, CocoRecord, Skipped
from collavo.panoptic.images import read_image, read_image_size
from collavo.panoptic.instructions import build_instructions
from collavo.panoptic.maps import (
    PanopticMap,
    PathLike,
    read_panoptic_colours,
    read_panoptic_size,
)
from collavo.panoptic.text import detections_by_image
from collavo.prepared.shards import (
    FORMAT,
    LOCK,
    MANIFEST,
    REPORT,
    PreparedImage,
    PrepareSettings,
    Shard,
    lock_folder,
    read_manifest,
    shard_files,
    write_shard,
)
from collavo.prepared.streaming import skip_line
from collavo_kernels import CrayonMap, panoptic_lookup

_T = TypeVar("_T")
_R = TypeVar("_R")
# Maps of one lookup: 15 MB of colours, and calls so few that their fixed cost is lost in decoding.
_CHUNK = 16
# Pixels of the maps that wait for a lookup, and of those that one takes: 100 MB of colours each.
_PIXELS = 2**25
# What a run writes, and no more than that is ever removed.
_OWN = re.compile(
    rf"(shard-[0-9]{{5,}}\.(jsonl|safetensors)|{re.escape(MANIFEST)}|{re.escape(REPORT)})"
)


@dataclass(frozen=True)
class PrepareReport:
    """What was prepared and what was not.

    Args:
        folder: Of the prepared data set.
        images: How many images it has.
        instructions: How many instructions.
        without_objects: How many of the images show no listed segment of a known class; they have
            a crayon and no instruction.
        shards: How many shards.
        resumed: How many of these an earlier run had made.
        skipped: What was left out, of all runs; also in ``skipped.jsonl``.
    """

    folder: Path
    images: int
    instructions: int
    without_objects: int
    shards: int
    resumed: int
    skipped: tuple[Skipped, ...]

    def summary(self) -> str:
        """Return the report as lines of text, with the commonest reasons for skipping."""
        lines = [
            f"{self.images} images, {self.instructions} instructions, {self.shards} shards "
            f"({self.resumed} of an earlier run) in {self.folder}"
        ]
        if self.without_objects:
            lines.append(f"{self.without_objects} images show no object and have no instruction")
        if self.skipped:
            lines.append(f"{len(self.skipped)} skipped, listed in {self.folder / REPORT}:")
            first = {one.reason: one.name for one in reversed(self.skipped)}
            counts = Counter(one.reason for one in self.skipped).most_common(5)
            lines += [f"  {count} x {reason} ({first[reason]})" for reason, count in counts]
            lines.append("mend them and prepare anew with --overwrite, or train without them")
        return "\n".join(lines)


def prepare_folder(
    coco: CocoFolder,
    output: PathLike,
    settings: PrepareSettings | None = None,
    *,
    workers: int = 1,
    overwrite: bool = False,
    progress: bool = False,
) -> PrepareReport:
    """Prepare a COCO panoptic folder, or go on where an earlier run was broken off.

    Faulty entries of the JSON, missing and unreadable files are skipped and reported. One run at a
    time may write to a folder: it holds a lock there, where the system has such locks.

    Args:
        coco: The folder's parts; see ``find_coco_folder``.
        output: Folder to write; it must be new, empty or of an earlier run.
        settings: What to make; None takes the defaults.
        workers: Threads that decode PNGs.
        overwrite: Remove what an earlier run made, and nothing else, and begin again.
        progress: Whether to show a bar.

    Raises:
        FileNotFoundError: naming the part of the COCO folder that is missing.
        ValueError: if the JSON is malformed as a whole, nothing at all could be prepared, or the
            output was made with other settings or inputs (saying which), has other files or is
            being written by another run.
    """
    expect_like(
        "coco",
        coco,
        "a CocoFolder",
        has=("images", "panoptic", "annotations"),
        hint="find_coco_folder(root, split) finds one",
    )
    if workers < 1:
        raise ValueError(f"workers: expected at least 1, got {workers}")
    settings = settings or PrepareSettings()
    expect_like("settings", settings, "PrepareSettings", has=("grid", "limit"))
    coco = CocoFolder(*(Path(os.path.abspath(path)) for path in coco))
    check_folders(coco.images, coco.panoptic)
    index = CocoIndex.read(coco.annotations, skip_faults=True, limit=settings.limit)
    folder = Path(output)
    manifest = {
        "format": FORMAT,
        "settings": settings.to_json(),
        "inputs": _fingerprint(coco),
    }
    folder.mkdir(parents=True, exist_ok=True)
    _check_own(folder)
    with lock_folder(folder):
        writing.settle(folder)
        _open_output(folder, manifest, overwrite)
        report = _write_shards(folder, coco, index, settings, workers, progress)
        _finish(folder, manifest, report)
    return report


def _write_shards(
    folder: Path,
    coco: CocoFolder,
    index: CocoIndex,
    settings: PrepareSettings,
    workers: int,
    progress: bool,
) -> PrepareReport:
    records = index.records
    size = settings.images_per_shard
    parts = [records[start : start + size] for start in range(0, len(records), size)]
    done = [_is_done(folder, number) for number in range(len(parts))]
    builder = _Builder(coco, index, settings)
    with tqdm(total=len(records), unit="image", disable=not progress) as bar:
        bar.update(sum(len(part) for part, there in zip(parts, done, strict=True) if there))
        pending = [number for number, there in enumerate(done) if not there]
        jobs = (record for number in pending for record in parts[number])
        decoded = _in_order(builder.decode, jobs, workers, builder.pixels)
        for number in pending:
            results = islice(decoded, len(parts[number]))
            crayon, entries = builder.build(parts[number], results, bar.update)
            write_shard(folder, number, crayon, entries)
    return _report(folder, len(parts), sum(done), index.skipped)


class _Builder:
    """Makes the content of shards."""

    def __init__(self, coco: CocoFolder, index: CocoIndex, settings: PrepareSettings) -> None:
        self.coco = coco
        self.index = index
        self.settings = settings

    def pixels(self, record: CocoRecord) -> int:
        """Read how many pixels a map has, from its header; 0 if decoding will tell its fault."""
        try:
            height, width = read_panoptic_size(self.coco.panoptic / record.png)
        except (ValueError, OSError):
            return 0
        return height * width

    def decode(self, record: CocoRecord) -> Tensor | Skipped:
        """Read a map, uint8 ``[H, W, 3]``, and check it against its image."""
        png, path = self.coco.panoptic / record.png, self.coco.images / record.image
        try:
            colours = read_panoptic_colours(png)
            if self.settings.verify_images:
                image = read_image(path)
                size = (image.height, image.width)
            else:
                size = read_image_size(path)
            check_sizes((colours.shape[0], colours.shape[1]), png, size, path)
        except (ValueError, OSError) as error:
            return self.fault(record, str(error))
        return colours

    def fault(self, record: CocoRecord, text: str) -> Skipped:
        # Where the folders lie is no part of the report: it is the same wherever it is made.
        for folder in (self.coco.panoptic, self.coco.images):
            text = text.replace(f"{folder}{os.sep}", f"{folder.name}/")
        png = f"{self.coco.panoptic.name}/{record.png}"
        image = f"{self.coco.images.name}/{record.image}"
        for name in (png, image):
            if text.startswith(f"{name}: "):
                return Skipped(name, text.removeprefix(f"{name}: "))
        return Skipped(image, text)

    def build(
        self,
        records: Sequence[CocoRecord],
        results: Iterable[Tensor | Skipped],
        update: Callable[[int], object],
    ) -> tuple[CrayonMap, list[PreparedImage | Skipped]]:
        maps: list[CrayonMap] = []
        entries: list[PreparedImage | Skipped] = []
        jobs, done = iter(records), iter(results)
        while chunk := _chunk(jobs, done):
            maps.append(self.look_up(chunk))
            entries += self.describe(chunk, maps[-1])
            update(len(chunk))
            chunk.clear()  # its maps would live while the next ones are decoded
        return CrayonMap.cat(maps), entries

    def describe(
        self, chunk: Sequence[tuple[CocoRecord, Tensor | Skipped]], crayon: CrayonMap
    ) -> Iterator[PreparedImage | Skipped]:
        images = iter(detections_by_image(crayon))
        for record, result in chunk:
            if isinstance(result, Skipped):
                yield result
                continue
            instructions = build_instructions(next(images), self.settings.templates)
            height, width = result.shape[:2]
            yield PreparedImage(record.image_id, record.image, height, width, tuple(instructions))

    def look_up(self, chunk: Sequence[tuple[CocoRecord, Tensor | Skipped]]) -> CrayonMap:
        kept = [(record, one) for record, one in chunk if isinstance(one, Tensor)]
        colours = [one for _, one in kept]
        segments = [self.index.segments(record) for record, _ in kept]
        ids = [torch.from_numpy(own) for own, _ in segments]
        classes = [torch.from_numpy(own) for _, own in segments]
        sizes: Any = {"max_number": self.settings.max_number, "reduce": self.settings.reduce}
        if kept and self.settings.image_mode == "pad":
            # A processor's geometry comes with transformers, which other shards do not need.
            from collavo.processing.blocks import look_up
            from collavo.processing.region import padded_grid

            maps = map(PanopticMap, colours, ids, classes)
            grid = self.settings.grid
            layouts = [(padded_grid(one.shape[0], one.shape[1], grid),) for one in colours]
            pairs = list(zip(maps, layouts, strict=True))
            return CrayonMap.cat(look_up(pairs, num_classes=NUM_CLASSES, **sizes))
        return panoptic_lookup(colours, ids, classes, grid=self.settings.grid, **sizes)


def _in_order(
    work: Callable[[_T], _R], jobs: Iterable[_T], workers: int, size: Callable[[_T], int]
) -> Iterator[_R]:
    """Yield the results of jobs in their order; a bounded number and size of them is under way."""
    waiting: deque[Future[_R]] = deque()
    sizes: deque[int] = deque()
    pool = ThreadPoolExecutor(workers)
    try:
        for job in jobs:
            pixels = size(job)
            while waiting and (len(waiting) >= 2 * _CHUNK or sum(sizes) + pixels > _PIXELS):
                sizes.popleft()
                yield waiting.popleft().result()
            waiting.append(pool.submit(work, job))
            sizes.append(pixels)
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


def _chunk(
    records: Iterator[CocoRecord], results: Iterator[Tensor | Skipped]
) -> list[tuple[CocoRecord, Tensor | Skipped]]:
    """Take what one lookup gets."""
    chunk: list[tuple[CocoRecord, Tensor | Skipped]] = []
    pixels = 0
    for record in records:  # not zipped: that would hold the last map until it has the next
        result = next(results)
        chunk.append((record, result))
        pixels += result.numel() // 3 if isinstance(result, Tensor) else 0
        if len(chunk) >= _CHUNK or pixels >= _PIXELS:
            break
    return chunk


def _fingerprint(coco: CocoFolder) -> dict[str, str]:
    # Folders by their names alone: a data set may lie elsewhere when the work goes on.
    with coco.annotations.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return {
        "annotations": coco.annotations.name,
        "annotations_sha256": digest,
        "images": coco.images.name,
        "panoptic": coco.panoptic.name,
    }


def _open_output(folder: Path, manifest: dict[str, Any], overwrite: bool) -> None:
    path = folder / MANIFEST
    if path.is_file():
        there = read_manifest(path)
        if not overwrite:
            _check_same(path, there, manifest)
            return
        own = [file for file in folder.iterdir() if _OWN.fullmatch(file.name)]
        # The settings' file goes last: until then it says whose folder this is.
        for file in sorted(own, key=lambda file: file.name == MANIFEST):
            if not file.is_dir():
                file.unlink()
    _write_json(path, {**manifest, "complete": False})


def _check_own(folder: Path) -> None:
    if (folder / MANIFEST).is_file():
        read_manifest(folder / MANIFEST)
        return
    # A run that was killed at once has left no more than its lock and a temporary file.
    names = (file.name for file in folder.iterdir())
    others = sorted(name for name in names if name != LOCK and not writing.is_temporary(name))
    if others:
        raise ValueError(
            f"{folder}: expected a new or empty folder, or one of an earlier run, found "
            f"{others[0]!r} and no {MANIFEST}; name another folder"
        )


def _check_same(path: Path, there: dict[str, Any], wanted: dict[str, Any]) -> None:
    differences = [
        f"{name} ({there[part].get(name)!r} there, {value!r} now)"
        for part in ("settings", "inputs")
        for name, value in wanted[part].items()
        if there[part].get(name) != value
    ]
    if differences:
        raise ValueError(
            f"{path}: was prepared with another {', '.join(differences)}; name another folder, or "
            "--overwrite this one"
        )


def _is_done(folder: Path, number: int) -> bool:
    if not shard_files(folder, number)[1].is_file():
        return False
    try:
        Shard(folder, number)
    except (ValueError, OSError):
        # Truncated since, or no shard at all: it is made again. Bytes that were changed in place
        # are not noticed here, since that would mean to read all of it.
        return False
    return True


def _report(folder: Path, shards: int, resumed: int, faults: Sequence[Skipped]) -> PrepareReport:
    images = instructions = empty = 0
    skipped = list(faults)
    for number in range(shards):
        shard = Shard(folder, number)
        images += len(shard)
        instructions += int(shard.num_instructions.sum())
        empty += int((shard.num_objects == 0).sum())
        skipped += shard.skipped()
    return PrepareReport(folder, images, instructions, empty, shards, resumed, tuple(skipped))


def _finish(folder: Path, manifest: dict[str, Any], report: PrepareReport) -> None:
    writing.write_file(folder / REPORT, "".join(skip_line(one) for one in report.skipped).encode())
    if not report.images:
        raise ValueError(
            f"{folder}: not one image could be prepared; {REPORT} there says why for "
            f"{len(report.skipped)} of them"
        )
    counts = {
        "shards": report.shards,
        "images": report.images,
        "instructions": report.instructions,
        "without_objects": report.without_objects,
        "skipped": len(report.skipped),
    }
    _write_json(folder / MANIFEST, {**manifest, "complete": True, "counts": counts})


def _write_json(path: Path, content: dict[str, Any]) -> None:
    writing.write_file(path, (json.dumps(content, indent=2) + "\n").encode())
