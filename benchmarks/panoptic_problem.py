"""The benchmark of ``panoptic_lookup``: the maps that everybody is given."""

from __future__ import annotations

import copy

import torch
from torch import Tensor


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
