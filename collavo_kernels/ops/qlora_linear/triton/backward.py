"""Triton kernels of the backward: dx and the adapters' factors.

Every sum runs in one program in the order of its terms, so the same input gives the same bits.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators
from __future__ import annotations

import triton
import triton.language as tl

from collavo_kernels.ops.qlora_linear.triton.forward import tile_of
from collavo_kernels.ops.qlora_linear.triton.weight import codes_of, scales_of

# Bytes of a weight row that share a scale at least: 64 codes.
_CHUNK = tl.constexpr(32)


@triton.jit
def _byte_scales(
    absmax,
    nested_absmax,
    nested_code,
    offset,
    row,
    pair,
    live,
    half,
    BLOCK_SIZE: tl.constexpr,
    NESTED: tl.constexpr,
):
    """Load the scales of bytes; both codes of a byte share theirs."""
    flat = row[:, None] * (2 * half) + 2 * pair[None, :]
    inside = live[:, None] & (pair < half)[None, :]
    return scales_of(absmax, nested_absmax, nested_code, offset, flat // BLOCK_SIZE, inside, NESTED)


@triton.jit
def _expand_halves(
    sums_even,
    sums_odd,
    upstream,
    a,  # [R, K]
    token,
    pair,
    m,
    half,
    ranks,
    place,
    width,
    dtype: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """Add one adapter's ``h A``."""
    for start in range(0, ranks, BLOCK_R):
        rank = start + tl.arange(0, BLOCK_R)
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
    packed,  # [N, K / 2] bytes
    absmax,
    nested_absmax,
    nested_code,
    offset,
    code,  # [16] in x's dtype
    upstream,  # [M, R_0 + R_1]: gated and scaled g B
    a_0,  # [R_0, K]
    a_1,
    out,  # [M, K]
    m,
    n,
    units,
    ranks_0,
    ranks_1,
    BLOCK_SIZE: tl.constexpr,
    NESTED: tl.constexpr,
    ALIGNED: tl.constexpr,
    PERMUTE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_R: tl.constexpr,
    GROUP: tl.constexpr,
):
    """Compute one tile of the gradient of x, its even and its odd columns."""
    dtype: tl.constexpr = grad.dtype.element_ty
    half = units * (_CHUNK if ALIGNED else 1)
    tile_m, tile_p = tile_of(tl.program_id(0), tl.cdiv(m, BLOCK_M), tl.cdiv(half, BLOCK_P), GROUP)
    token = tile_m.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    pair = tile_p * BLOCK_P + tl.arange(0, BLOCK_P)
    # Aligned chunks of a row have one scale each; without them every byte has its own.
    UNIT: tl.constexpr = _CHUNK if ALIGNED else 1
    scaled = tile_p * BLOCK_P + tl.arange(0, BLOCK_P // UNIT) * UNIT
    scales = absmax, nested_absmax, nested_code, offset
    corner = grad + tile_m.to(tl.int64) * BLOCK_M * n
    inner = tl.arange(0, BLOCK_M)[:, None] * n
    sums_even = tl.zeros((BLOCK_M, BLOCK_P), dtype=tl.float32)
    sums_odd = tl.zeros((BLOCK_M, BLOCK_P), dtype=tl.float32)
    ahead = tl.arange(0, BLOCK_N).to(tl.int64)
    next_scale = _byte_scales(*scales, ahead, scaled, ahead < n, half, BLOCK_SIZE, NESTED)
    for start in range(0, n, BLOCK_N):
        row = start + tl.arange(0, BLOCK_N)
        scale = next_scale
        ahead = (row + BLOCK_N).to(tl.int64)
        # Scales are read one step ahead: the pipeline of tiles does not carry them.
        next_scale = _byte_scales(*scales, ahead, scaled, ahead < n, half, BLOCK_SIZE, NESTED)
        inside = (token < m)[:, None] & (row < n)[None, :]
        tile = tl.load(corner + inner + row[None, :], mask=inside, other=0.0)
        kept = (row < n)[:, None] & (pair < half)[None, :]
        at = row.to(tl.int64)[:, None] * half + pair[None, :]
        first, second = codes_of(tl.load(packed + at, mask=kept, other=0), code, PERMUTE)
        wide = tl.broadcast_to(scale[:, :, None], (BLOCK_N, BLOCK_P // UNIT, UNIT))
        wide = tl.reshape(wide, (BLOCK_N, BLOCK_P))
        even = (first.to(tl.float32) * wide).to(dtype)
        odd = (second.to(tl.float32) * wide).to(dtype)
        sums_even = tl.dot(tile, even, sums_even, input_precision="ieee")
        sums_odd = tl.dot(tile, odd, sums_odd, input_precision="ieee")
    width = ranks_0 + ranks_1
    sums_even, sums_odd = _expand_halves(
        sums_even, sums_odd, upstream, a_0, token, pair, m, half, ranks_0, 0, width, dtype,
        BLOCK_R,
    )  # fmt: skip
    sums_even, sums_odd = _expand_halves(
        sums_even, sums_odd, upstream, a_1, token, pair, m, half, ranks_1, ranks_0, width, dtype,
        BLOCK_R,
    )  # fmt: skip
    columns = tl.interleave(sums_even.to(dtype), sums_odd.to(dtype))
    inside = tl.arange(0, 2 * BLOCK_P) < 2 * (half - tile_p * BLOCK_P)
    corner = out + tile_m.to(tl.int64) * BLOCK_M * (2 * half) + tile_p * (2 * BLOCK_P)
    inner = tl.arange(0, BLOCK_M)[:, None] * (2 * half) + tl.arange(0, 2 * BLOCK_P)[None, :]
    tl.store(corner + inner, columns, mask=(token < m)[:, None] & inside[None, :])


@triton.jit(do_not_specialize=["m"])
def factor_kernel(
    hidden,  # [M, width]: gated and scaled
    value,  # [M, C]
    mask,  # [M] uint8
    out,  # [R, C] by its strides
    m,
    columns,
    ranks,
    place,
    width,
    rank_stride,
    column_stride,
    BIT: tl.constexpr,
    HAS_MASK: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Compute one tile of ``hidden^T value``, the gradient of one factor of one adapter."""
    column = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    rank = tl.program_id(1) * BLOCK_R + tl.arange(0, BLOCK_R)
    known = rank < ranks
    sums = tl.zeros((BLOCK_R, BLOCK_C), dtype=tl.float32)
    for start in range(0, m, BLOCK_M):
        token = start + tl.arange(0, BLOCK_M).to(tl.int64)
        live = token < m
        at = token[None, :] * width + (place + rank)[:, None]
        left = tl.load(hidden + at, mask=live[None, :] & known[:, None], other=0.0)
        if HAS_MASK:
            # What an idle token holds must not meet its zero: 0 * NaN is NaN.
            bits = tl.load(mask + token, mask=live, other=0).to(tl.int32)
            live = live & (((bits >> BIT) & 1) != 0)
        inside = live[:, None] & (column < columns)[None, :]
        right = tl.load(value + token[:, None] * columns + column[None, :], mask=inside, other=0.0)
        sums = tl.dot(left, right, sums, input_precision="ieee")
    at = rank[:, None].to(tl.int64) * rank_stride + column[None, :].to(tl.int64) * column_stride
    kept = known[:, None] & (column < columns)[None, :]
    tl.store(out + at, sums.to(out.dtype.element_ty), mask=kept)
