"""Triton kernels of the backward: dx and the adapters' factors.

Every sum runs in one program in the order of its terms, so the same input gives the same bits.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators
from __future__ import annotations

import triton
import triton.language as tl

from collavo_kernels.ops.qlora_linear.triton.forward import CHUNK_BYTES, tile_of
from collavo_kernels.ops.qlora_linear.triton.weight import codes_of, scales_of


@triton.jit
def _byte_scales(weight, weight_row, pair, live, half, CONST: tl.constexpr):
    """Load the scales of bytes; both codes of a byte share theirs."""
    flat = weight_row[:, None] * (2 * half) + 2 * pair[None, :]
    return scales_of(weight, flat, live[:, None] & (pair < half)[None, :], CONST)


@triton.jit
def _expand_halves(
    sums_even,
    sums_odd,
    upstream,
    a,  # [R, K]
    ranks,
    place,
    width,
    token,
    pair,
    m,
    half,
    dtype: tl.constexpr,
    CONST: tl.constexpr,
):
    """Add one adapter's ``h A``."""
    for start in range(0, ranks, CONST.BLOCK_R):
        rank = start + tl.arange(0, CONST.BLOCK_R)
        known = rank < ranks
        left = tl.load(
            upstream + token[:, None] * width + (place + rank)[None, :],
            mask=(token < m)[:, None] & known[None, :],
            other=0.0,
        )
        at = rank[:, None].to(tl.int64) * (2 * half) + 2 * pair[None, :]
        inside = known[:, None] & (pair < half)[None, :]
        even = tl.load(a + at, mask=inside, other=0.0).to(dtype)
        odd = tl.load(a + at + 1, mask=inside, other=0.0).to(dtype)
        sums_even = tl.dot(left, even, sums_even, input_precision="ieee")
        sums_odd = tl.dot(left, odd, sums_odd, input_precision="ieee")
    return sums_even, sums_odd


