"""The order of an NF4 weight's bytes that CPU kernels stream: panels of 16 rows, scales inside.

A tile of 16 rows and 64 columns is 16 float32 scales and then the rows' codes, transposed four
bytes at a time, so that a 64-byte vector holds one dword of each row (csrc/qlora_linear/panels.h).
The codes are the same ones: ``to_rows`` gives bitsandbytes' bytes back. Rows that fill up the last
panel have scale 0.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from collavo_kernels._native import native

ROWS = 16
COLUMNS = 64
TILE_BYTES = ROWS * 4 + ROWS * COLUMNS // 2
_LINES = 8
_DWORD = 4
_ZERO_CODES = 0x77
_HUGE_PAGE = 1 << 21


def panels_shape(shape: tuple[int, int]) -> tuple[int, int, int]:
    """Return the shape of a matrix's bytes in panels: panels, tiles per panel, bytes per tile."""
    return -(-shape[0] // ROWS), shape[1] // COLUMNS, TILE_BYTES


def cannot_pack(shape: tuple[int, int], block_size: int) -> str | None:
    """Say why a matrix cannot lie in panels, or None."""
    if shape[1] % COLUMNS or block_size < COLUMNS:
        return f"K = {shape[1]} in blocks of {block_size}: a tile's row needs one scale"
    if 0 in shape:
        return f"the matrix {list(shape)} is empty"
    return None


def to_panels(packed: Tensor, scales: Tensor, shape: tuple[int, int], block_size: int) -> Tensor:
    """Bring codes and scales into panels.

    Args:
        packed: uint8, ``N * K / 2`` bytes in bitsandbytes' order, on the CPU.
        scales: float32 ``[blocks]``, a scale per block of the flattened matrix.
        shape: ``(N, K)``; K is a multiple of 64.
        block_size: Elements per scale, a multiple of 64.

    Returns:
        uint8 ``[ceil(N / 16), K / 64, 576]``, on huge pages where the system gives them.
    """
    panels, tiles, _ = panels_shape(shape)
    missing = panels * ROWS - shape[0]
    out = _huge(panels * tiles * TILE_BYTES).view(panels, tiles, TILE_BYTES)
    by_tile = scales.repeat_interleave(block_size // COLUMNS)[: shape[0] * tiles]
    by_row = F.pad(by_tile.view(shape[0], tiles), (0, 0, 0, missing))
    head = out[:, :, : ROWS * 4].view(torch.float32)
    head.copy_(by_row.view(panels, ROWS, tiles).transpose(1, 2))
    codes = packed.reshape(shape[0], tiles, _LINES, _DWORD)
    if missing:
        codes = F.pad(codes, (0, 0, 0, 0, 0, 0, 0, missing), value=_ZERO_CODES)
    codes = codes.view(torch.int32).view(panels, ROWS, tiles, _LINES)
    tail = out[:, :, ROWS * 4 :].view(torch.int32)
    tail.view(panels, tiles, _LINES, ROWS).copy_(codes.permute(0, 2, 3, 1))
    return out


def to_rows(panels: Tensor, rows: int) -> Tensor:
    """Return the codes of the first ``rows`` rows in bitsandbytes' order, uint8 ``[bytes, 1]``."""
    count, tiles, _ = panels.shape
    # A copy, since bytes of any alignment are no dwords.
    bytes_ = panels[:, :, ROWS * 4 :].clone(memory_format=torch.contiguous_format)
    lines = bytes_.view(torch.int32).view(count, tiles, _LINES, ROWS)
    codes = lines.permute(0, 3, 1, 2).reshape(count * ROWS, tiles * _LINES)[:rows]
    return codes.contiguous().view(torch.uint8).view(-1, 1)


def _huge(size: int) -> Tensor:
    """Return uint8 ``[size]``, uninitialised, from the start of a huge page if it fills one."""
    if size < _HUGE_PAGE:
        return torch.empty(size, dtype=torch.uint8, device="cpu")
    whole = -(-size // _HUGE_PAGE) * _HUGE_PAGE
    room = torch.empty(whole + _HUGE_PAGE, dtype=torch.uint8, device="cpu")
    start = -room.data_ptr() % _HUGE_PAGE
    module = native()
    if module is not None:
        module.advise_huge_pages(memory=room[start:], bytes=whole)
    return room[start : start + size]
