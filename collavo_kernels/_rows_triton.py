"""Values summed by the rows that tokens refer to, as ``_rows.sum_rows``, in Triton kernels.

A program sums a tile of a table over a stretch of the tokens in their order; where there are
several stretches a second launch adds them, first to last: the same input gives the same bits.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from collavo_kernels._flags import ROW_INDEX_OUT_OF_RANGE, error_word
from collavo_kernels._gpu import processors

_BAD_ROW = tl.constexpr(ROW_INDEX_OUT_OF_RANGE)
TILE = {"BLOCK_M": 32, "BLOCK_N": 32, "BLOCK_T": 64}
ADD_BLOCK = 512
# A step waits for the rows of its tokens before it can ask for their values, so what a program
# takes is its steps; a multiprocessor holds six programs at once.
_LEAST_STEPS, _RESIDENT = 4, 6


def options_of(dtype: torch.dtype) -> dict[str, int]:
    """Return the launch's options; products of float32 take the registers of eight warps."""
    return {"num_warps": 8 if dtype == torch.float32 else 4, "num_stages": 3}


@triton.jit
def _rows_of(row_index, token, end, first):
    """Load tokens' rows, counted from a tile's first."""
    return tl.load(row_index + token, mask=token < end, other=-1) - first


@triton.jit(do_not_specialize=["m", "rows", "stretch"])
def sum_rows_kernel(
    grad,  # [M, N]
    row_index,  # [M]
    errors,  # [1] int32
    out,  # [stretches, T, N]
    m,
    n,
    rows,
    stretch,  # tokens of a program, a multiple of BLOCK_M
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    """Sum the gradient over the tokens of each row of a tile, as a product with 0 and 1.

    Its terms are exact, and infinity and NaN are left out: 0 times them would reach other rows.
    They are rare, so a second pass counts them only where the first one saw any.
    """
    dtype: tl.constexpr = grad.dtype.element_ty
    infinity = float("inf")
    column = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = (column < n)[None, :]
    first = tl.program_id(1) * BLOCK_T
    row = tl.arange(0, BLOCK_T)
    begin = tl.program_id(2) * stretch
    end = tl.minimum(m, begin + stretch)
    sums = tl.zeros((BLOCK_T, BLOCK_N), dtype=tl.float32)
    strange = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.int32)
    bad = tl.zeros((BLOCK_M,), dtype=tl.int32)
    for start in range(begin, end, BLOCK_M):
        token = start + tl.arange(0, BLOCK_M).to(tl.int64)
        place = _rows_of(row_index, token, end, first)
        bad |= ((place + first < -1) | (place + first >= rows)).to(tl.int32)
        used = ((place >= 0) & (place < BLOCK_T))[:, None] & inside
        value = tl.load(grad + token[:, None] * n + column[None, :], mask=used, other=0.0)
        finite = tl.abs(value.to(tl.float32)) < infinity
        strange |= tl.where(finite, 0, 1)
        chosen = (row[:, None] == place[None, :]).to(dtype)
        kept = tl.where(finite, value, tl.zeros_like(value))
        sums = tl.dot(chosen, kept, sums, input_precision="ieee")
    if tl.max(tl.max(strange, 1), 0) > 0:
        above = tl.zeros((BLOCK_T, BLOCK_N), dtype=tl.float32)
        below = tl.zeros((BLOCK_T, BLOCK_N), dtype=tl.float32)
        for start in range(begin, end, BLOCK_M):
            token = start + tl.arange(0, BLOCK_M).to(tl.int64)
            place = _rows_of(row_index, token, end, first)
            used = ((place >= 0) & (place < BLOCK_T))[:, None] & inside
            value = tl.load(grad + token[:, None] * n + column[None, :], mask=used, other=0.0)
            value = value.to(tl.float32)
            chosen = (row[:, None] == place[None, :]).to(dtype)
            unordered = value != value
            high = ((value == infinity) | unordered).to(dtype)
            low = ((value == -infinity) | unordered).to(dtype)
            above = tl.dot(chosen, high, above, input_precision="ieee")
            below = tl.dot(chosen, low, below, input_precision="ieee")
        # A row that has both, or a NaN, is NaN.
        sums += tl.where(above > 0, infinity, 0.0)
        sums += tl.where(below > 0, -infinity, 0.0)
    if (tl.program_id(0) + first == 0) & (tl.max(bad, 0) > 0):
        tl.atomic_or(errors, _BAD_ROW)
    at = (tl.program_id(2) * rows + first + row)[:, None].to(tl.int64) * n + column[None, :]
    tl.store(out + at, sums.to(out.dtype.element_ty), mask=(first + row < rows)[:, None] & inside)


@triton.jit(do_not_specialize=["count", "stretches"])
def add_stretches_kernel(
    parts,  # float32 [stretches, count]
    out,  # [count]
    count,
    stretches,
    BLOCK: tl.constexpr,
):
    """Add what the stretches gave, in their order."""
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = place < count
    sums = tl.zeros((BLOCK,), dtype=tl.float32)
    for _ in range(stretches):
        sums += tl.load(parts + place, mask=inside, other=0.0)
        parts += count
    tl.store(out + place, sums.to(out.dtype.element_ty), mask=inside)


def sum_rows(x: Tensor, index: Tensor, out: Tensor) -> None:
    """Write the sum of x over the tokens of each row; an index outside the table is reported.

    Args:
        x: ``[M, N]``, contiguous.
        index: ``[M]`` int32, contiguous, -1 = the token has no row.
        out: ``[T, N]``, contiguous; rows that no token has get zeros.
    """
    (m, n), rows = x.shape, out.shape[0]
    # A table without rows has bad ones to report all the same.
    tiles = triton.cdiv(n, TILE["BLOCK_N"]), max(1, triton.cdiv(rows, TILE["BLOCK_T"]))
    steps = triton.cdiv(m, TILE["BLOCK_M"])
    wanted = _RESIDENT * processors(x.device) // (tiles[0] * tiles[1])
    each = triton.cdiv(steps, max(1, min(wanted, steps // _LEAST_STEPS)))
    stretches = max(1, triton.cdiv(steps, each))
    parts = out if stretches == 1 else x.new_empty((stretches, rows, n), dtype=torch.float32)
    sum_rows_kernel[(*tiles, stretches)](
        x,
        index,
        error_word(x.device),
        parts,
        m,
        n,
        rows,
        max(1, each) * TILE["BLOCK_M"],
        **TILE,
        **options_of(x.dtype),
    )
    if stretches > 1 and out.numel():
        add_stretches_kernel[(triton.cdiv(out.numel(), ADD_BLOCK),)](
            parts, out, out.numel(), stretches, BLOCK=ADD_BLOCK
        )
