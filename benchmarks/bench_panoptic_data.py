"""From COCO's PNGs to crayon rows and words: images per second of the whole data path.

Two rows are floors: Pillow's decoding inside of it, and that into an array, as every reader has to.
Ours over the latter is what everything else costs. The released algorithm starts from the same
colours.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from benchmarks.conftest import Measure
from benchmarks.panoptic_problem import Batch
from benchmarks.panoptic_providers import released_algorithm
from collavo.panoptic import format_objects, write_panoptic_png
from collavo.panoptic.maps import read_panoptic_colours
from collavo.panoptic.text import detections_by_image
from collavo_kernels import panoptic_lookup
from collavo_kernels.ops.panoptic_lookup import decode_colours

CASES = [
    "480x640/s15/b16",
    pytest.param("960x1280/s60/b16", marks=pytest.mark.full),
]
PROVIDERS = ("pillow-alone", "decoding-alone", "ours", "released-algorithm")


def pillow_alone(paths: Sequence[Path]) -> None:
    for path in paths:
        with Image.open(path) as picture:
            picture.load()


def decode_alone(paths: Sequence[Path]) -> list[Any]:
    return [np.asarray(Image.open(path)) for path in paths]


def read(paths: Sequence[Path]) -> list[Tensor]:
    return [read_panoptic_colours(path) for path in paths]


def ours(paths: Sequence[Path], batch: Batch) -> list[str]:
    """Decode, look up all maps in one call, and write every image's objects as text."""
    crayon = panoptic_lookup(read(paths), batch.ids, batch.classes, grid=batch.grid)
    return [format_objects(objects) for objects in detections_by_image(crayon)]


def released(paths: Sequence[Path], batch: Batch) -> object:
    batch.maps = torch.stack([decode_colours(each) for each in read(paths)])
    return released_algorithm(batch)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("provider", PROVIDERS)
def bench_panoptic_data(measure: Measure, tmp_path: Path, provider: str, case: str) -> None:
    batch = Batch(case)
    paths = [tmp_path / f"{i}.png" for i in range(len(batch.ids))]
    for path, each in zip(paths, batch.maps, strict=True):
        write_panoptic_png(path, each)
    calls: dict[str, Callable[[], object]] = {
        "pillow-alone": lambda: pillow_alone(paths),
        "decoding-alone": lambda: decode_alone(paths),
        "ours": lambda: ours(paths, batch),
        "released-algorithm": lambda: released(paths, batch),
    }
    measure(
        calls[provider],
        op="panoptic_data",
        provider=provider,
        case=case,
        mode="images",
        dtype=torch.uint8,
        bytes=batch.maps.numel() * 3,
        config={"images": len(paths), "png_bytes": sum(path.stat().st_size for path in paths)},
    )
