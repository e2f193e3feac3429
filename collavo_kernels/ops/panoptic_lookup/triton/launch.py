"""The Triton backend: one launch over the cells of the whole batch, one over its rows."""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from collavo_kernels._backends import device_of
from collavo_kernels.ops.panoptic_lookup.inputs import (
    LookupInputs,
    LookupResult,
    fake,
    image_table,
    row_columns,
    with_packed_lines,
)
from collavo_kernels.ops.panoptic_lookup.triton.kernels import FACTS, finish_rows, lookup_cells

LARGEST_BLOCK = 1024  # pixels a program looks at together; a cell may have more
PIXELS_PER_WARP = 256
ROWS = 256  # rows a program of the second kernel writes

# Host buffers whose copy a CUDA graph replays: they must outlive the graph.
_captured: list[Tensor] = []


def forward(inputs: LookupInputs) -> LookupResult:
    """Send the tables, launch the two kernels; nothing waits for the device."""
    device = inputs.device
    images = len(inputs.segment_counts)
    host = torch.from_numpy(row_columns(inputs))
    rows = inputs.num_rows
    cells = inputs.grid_h * inputs.grid_w

    result = fake(inputs)
    if images == 0:
        return result
    maps = with_packed_lines(inputs.maps)
    table, columns = _send(image_table(maps, inputs.segment_counts), host, device)
    facts = torch.zeros(rows, FACTS.value, dtype=torch.int32, device=device)
    # The rows of one image are searched: enough halvings for the image with most rows.
    steps = max(inputs.segment_counts).bit_length()
    block = _block_of(inputs)
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
            BLOCK=block,
            num_warps=max(1, block // PIXELS_PER_WARP),
        )
        finish_rows[(triton.cdiv(rows, ROWS),)](table, columns, facts, *result[1:], rows, ROWS=ROWS)
    return result


def _block_of(inputs: LookupInputs) -> int:
    """Pixels that a program looks at together: the largest cell's, within bounds."""
    sizes = [each.shape[1:3] for each in inputs.maps]
    most = max((h // inputs.grid_h + 2) * (w // inputs.grid_w + 2) for h, w in sizes)
    return int(min(max(triton.next_power_of_2(most), 128), LARGEST_BLOCK))


def _send(table: Tensor, columns: Tensor, device: torch.device) -> tuple[Tensor, Tensor]:
    """Copy both host tables to the device in one asynchronous transfer."""
    on_gpu = device.type == "cuda"
    rows = columns.shape[1]
    packed = torch.empty(table.numel() + 2 * rows, dtype=torch.int64, pin_memory=on_gpu)
    packed[: table.numel()] = table.flatten()
    packed[table.numel() :].view(torch.int32).view(4, rows).copy_(columns)
    if on_gpu and torch.cuda.is_current_stream_capturing():
        _captured.append(packed)
    sent = packed.to(device, non_blocking=True)
    return sent[: table.numel()], sent[table.numel() :].view(torch.int32).view(4, rows)
