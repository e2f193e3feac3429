"""panoptic_lookup beside the released algorithm, NumPy and torch; CrayonPrompt per row and token.

The peers do the work of their own definition. The released algorithm is for maps of the grid's
size; on a larger map it is given a nearest reduction, which it does not have. NumPy and torch cut
cells where they share pixels. A case is size / segments / batch, on a grid of 35 x 35 unless it
ends with another.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from benchmarks.conftest import Measure, chosen_kind
from collavo_kernels import CrayonMap, panoptic_lookup
from collavo_kernels.nn import CrayonPrompt

QUICK = ("480x640/s15/b1", "480x640/s15/b16", "480x640/s15/b64")
FULL = tuple(
    name
    for size in ("480x640", "960x1280")
    for segments in (5, 15, 60)
    for batch in (1, 16, 64)
    for grid in ("", "/g24")
    if (name := f"{size}/s{segments}/b{batch}{grid}") not in QUICK
)


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


def ours(batch: Batch, provider: str, reduce: str, device: torch.device) -> Callable[[], CrayonMap]:
    backend = provider.removeprefix("ours:").split("-")[0]
    coloured = provider.endswith("-colours")
    maps = (batch.in_colours() if coloured else batch.maps).to(device)

    def call() -> CrayonMap:
        return panoptic_lookup(
            maps, batch.ids, batch.classes, grid=batch.grid, reduce=reduce, backend=backend
        )

    return call


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


def marked(provider: str, case: str) -> Any:
    """Return the parameters, marked as the selections want them."""
    marks = [pytest.mark.full] if case in FULL else []
    few = case == QUICK[-1] and provider in ("ours:triton", "torch")
    marks += [pytest.mark.quick_gpu] if few else []
    return pytest.param(provider, case, marks=marks)


@pytest.mark.parametrize(
    ("provider", "case"), [marked(p, c) for p in PROVIDERS for c in (*QUICK, *FULL)]
)
def bench_panoptic_lookup(
    measure: Measure,
    device: torch.device,
    pytestconfig: pytest.Config,
    provider: str,
    case: str,
) -> None:
    (reduce, needs), kind = PROVIDERS[provider], chosen_kind(pytestconfig)
    if needs and kind != needs:
        pytest.skip(f"{provider} runs on {needs}, the device is {kind}")
    batch = Batch(case)
    maps = batch.maps.to(device)
    fn: Callable[[], object]
    if provider == "released-algorithm":
        fn = lambda: released_algorithm(batch)  # noqa: E731
    elif provider == "numpy":
        fn = lambda: careful_numpy(batch)  # noqa: E731
    elif provider == "torch":
        fn = lambda: torch_operators(batch, maps)  # noqa: E731
    else:
        fn = ours(batch, provider, reduce, device)
    measure(
        fn,
        op="panoptic_lookup",
        provider=provider,
        case=case,
        mode=reduce,
        # A row says what was read: three bytes a pixel, or four.
        dtype=torch.uint8 if provider.endswith("-colours") else torch.int32,
        bytes=batch.maps.numel() * (3 if provider.endswith("-colours") else 4),
        config={"grid": batch.grid, "threads": torch.get_num_threads()},
        # The others read values from the device.
        capture=provider.startswith("ours"),
    )


@pytest.mark.parametrize("case", ["d128", pytest.param("d1024", marks=pytest.mark.full)])
@pytest.mark.parametrize("provider", ["ours", "per-token"])
def bench_crayon_prompt(measure: Measure, device: torch.device, provider: str, case: str) -> None:
    """Forward and backward for 16 images of 35x35 tokens; hidden size is four times the width."""
    batch, width = Batch("480x640/s15/b16"), int(case[1:])
    maps = batch.maps.to(device)
    crayon = panoptic_lookup(maps, batch.ids, batch.classes, grid=batch.grid)
    module = CrayonPrompt(embed_dim=width, hidden_size=4 * width, zero_init=False).to(device)
    index = crayon.row_index.long()

    def call() -> None:
        module.zero_grad(set_to_none=True)
        if provider == "ours":
            table = module(crayon)
        else:
            table = module.project(crayon.row_class[index], crayon.row_number[index])
        table.sum().backward()

    measure(
        call,
        op="crayon_prompt",
        provider=provider,
        case=case,
        mode="fwd+bwd",
        # The work there is: forward, weight gradient and input gradient of both layers, per row.
        flops=2 * 3 * crayon.num_rows * (4 * width * width + 16 * width * width),
        config={
            "rows": crayon.num_rows,
            "tokens": index.numel(),
            "embed_dim": width,
            "hidden_size": 4 * width,
        },
    )
