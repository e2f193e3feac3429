"""Who is measured for ``panoptic_lookup``: this package, and peers by their own definition.

The released algorithm is for maps of the grid's size; on a larger map it is given a nearest
reduction, which it does not have. NumPy and torch cut cells where they share pixels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.panoptic_problem import Batch
from collavo_kernels import CrayonMap, panoptic_lookup

# How a provider reduces, and the kind of device it is for, if any.
PROVIDERS = {
    "released-algorithm": ("nearest", "cpu"),
    "numpy": ("majority", "cpu"),
    "ours:cpu": ("majority", "cpu"),
    "torch": ("majority", ""),
    "ours:cpu-nearest": ("nearest", "cpu"),
    "ours:cpu-colours": ("majority", "cpu"),
    "ours:triton": ("majority", "cuda"),
    "ours:triton-colours": ("majority", "cuda"),
    "reference": ("majority", ""),
}


def released_algorithm(batch: Batch) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Loop over the ids of each map: masks, ``torch.where`` for cells and boxes."""
    out = []
    for segmentation, ids, classes in zip(batch.maps, batch.ids, batch.classes, strict=True):
        label_of = dict(zip(ids.tolist(), classes.tolist(), strict=True))
        semantic, number = torch.zeros_like(segmentation), torch.zeros_like(segmentation)
        seen: dict[int, int] = {}
        boxes = []
        for segment in segmentation.unique().tolist():
            if segment <= 0:
                continue
            label = label_of[segment]
            seen[label] = seen.get(label, 0) + 1
            y, x = torch.where(segmentation == segment)
            semantic[y, x] = label + 1
            number[y, x] = seen[label]
            boxes.append(torch.stack([x.min(), y.min(), x.max() + 1, y.max() + 1]))
        height, width = segmentation.shape
        i = (2 * torch.arange(batch.grid[0]) + 1) * height // (2 * batch.grid[0])
        j = (2 * torch.arange(batch.grid[1]) + 1) * width // (2 * batch.grid[1])
        cells = (semantic[i[:, None], j].flatten(), number[i[:, None], j].flatten())
        out.append((*cells, torch.stack(boxes) / 35))
    return out


def careful_numpy(batch: Batch) -> list[tuple[Any, ...]]:
    """One ``np.unique``, then ``bincount`` of (cell, segment) pairs; no loop over segments."""
    out: list[tuple[Any, ...]] = []
    for tensor, ids_tensor in zip(batch.maps, batch.ids, strict=True):
        segmentation, ids = tensor.numpy(), np.sort(ids_tensor.numpy())
        height, width = segmentation.shape
        grid_h, grid_w = batch.grid
        present, rows = np.unique(segmentation, return_inverse=True)
        rows = np.where(np.isin(present, ids), np.searchsorted(ids, present) + 1, 0)[rows]
        rows = rows.reshape(height, width)
        # Cells are cut, not shared, at their borders: what bincount can do in one go.
        cell = (np.arange(height) * grid_h // height)[:, None] * grid_w
        cell = cell + np.arange(width) * grid_w // width
        count = len(ids) + 1
        pairs = np.bincount((cell * count + rows).ravel(), minlength=grid_h * grid_w * count)
        index = pairs.reshape(-1, count).argmax(1)
        area = np.bincount(rows.ravel(), minlength=count)
        out.append((index, area, _numpy_boxes(rows, count)))
    return out


def _numpy_boxes(rows: np.ndarray, count: int) -> np.ndarray:
    """Boxes from the (row, y) and (row, x) pairs that occur."""
    height, width = rows.shape
    by_y = np.zeros((count, height), dtype=bool)
    by_x = np.zeros((count, width), dtype=bool)
    by_y[rows, np.arange(height)[:, None]] = True
    by_x[rows, np.arange(width)] = True
    x0, y0 = by_x.argmax(1), by_y.argmax(1)
    x1, y1 = width - by_x[:, ::-1].argmax(1), height - by_y[:, ::-1].argmax(1)
    return np.stack([x0 / width, y0 / height, x1 / width, y1 / height], 1)


def torch_operators(batch: Batch, maps: Tensor) -> list[tuple[Tensor, ...]]:
    """Do what NumPy does in torch's operators: a search in the ids, and counts of pairs."""
    out: list[tuple[Tensor, ...]] = []
    height, width = maps.shape[1:]
    grid_h, grid_w = batch.grid
    y = torch.arange(height, device=maps.device)
    x = torch.arange(width, device=maps.device)
    cell = (y * grid_h // height)[:, None] * grid_w + x * grid_w // width
    across, down = x.repeat(height), y.repeat_interleave(width)
    for segmentation, ids_here in zip(maps, batch.ids, strict=True):
        ids = ids_here.sort().values.to(maps.device)
        place = torch.searchsorted(ids, segmentation).clamp_max(len(ids) - 1)
        rows = torch.where(ids[place] == segmentation, place + 1, 0)
        count = len(ids) + 1
        pairs = torch.bincount((cell * count + rows).view(-1), minlength=grid_h * grid_w * count)
        index = pairs.view(-1, count).argmax(1)
        area = torch.bincount(rows.view(-1), minlength=count)
        out.append((index, area, *_torch_boxes(rows.view(-1), across, down, count)))
    return out


def _torch_boxes(rows: Tensor, across: Tensor, down: Tensor, count: int) -> Iterator[Tensor]:
    for values, how in ((across, "amin"), (down, "amin"), (across, "amax"), (down, "amax")):
        yield values.new_zeros(count).scatter_reduce(0, rows, values, how, include_self=False)


def ours(batch: Batch, provider: str, device: torch.device) -> Callable[[], CrayonMap]:
    backend = provider.removeprefix("ours:").split("-")[0]
    reduce, coloured = PROVIDERS[provider][0], provider.endswith("-colours")
    maps = (batch.in_colours() if coloured else batch.maps).to(device)

    def call() -> CrayonMap:
        return panoptic_lookup(
            maps, batch.ids, batch.classes, grid=batch.grid, reduce=reduce, backend=backend
        )

    return call


def call_of(provider: str, batch: Batch, device: torch.device) -> Callable[[], object]:
    """Return the provider's call on a batch; what it reads is on the device already."""
    if provider == "released-algorithm":
        return lambda: released_algorithm(batch)
    if provider == "numpy":
        return lambda: careful_numpy(batch)
    if provider == "torch":
        maps = batch.maps.to(device)
        return lambda: torch_operators(batch, maps)
    return ours(batch, provider, device)