@triton.jit(do_not_specialize=["m"])
def grad_x_kernel(
    grad,  # [M, N]
    weight,  # Weight
    upstream,  # [M, R_0 + R_1]: gated and scaled g B
    a,  # of two adapters, [R, K]
    ranks,  # theirs
    out,  # [M, K]
    m,
    n,
    units,
    CONST: tl.constexpr,
):
    """Compute one tile of the gradient of x, its even and its odd columns.

    CONST: BLOCK_SIZE, NESTED, ALIGNED and PERMUTE, of the weight; BLOCK_M, BLOCK_N, BLOCK_P,
    BLOCK_R, GROUP.
    """
    dtype: tl.constexpr = grad.dtype.element_ty
    half = units * (CHUNK_BYTES if CONST.ALIGNED else 1)
    tile_m, tile_p = tile_of(m, half, CONST.BLOCK_P, CONST)
    token = tile_m.to(tl.int64) * CONST.BLOCK_M + tl.arange(0, CONST.BLOCK_M)
    pair = tile_p * CONST.BLOCK_P + tl.arange(0, CONST.BLOCK_P)
    # Aligned chunks of a row have one scale each; without them every byte has its own.
    UNIT: tl.constexpr = CHUNK_BYTES if CONST.ALIGNED else 1
    scaled = tile_p * CONST.BLOCK_P + tl.arange(0, CONST.BLOCK_P // UNIT) * UNIT
    corner = grad + tile_m.to(tl.int64) * CONST.BLOCK_M * n
    inner = tl.arange(0, CONST.BLOCK_M)[:, None] * n
    sums_even = tl.zeros((CONST.BLOCK_M, CONST.BLOCK_P), dtype=tl.float32)
    sums_odd = tl.zeros((CONST.BLOCK_M, CONST.BLOCK_P), dtype=tl.float32)
    ahead = tl.arange(0, CONST.BLOCK_N).to(tl.int64)
    next_scale = _byte_scales(weight, ahead, scaled, ahead < n, half, CONST)
    for start in range(0, n, CONST.BLOCK_N):
        weight_row = start + tl.arange(0, CONST.BLOCK_N)
        scale = next_scale
        ahead = (weight_row + CONST.BLOCK_N).to(tl.int64)
        # Scales are read one step ahead: the pipeline of tiles does not carry them.
        next_scale = _byte_scales(weight, ahead, scaled, ahead < n, half, CONST)
        inside = (token < m)[:, None] & (weight_row < n)[None, :]
        tile = tl.load(corner + inner + weight_row[None, :], mask=inside, other=0.0)
        kept = (weight_row < n)[:, None] & (pair < half)[None, :]
        at = weight_row.to(tl.int64)[:, None] * half + pair[None, :]
        bytes_ = tl.load(weight.packed + at, mask=kept, other=0)
        first, second = codes_of(bytes_, weight, CONST)
        wide = tl.broadcast_to(scale[:, :, None], (CONST.BLOCK_N, CONST.BLOCK_P // UNIT, UNIT))
        wide = tl.reshape(wide, (CONST.BLOCK_N, CONST.BLOCK_P))
        even = (first.to(tl.float32) * wide).to(dtype)
        odd = (second.to(tl.float32) * wide).to(dtype)
        sums_even = tl.dot(tile, even, sums_even, input_precision="ieee")
        sums_odd = tl.dot(tile, odd, sums_odd, input_precision="ieee")
    width = ranks[0] + ranks[1]
    sums_even, sums_odd = _expand_halves(
        sums_even, sums_odd, upstream, a[0], ranks[0], 0, width, token, pair, m, half, dtype, CONST
    )
    sums_even, sums_odd = _expand_halves(
        sums_even, sums_odd, upstream, a[1], ranks[1], ranks[0], width, token, pair, m, half, dtype,
        CONST,
    )  # fmt: skip
    columns = tl.interleave(sums_even.to(dtype), sums_odd.to(dtype))
    inside = tl.arange(0, 2 * CONST.BLOCK_P) < 2 * (half - tile_p * CONST.BLOCK_P)
    corner = out + tile_m.to(tl.int64) * CONST.BLOCK_M * (2 * half) + tile_p * (2 * CONST.BLOCK_P)
    inner = tl.arange(0, CONST.BLOCK_M)[:, None] * (2 * half)
    inner += tl.arange(0, 2 * CONST.BLOCK_P)[None, :]
    tl.store(corner + inner, columns, mask=(token < m)[:, None] & inside[None, :])


@triton.jit(do_not_specialize=["m"])
def factor_kernel(
    hidden,  # [M, width]: gated and scaled
    value,  # [M, C]
    mask,  # [M] uint8
    out,  # [R, C] by its strides
    strides,
    m,
    columns,
    ranks,
    place,
    width,
    CONST: tl.constexpr,
):
    """Compute one tile of ``hidden^T value``, the gradient of one factor of one adapter.

    CONST: BIT and HAS_MASK, of the adapter; BLOCK_M, BLOCK_R, BLOCK_C.
    """
    column = tl.program_id(0) * CONST.BLOCK_C + tl.arange(0, CONST.BLOCK_C)
    rank = tl.program_id(1) * CONST.BLOCK_R + tl.arange(0, CONST.BLOCK_R)
    known = rank < ranks
    sums = tl.zeros((CONST.BLOCK_R, CONST.BLOCK_C), dtype=tl.float32)
    for start in range(0, m, CONST.BLOCK_M):
        token = start + tl.arange(0, CONST.BLOCK_M).to(tl.int64)
        live = token < m
        at = token[None, :] * width + (place + rank)[:, None]
        left = tl.load(hidden + at, mask=live[None, :] & known[:, None], other=0.0)
        if CONST.HAS_MASK:
            # What an idle token holds must not meet its zero: 0 * NaN is NaN.
            bits = tl.load(mask + token, mask=live, other=0).to(tl.int32)
            live = live & (((bits >> CONST.BIT) & 1) != 0)
        inside = live[:, None] & (column < columns)[None, :]
        right = tl.load(value + token[:, None] * columns + column[None, :], mask=inside, other=0.0)
        sums = tl.dot(left, right, sums, input_precision="ieee")
    rank_stride, column_stride = strides
    at = rank[:, None].to(tl.int64) * rank_stride + column[None, :].to(tl.int64) * column_stride
    kept = known[:, None] & (column < columns)[None, :]
    tl.store(out + at, sums.to(out.dtype.element_ty), mask=kept)
