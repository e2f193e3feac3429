"""Who is measured for ``panoptic_lookup``: this package, and peers by their own definition.

The released algorithm is for maps of the grid's size; on a larger map it is given a nearest
reduction, which it does not have. NumPy and torch cut cells where they share pixels.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks import caches
from benchmarks.ops.panoptic_lookup_cases import Batch
from benchmarks.registry import Call, Row
from collavo_kernels import CrayonMap, panoptic_lookup

Run = Callable[[], object]
COLOURS = "-colours"


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


def ours(
    batch: Batch,
    device: torch.device,
    *,
    backend: str,
    reduce: str = "majority",
    coloured: bool = False,
) -> Callable[[], CrayonMap]:
    """Return the operator's call; what it reads is on the device already."""
    maps = (batch.in_colours() if coloured else batch.maps).to(device)

    def call() -> CrayonMap:
        return panoptic_lookup(
            maps, batch.ids, batch.classes, grid=batch.grid, reduce=reduce, backend=backend
        )

    return call


def with_torch(batch: Batch, device: torch.device) -> Run:
    """Return the call of torch's operators."""
    maps = batch.maps.to(device)
    return lambda: torch_operators(batch, maps)


PROVIDERS: dict[str, Callable[[Batch, torch.device], Run]] = {
    "released-algorithm": lambda batch, device: lambda: released_algorithm(batch),
    "numpy": lambda batch, device: lambda: careful_numpy(batch),
    "torch": with_torch,
    "ours:cpu": functools.partial(ours, backend="cpu"),
    "ours:cpu-nearest": functools.partial(ours, backend="cpu", reduce="nearest"),
    "ours:cpu-colours": functools.partial(ours, backend="cpu", coloured=True),
    "ours:triton": functools.partial(ours, backend="triton"),
    "ours:triton-colours": functools.partial(ours, backend="triton", coloured=True),
    "reference": functools.partial(ours, backend="reference"),
}


def prepare(row: Row, device: torch.device) -> Call:
    """Return the row's call; a cold one has other maps each time."""
    batch, make = Batch(row.case), PROVIDERS[row.provider]
    cold = row.mode.endswith(caches.COLD)
    many = caches.copies_past_cache(batch.maps.nbytes, device) if cold else 1
    calls = [make(batch.copy() if cold else batch, device) for _ in range(many)]
    following = itertools.cycle(calls)
    # A row says what was read: three bytes a pixel, or four.
    coloured = row.provider.endswith(COLOURS)
    return Call(
        (lambda: next(following)()) if cold else calls[0],
        dtype=torch.uint8 if coloured else torch.int32,
        bytes=batch.maps.numel() * (3 if coloured else 4),
        config={"grid": batch.grid, "threads": torch.get_num_threads()},
        # The others read values from the device.
        capture=row.is_ours,
        before=caches.OtherWork() if cold else None,
    )
