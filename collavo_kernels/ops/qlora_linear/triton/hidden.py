"""Triton kernels that come before the weight: hidden values of the adapters, x taken apart."""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators
from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _shrink(
    x,
    factor,
    strides,
    hidden,
    mask,
    m,
    k,
    ranks,
    scaling,
    place,
    width,
    work,
    splits,
    steps,
    BIT: tl.constexpr,
    CONST: tl.constexpr,
):
    """Store one tile of one adapter's hidden values, of one share of the columns."""
    tile, split = work // splits, work % splits
    rank_stride, column_stride = strides
    token = tl.program_id(0).to(tl.int64) * CONST.BLOCK_M + tl.arange(0, CONST.BLOCK_M)
    rank = tile * CONST.BLOCK_R + tl.arange(0, CONST.BLOCK_R).to(tl.int64)
    live = token < m
    known = rank < ranks
    first = split * steps * CONST.BLOCK_K
    last = tl.minimum(k, first + steps * CONST.BLOCK_K)
    sums = tl.zeros((CONST.BLOCK_M, CONST.BLOCK_R), dtype=tl.float32)
    for start in range(first, last, CONST.BLOCK_K):
        column = start + tl.arange(0, CONST.BLOCK_K).to(tl.int64)
        inside = column < k
        left = tl.load(
            x + token[:, None] * k + column[None, :],
            mask=live[:, None] & inside[None, :],
            other=0.0,
        )
        right = tl.load(
            factor + rank[None, :] * rank_stride + column[:, None] * column_stride,
            mask=known[None, :] & inside[:, None],
            other=0.0,
        )
        sums = tl.dot(left, right.to(left.dtype), sums, input_precision="ieee")
    sums *= scaling
    if CONST.HAS_MASK:
        bits = tl.load(mask + token, mask=live, other=0).to(tl.int32)
        sums = tl.where(((bits >> BIT) & 1)[:, None] != 0, sums, 0.0)
    at = (split * tl.cast(m, tl.int64) + token[:, None]) * width + (place + rank)[None, :]
    kept = live[:, None] & known[None, :]
    tl.store(hidden + at, sums.to(hidden.dtype.element_ty), mask=kept)


@triton.jit
def _take_apart(x, halves, m, k, stretch, CONST: tl.constexpr):
    """Store a tile of x as even and odd columns."""
    token = tl.program_id(0).to(tl.int64) * CONST.BLOCK_M + tl.arange(0, CONST.BLOCK_M)
    column = stretch * (2 * CONST.BLOCK_P) + tl.arange(0, 2 * CONST.BLOCK_P)
    live = (token < m)[:, None]
    tile = tl.load(
        x + token[:, None] * k + column[None, :], mask=live & (column < k)[None, :], other=0.0
    )
    even, odd = tl.split(tl.reshape(tile, (CONST.BLOCK_M, CONST.BLOCK_P, 2)))
    pair = stretch * CONST.BLOCK_P + tl.arange(0, CONST.BLOCK_P)
    at = token[:, None] * (k // 2) + pair[None, :]
    inside = live & (pair < k // 2)[None, :]
    tl.store(halves + at, even, mask=inside)
    tl.store(halves + tl.cast(m, tl.int64) * (k // 2) + at, odd, mask=inside)


@triton.jit(do_not_specialize=["m", "splits", "steps"])
def prepare_kernel(
    x,  # [M, K]
    halves,  # [2, M, K / 2]
    factors,  # of two adapters, [R, K] by their strides
    strides,  # of each factor: to the next rank, to the next column
    ranks,
    scaling,  # floats, which are never specialised
    hidden,  # [splits, M, R_0 + R_1]
    mask,  # [M] uint8
    m,
    k,
    splits,
    steps,
    CONST: tl.constexpr,
):
    """Compute ``m s A x`` of two adapters and take x apart, each program one of these.

    CONST: HAS_MASK; BLOCK_M, BLOCK_R, BLOCK_K, BLOCK_P.
    """
    work = tl.program_id(1)
    width = ranks[0] + ranks[1]
    count_0 = tl.cdiv(ranks[0], CONST.BLOCK_R) * splits
    count_1 = tl.cdiv(ranks[1], CONST.BLOCK_R) * splits
    if work < count_0:
        _shrink(
            x, factors[0], strides[0], hidden, mask, m, k, ranks[0], scaling[0], 0, width, work,
            splits, steps, 0, CONST,
        )  # fmt: skip
    elif work < count_0 + count_1:
        _shrink(
            x, factors[1], strides[1], hidden, mask, m, k, ranks[1], scaling[1], ranks[0], width,
            work - count_0, splits, steps, 1, CONST,
        )  # fmt: skip
    else:
        _take_apart(x, halves, m, k, work - count_0 - count_1, CONST)


@triton.jit
def hidden_tile(hidden, at, inside, plane, dtype: tl.constexpr, SPLITS: tl.constexpr):
    """Load hidden values, the sum of their shares in fixed order."""
    tile = tl.load(hidden + at, mask=inside, other=0.0)
    for split in tl.static_range(1, SPLITS):
        tile += tl.load(hidden + split * plane + at, mask=inside, other=0.0)
    return tile.to(dtype)
