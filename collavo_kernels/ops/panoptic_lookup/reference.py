"""The specification: plain PyTorch, any device, no loop over segments."""

from __future__ import annotations

import torch
from torch import Tensor

from collavo_kernels.ops.panoptic_lookup.inputs import (
    LookupInputs,
    LookupResult,
    decode_colours,
    first_rows,
    row_columns,
)


def cell_bounds(length: int, cells: int) -> tuple[Tensor, Tensor]:
    """Return where each cell begins and ends (exclusive) along one axis, int64 ``[cells]``.

    ``floor(i * length / cells)`` to ``ceil((i + 1) * length / cells)``: cells of a map that the
    grid does not divide share a pixel, and cells of a map smaller than the grid share pixels.
    """
    i = torch.arange(cells)
    return i * length // cells, -(-(i + 1) * length // cells)


def cell_centers(length: int, cells: int) -> Tensor:
    """Return the pixel at ``floor((i + 1/2) * length / cells)`` of each cell, int64 ``[cells]``."""
    return (2 * torch.arange(cells) + 1) * length // (2 * cells)


def forward(inputs: LookupInputs) -> LookupResult:
    """Look up every pixel's row, then reduce to cells and to rows."""
    device = inputs.device
    columns = _send(torch.from_numpy(row_columns(inputs)), device)
    first = first_rows(inputs.segment_counts)
    row_index, box, area = [], [], []
    image = 0
    for given in inputs.maps:
        maps = decode_colours(given) if given.dtype == torch.uint8 else given
        rows = _pixel_rows(maps, columns, _send(first[image : image + len(maps)], device), image)
        choose = _majority if inputs.reduce == "majority" else _nearest
        row_index.append(choose(rows, inputs).to(torch.int32))
        box.append(_boxes(rows, inputs.num_rows))
        area.append(_areas(rows, inputs.num_rows))
        image += len(maps)
    row_box = torch.zeros(inputs.num_rows, 4, device=device)
    row_area = torch.zeros(inputs.num_rows, dtype=torch.int32, device=device)
    for each in box:  # rows of other maps are 0 in each
        row_box += each
    for counted in area:
        row_area += counted
    row_box.masked_fill_((columns[3] == 0)[:, None], 0)
    cells = inputs.grid_h * inputs.grid_w
    index = torch.cat(row_index) if row_index else columns.new_zeros(0, cells)
    row_class, number, row_image, segment = (column.clone() for column in columns)
    return LookupResult(index, row_class, number, row_image, segment, row_box, row_area)


def _send(tensor: Tensor, device: torch.device) -> Tensor:
    """Copy to the maps' device without waiting for it."""
    return tensor.to(device, non_blocking=True)


def _pixel_rows(maps: Tensor, columns: Tensor, first: Tensor, image: int) -> Tensor:
    """Return the row of every pixel, int64 ``[n, H, W]``.

    Rows are sorted by image and id, so a pixel's row is found by a binary search for its image and
    id; a pixel without a listed id has its image's first row.
    """
    keys = (columns[2].long() << 32) | columns[3].long()
    images = torch.arange(image, image + len(maps), device=maps.device)[:, None, None]
    wanted = (images << 32) | maps.clamp_min(0).long()
    found = torch.searchsorted(keys, wanted.contiguous()).clamp_max(len(keys) - 1)
    return torch.where(keys[found] == wanted, found, first[:, None, None])


def _majority(rows: Tensor, inputs: LookupInputs) -> Tensor:
    """Return the most frequent row of each cell, ties to the lowest, int64 ``[n, P]``."""
    pixels, inside = _cell_pixels(rows, inputs)
    # Pixels outside of the cell become one row that does not exist, and sort to the end.
    pixels = torch.where(inside, pixels, inputs.num_rows).sort(-1).values
    count = torch.searchsorted(pixels, pixels, right=True) - torch.searchsorted(pixels, pixels)
    # The largest of (count, -row): among equal counts the lowest row wins.
    score = torch.where(pixels < inputs.num_rows, (count << 32) - pixels, -1)
    return (-score.amax(-1)) & 0xFFFFFFFF


def _cell_pixels(rows: Tensor, inputs: LookupInputs) -> tuple[Tensor, Tensor]:
    """Gather each cell's pixels: ``[n, P, K]``, and which of the K lie inside, ``[P, K]``."""
    height, width = rows.shape[1:]
    top, bottom = cell_bounds(height, inputs.grid_h)
    left, right = cell_bounds(width, inputs.grid_w)
    y = top[:, None] + torch.arange(int((bottom - top).max()))
    x = left[:, None] + torch.arange(int((right - left).max()))
    inside = (y < bottom[:, None])[:, None, :, None] & (x < right[:, None])[None, :, None, :]
    y, x = y.clamp_max(height - 1)[:, None, :, None], x.clamp_max(width - 1)[None, :, None, :]
    cells = inputs.grid_h * inputs.grid_w
    pixels = rows[:, _send(y, rows.device), _send(x, rows.device)]
    k = y.numel() // inputs.grid_h * (x.numel() // inputs.grid_w)
    return pixels.reshape(len(rows), cells, k), _send(inside.reshape(cells, k), rows.device)


def _nearest(rows: Tensor, inputs: LookupInputs) -> Tensor:
    """Return the row of the pixel in the middle of each cell, int64 ``[n, P]``."""
    y = _send(cell_centers(rows.shape[1], inputs.grid_h), rows.device)
    x = _send(cell_centers(rows.shape[2], inputs.grid_w), rows.device)
    return rows[:, y[:, None], x].flatten(1)


def _areas(rows: Tensor, num_rows: int) -> Tensor:
    """Count the pixels of each row, int32 ``[T]``."""
    flat = rows.flatten()
    counts = torch.zeros(num_rows, dtype=torch.int32, device=rows.device)
    return counts.index_add_(0, flat, torch.ones_like(flat, dtype=torch.int32))


def _boxes(rows: Tensor, num_rows: int) -> Tensor:
    """Return each row's box as fractions of the map, float32 ``[T, 4]``; 0 without a pixel."""
    height, width = rows.shape[1:]
    y = torch.arange(height, device=rows.device)[:, None].expand(rows.shape)
    x = torch.arange(width, device=rows.device).expand(rows.shape)

    def extreme(values: Tensor, how: str) -> Tensor:
        out = torch.zeros(num_rows, dtype=torch.int64, device=rows.device)
        return out.scatter_reduce(0, rows.flatten(), values.flatten(), how, include_self=False)

    box = torch.stack(
        [extreme(x, "amin"), extreme(y, "amin"), extreme(x + 1, "amax"), extreme(y + 1, "amax")], 1
    )
    size = torch.tensor([width, height, width, height], dtype=torch.float32)
    return box / _send(size, rows.device)
