"""Triton kernels: one program per cell over the whole batch, then one small launch for the rows.

A cell's program goes through the rows that occur in the cell in ascending order: each turn counts
one row's pixels and finds the next row. Cells hold one to three rows, so the pixels, which
stay in cache, are read two to four times. Sums over cells are integer atomics, so their order does
not show.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from collavo_kernels._backends import device_of
from collavo_kernels.ops.panoptic_lookup.inputs import (
    LookupInputs,
    LookupResult,
    image_table,
    with_packed_lines,
)

BLOCK = 256  # pixels a program looks at together; a cell of 640x480 on a 35x35 grid has 280
ROWS = 256  # rows a program of the second kernel writes
FACTS = 5  # area, then the distances of the box's edges from the opposite sides

# Host buffers whose copy a CUDA graph replays: they must outlive the graph.
_captured: list[Tensor] = []


@triton.jit
def _find(row_ids, ids, mask, rows, STEPS: tl.constexpr):
    """Binary search of each id in the image's sorted row ids; 0, the unknown row, on a miss."""
    low = tl.zeros_like(ids)
    high = low + rows
    for _ in tl.static_range(STEPS):
        middle = low + (high - low) // 2
        not_above = tl.load(row_ids + middle, mask=mask, other=0) <= ids
        low = tl.where(not_above, middle, low)
        high = tl.where(not_above, high, middle)
    hit = tl.load(row_ids + low, mask=mask, other=0) == ids
    return tl.where(hit, low, 0)


