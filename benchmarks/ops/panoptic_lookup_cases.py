"""What ``panoptic_lookup`` is measured on: maps with connected segments.

A case is size / segments / batch, on a grid of 35 x 35 unless it ends with another.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator

import torch
from torch import Tensor

from benchmarks.caches import COLD
from benchmarks.registry import Row

OP = "panoptic_lookup"
QUICK = ("480x640/s15/b1", "480x640/s15/b16", "480x640/s15/b64")
FULL = tuple(
    name
    for size in ("480x640", "960x1280")
    for segments in (5, 15, 60)
    for batch in (1, 16, 64)
    for grid in ("", "/g24")
    if (name := f"{size}/s{segments}/b{batch}{grid}") not in QUICK
)
COLD_CASES = QUICK[:2]
QUICK_GPU = ("ours:triton", "torch")
# Who reduces how, by the kind of device.
MODES: dict[str, dict[str, tuple[str, ...]]] = {
    "cpu": {
        "majority": ("numpy", "ours:cpu", "torch", "ours:cpu-colours", "reference"),
        "nearest": ("released-algorithm", "ours:cpu-nearest"),
    },
    "cuda": {"majority": ("torch", "ours:triton", "ours:triton-colours", "reference")},
}


def rows(kind: str) -> Iterator[Row]:
    """Yield what is measured: calls that follow each other, and on a CPU between other work."""
    for case in (*QUICK, *FULL):
        for mode, named in MODES[kind].items():
            for provider in named:
                few = case == QUICK[-1] and provider in QUICK_GPU
                yield Row(OP, mode, case, provider, quick=case in QUICK, quick_gpu=few)
    for case in COLD_CASES if kind == "cpu" else ():
        for mode, named in MODES[kind].items():
            for provider in named:
                if provider != "reference":
                    yield Row(OP, mode + COLD, case, provider)


class Batch:
    """Maps with connected segments, as a segmenter or an annotator makes them."""

    def __init__(self, case: str) -> None:
        size, segments, batch, *others = case.split("/")
        cells = int(others[0][1:]) if others else 35
        self.grid = (cells, cells)
        self.height, self.width = (int(side) for side in size.split("x"))
        count = int(segments[1:])
        generator = torch.Generator().manual_seed(0)
        # Ids as in COCO: colours, up to 2^24.
        ids = [torch.randperm(2**24 - 1, generator=generator)[:count].int() + 1 for _ in range(4)]
        maps = [self._map(each, generator) for each in ids]
        images = [k % 4 for k in range(int(batch[1:]))]
        self.maps = torch.stack([maps[k] for k in images])
        self.ids = [ids[k] for k in images]
        self.classes = [torch.arange(count, dtype=torch.int32) % 40 for _ in images]

    def copy(self) -> Batch:
        """Return a batch whose maps are the same in memory of their own."""
        other = copy.copy(self)
        other.maps = self.maps.clone()
        return other

    def in_colours(self) -> Tensor:
        """Return the maps as a decoder of COCO's PNGs does, uint8 ``[B, H, W, 3]``."""
        channels = (self.maps & 255, self.maps >> 8 & 255, self.maps >> 16)
        return torch.stack(channels, -1).to(torch.uint8)

    def _map(self, ids: Tensor, generator: torch.Generator) -> Tensor:
        """Every pixel takes the id of the nearest of some points; a tenth stays unlabelled."""
        points = len(ids) + max(1, len(ids) // 10)
        y = torch.randint(self.height, (points, 1, 1), generator=generator)
        x = torch.randint(self.width, (points, 1, 1), generator=generator)
        rows, columns = torch.arange(self.height)[:, None], torch.arange(self.width)
        best = torch.full((self.height, self.width), 2**30)
        out = torch.zeros(self.height, self.width, dtype=torch.int32)
        for k in range(points):
            far = (rows - y[k]) ** 2 + (columns - x[k]) ** 2
            nearer = far < best
            best = torch.where(nearer, far, best)
            out[nearer] = ids[k] if k < len(ids) else 0
        return out
