"""Triton kernels that come before the weight: hidden values of the adapters, x taken apart."""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators
from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _shrink(
    x,
    factor,
    hidden,
    mask,
    m,
    k,
    ranks,
    rank_stride,
    column_stride,
    scaling,
    place,
    width,
    tile,
    split,
    steps,
    BIT: tl.constexpr,
    HAS_MASK: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Store one tile of one adapter's hidden values, of one share of the columns."""
    token = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    rank = tile * BLOCK_R + tl.arange(0, BLOCK_R).to(tl.int64)
    live = token < m
    known = rank < ranks
    first = split * steps * BLOCK_K
    sums = tl.zeros((BLOCK_M, BLOCK_R), dtype=tl.float32)
    for start in range(first, tl.minimum(k, first + steps * BLOCK_K), BLOCK_K):
        column = start + tl.arange(0, BLOCK_K).to(tl.int64)
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
    if HAS_MASK:
        bits = tl.load(mask + token, mask=live, other=0).to(tl.int32)
        sums = tl.where(((bits >> BIT) & 1)[:, None] != 0, sums, 0.0)
    at = (split * tl.cast(m, tl.int64) + token[:, None]) * width + (place + rank)[None, :]
    kept = live[:, None] & known[None, :]
    tl.store(hidden + at, sums.to(hidden.dtype.element_ty), mask=kept)


@triton.jit
def _take_apart(x, halves, m, k, chunk, BLOCK_M: tl.constexpr, BLOCK_P: tl.constexpr):
    """Store a tile of x as even and odd columns."""
    token = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    column = chunk * (2 * BLOCK_P) + tl.arange(0, 2 * BLOCK_P)
    live = (token < m)[:, None]
    tile = tl.load(
        x + token[:, None] * k + column[None, :], mask=live & (column < k)[None, :], other=0.0
    )
    even, odd = tl.split(tl.reshape(tile, (BLOCK_M, BLOCK_P, 2)))
    pair = chunk * BLOCK_P + tl.arange(0, BLOCK_P)
    at = token[:, None] * (k // 2) + pair[None, :]
    inside = live & (pair < k // 2)[None, :]
    tl.store(halves + at, even, mask=inside)
    tl.store(halves + tl.cast(m, tl.int64) * (k // 2) + at, odd, mask=inside)


@triton.jit(do_not_specialize=["m", "splits", "steps", "scaling_0", "scaling_1"])
def prepare_kernel(
    x,  # [M, K]
    halves,  # [2, M, K / 2]
    factor_0,  # [R_0, K] by its strides
    factor_1,
    hidden,  # [splits, M, R_0 + R_1]
    mask,  # [M] uint8
    m,
    k,
    ranks_0,
    ranks_1,
    rank_stride_0,
    rank_stride_1,
    column_stride_0,
    column_stride_1,
    scaling_0,
    scaling_1,
    splits,
    steps,
    HAS_MASK: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    """Compute ``m s A x`` of two adapters and take x apart, each program one of these."""
    work = tl.program_id(1)
    width = ranks_0 + ranks_1
    count_0 = tl.cdiv(ranks_0, BLOCK_R) * splits
    count_1 = tl.cdiv(ranks_1, BLOCK_R) * splits
    if work < count_0:
        _shrink(
            x,
            factor_0,
            hidden,
            mask,
            m,
            k,
            ranks_0,
            rank_stride_0,
            column_stride_0,
            scaling_0,
            0,
            width,
            work // splits,
            work % splits,
            steps,
            0,
            HAS_MASK,
            BLOCK_M,
            BLOCK_R,
            BLOCK_K,
        )
    elif work < count_0 + count_1:
        _shrink(
            x,
            factor_1,
            hidden,
            mask,
            m,
            k,
            ranks_1,
            rank_stride_1,
            column_stride_1,
            scaling_1,
            ranks_0,
            width,
            (work - count_0) // splits,
            (work - count_0) % splits,
            steps,
            1,
            HAS_MASK,
            BLOCK_M,
            BLOCK_R,
            BLOCK_K,
        )
    else:
        _take_apart(x, halves, m, k, work - count_0 - count_1, BLOCK_M, BLOCK_P)


@triton.jit
def hidden_tile(hidden, at, inside, plane, dtype: tl.constexpr, SPLITS: tl.constexpr):
    """Load hidden values, the sum of their shares in fixed order."""
    tile = tl.load(hidden + at, mask=inside, other=0.0)
    for split in tl.static_range(1, SPLITS):
        tile += tl.load(hidden + split * plane + at, mask=inside, other=0.0)
    return tile.to(dtype)