@triton.jit
def lookup_cells(
    images,  # [B, 6] int64: address, height, width, line stride, first row, rows
    row_ids,  # [T] int32
    row_index,  # [B, grid_h * grid_w] int32
    facts,  # [T, 5] int32, zeros
    grid_h,
    grid_w,
    STEPS: tl.constexpr,
    MAJORITY: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Write one cell's row; add the pixels that belong to no other cell to their rows' facts."""
    program = tl.program_id(0)
    cells = grid_h * grid_w
    entry = images + program // cells * 6
    cell = program % cells
    i = cell // grid_w
    j = cell % grid_w
    pixels = tl.load(entry).to(tl.pointer_type(tl.int32))
    height = tl.load(entry + 1).to(tl.int32)
    width = tl.load(entry + 2).to(tl.int32)
    stride = tl.load(entry + 3)
    first_row = tl.load(entry + 4)
    rows = tl.load(entry + 5).to(tl.int32)
    ids_here = row_ids + first_row
    facts_here = facts + first_row * 5

    top = i * height // grid_h
    left = j * width // grid_w
    owned_bottom = (i + 1) * height // grid_h
    owned_right = (j + 1) * width // grid_w
    tall = ((i + 1) * height + grid_h - 1) // grid_h - top
    wide = ((j + 1) * width + grid_w - 1) // grid_w - left
    total = tall * wide

    best = 0
    best_row = 0
    candidate = 0
    while candidate < rows:
        count = 0
        area = 0
        from_right = 0
        from_bottom = 0
        right = 0
        bottom = 0
        following = rows
        start = 0
        while start < total:
            offset = start + tl.arange(0, BLOCK)
            inside = offset < total
            y = top + offset // wide
            x = left + offset % wide
            at = y.to(tl.int64) * stride + x
            ids = tl.maximum(tl.load(pixels + at, mask=inside, other=0), 0)
            row = _find(ids_here, ids, inside, rows, STEPS)
            here = inside & (row == candidate)
            owned = here & (y < owned_bottom) & (x < owned_right)
            count += tl.sum(here.to(tl.int32))
            area += tl.sum(owned.to(tl.int32))
            from_right = tl.maximum(from_right, tl.max(tl.where(owned, width - x, 0)))
            from_bottom = tl.maximum(from_bottom, tl.max(tl.where(owned, height - y, 0)))
            right = tl.maximum(right, tl.max(tl.where(owned, x + 1, 0)))
            bottom = tl.maximum(bottom, tl.max(tl.where(owned, y + 1, 0)))
            later = inside & (row > candidate)
            following = tl.minimum(following, tl.min(tl.where(later, row, rows)))
            start += BLOCK
        better = count > best
        best = tl.where(better, count, best)
        best_row = tl.where(better, candidate, best_row)
        if area > 0:
            fact = facts_here + candidate * 5
            tl.atomic_add(fact, area, sem="relaxed")
            tl.atomic_max(fact + 1, from_right, sem="relaxed")
            tl.atomic_max(fact + 2, from_bottom, sem="relaxed")
            tl.atomic_max(fact + 3, right, sem="relaxed")
            tl.atomic_max(fact + 4, bottom, sem="relaxed")
        candidate = following

    if not MAJORITY:
        y = (2 * i + 1) * height // (2 * grid_h)
        x = (2 * j + 1) * width // (2 * grid_w)
        at = y.to(tl.int64) * stride + x + tl.arange(0, 1)
        ids = tl.maximum(tl.load(pixels + at), 0)
        best_row = tl.max(_find(ids_here, ids, ids >= 0, rows, STEPS))
    tl.store(row_index + program, first_row.to(tl.int32) + best_row)


@triton.jit
def finish_rows(
    images,  # [B, 6] int64
    columns,  # [4, T] int32: class, number, image, segment id
    facts,  # [T, 5] int32
    row_class,
    row_number,
    row_image,
    row_segment_id,
    row_box,  # [T, 4] float32
    row_area,
    total,
    ROWS: tl.constexpr,
):
    """Write every row's outputs; the box is divided here, once per edge and rounded correctly."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    live = row < total
    tl.store(row_class + row, tl.load(columns + row, mask=live, other=0), mask=live)
    tl.store(row_number + row, tl.load(columns + total + row, mask=live, other=0), mask=live)
    image = tl.load(columns + 2 * total + row, mask=live, other=0)
    segment = tl.load(columns + 3 * total + row, mask=live, other=0)
    tl.store(row_image + row, image, mask=live)
    tl.store(row_segment_id + row, segment, mask=live)
    fact = facts + row * 5
    area = tl.load(fact, mask=live, other=0)
    tl.store(row_area + row, area, mask=live)
    boxed = live & (segment > 0) & (area > 0)
    height = tl.load(images + image.to(tl.int64) * 6 + 1, mask=live, other=1).to(tl.int32)
    width = tl.load(images + image.to(tl.int64) * 6 + 2, mask=live, other=1).to(tl.int32)
    x0 = width - tl.load(fact + 1, mask=live, other=0)
    y0 = height - tl.load(fact + 2, mask=live, other=0)
    x1 = tl.load(fact + 3, mask=live, other=0)
    y1 = tl.load(fact + 4, mask=live, other=0)
    across = width.to(tl.float32)
    down = height.to(tl.float32)
    box = row_box + row * 4
    tl.store(box, tl.where(boxed, tl.div_rn(x0.to(tl.float32), across), 0.0), mask=live)
    tl.store(box + 1, tl.where(boxed, tl.div_rn(y0.to(tl.float32), down), 0.0), mask=live)
    tl.store(box + 2, tl.where(boxed, tl.div_rn(x1.to(tl.float32), across), 0.0), mask=live)
    tl.store(box + 3, tl.where(boxed, tl.div_rn(y1.to(tl.float32), down), 0.0), mask=live)


def forward(inputs: LookupInputs) -> LookupResult:
    """Send the tables, launch the two kernels; nothing waits for the device."""
    device = inputs.device
    images = len(inputs.counts)
    rows = inputs.num_rows
    cells = inputs.grid_h * inputs.grid_w

    def integers(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.int32, device=device)

    result = LookupResult(
        row_index=integers(images, cells),
        row_class=integers(rows),
        row_number=integers(rows),
        row_image=integers(rows),
        row_segment_id=integers(rows),
        row_box=torch.empty(rows, 4, device=device),
        row_area=integers(rows),
    )
    if images == 0:
        return result
    maps = with_packed_lines(inputs.maps)
    table, columns = _send(inputs, image_table(maps, inputs.counts))
    facts = torch.zeros(rows, FACTS, dtype=torch.int32, device=device)
    # The rows of one image are searched: enough halvings for the image with most rows.
    steps = max(inputs.counts).bit_length()
    with device_of(facts):
        lookup_cells[(images * cells,)](
            table,
            columns[3],
            result.row_index,
            facts,
            inputs.grid_h,
            inputs.grid_w,
            STEPS=steps,
            MAJORITY=inputs.reduce == "majority",
            BLOCK=BLOCK,
        )
        finish_rows[(triton.cdiv(rows, ROWS),)](table, columns, facts, *result[1:], rows, ROWS=ROWS)
    return result


def _send(inputs: LookupInputs, table: Tensor) -> tuple[Tensor, Tensor]:
    """Copy both host tables to the device in one asynchronous transfer."""
    on_gpu = inputs.device.type == "cuda"
    rows = inputs.num_rows
    packed = torch.empty(table.numel() + 2 * rows, dtype=torch.int64, pin_memory=on_gpu)
    packed[: table.numel()] = table.flatten()
    packed[table.numel() :].view(torch.int32).view(4, rows).copy_(inputs.columns)
    if on_gpu and torch.cuda.is_current_stream_capturing():
        _captured.append(packed)
    sent = packed.to(inputs.device, non_blocking=True)
    return sent[: table.numel()], sent[table.numel() :].view(torch.int32).view(4, rows)
