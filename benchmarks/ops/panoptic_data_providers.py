"""Who turns PNG files into rows and words, or a part of that.

Two are floors: Pillow's decoding inside of it, and that into an array, as every reader has to.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from benchmarks.ops.panoptic_lookup_cases import Batch
from benchmarks.ops.panoptic_lookup_providers import released_algorithm
from benchmarks.registry import Call, Row
from collavo.panoptic import (
    detections_by_image,
    format_objects,
    read_panoptic_colours,
    write_panoptic_png,
)
from collavo_kernels import decode_colours, panoptic_lookup

Paths = Sequence[Path]


def pillow_alone(paths: Paths, batch: Batch) -> None:
    for path in paths:
        with Image.open(path) as picture:
            picture.load()


def decode_alone(paths: Paths, batch: Batch) -> list[Any]:
    return [np.asarray(Image.open(path)) for path in paths]


def read(paths: Paths) -> list[Tensor]:
    return [read_panoptic_colours(path) for path in paths]


def ours(paths: Paths, batch: Batch) -> list[str]:
    """Decode, look up all maps in one call, and write every image's objects as text."""
    crayon = panoptic_lookup(read(paths), batch.ids, batch.classes, grid=batch.grid)
    return [format_objects(objects) for objects in detections_by_image(crayon)]


def released(paths: Paths, batch: Batch) -> object:
    """Run the released algorithm, which starts from the same colours."""
    batch.maps = torch.stack([decode_colours(each) for each in read(paths)])
    return released_algorithm(batch)


PROVIDERS: dict[str, Callable[[Paths, Batch], object]] = {
    "pillow-alone": pillow_alone,
    "decoding-alone": decode_alone,
    "ours": ours,
    "released-algorithm": released,
}


class Files:
    """The maps of a batch as PNG files in a folder that goes when nobody needs it."""

    def __init__(self, batch: Batch) -> None:
        """Write them."""
        self._folder = tempfile.TemporaryDirectory(prefix="panoptic-data-")
        self.paths = [Path(self._folder.name) / f"{i}.png" for i in range(len(batch.ids))]
        for path, each in zip(self.paths, batch.maps, strict=True):
            write_panoptic_png(path, each)


def prepare(row: Row, device: torch.device) -> Call:
    """Write the files and return the row's call."""
    batch = Batch(row.case)
    files, work = Files(batch), PROVIDERS[row.provider]
    return Call(
        lambda: work(files.paths, batch),
        dtype=torch.uint8,
        bytes=batch.maps.numel() * 3,
        config={
            "images": len(files.paths),
            "png_bytes": sum(path.stat().st_size for path in files.paths),
        },
    )
