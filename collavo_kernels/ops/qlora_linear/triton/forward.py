"""Triton kernels of the forward: the product with the weight, and the sum of its shares.

The weight's bytes hold two neighbouring columns each. Taking them apart would cost a shuffle per
weight tile, so x is taken apart instead, once: its even columns meet the high halves of the bytes,
its odd columns the low ones, and a tile of bytes becomes two operands without leaving the registers
that the matrix unit reads.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators
from __future__ import annotations

import triton
import triton.language as tl

from collavo_kernels._flags import ROW_INDEX_OUT_OF_RANGE
from collavo_kernels.ops.qlora_linear.triton.hidden import hidden_tile
from collavo_kernels.ops.qlora_linear.triton.weight import codes_of, scales_of

_BAD_ROW = tl.constexpr(ROW_INDEX_OUT_OF_RANGE)
# Bytes of a weight row that share a scale at least: 64 codes.
_CHUNK = tl.constexpr(32)


@triton.jit
def _expand(
    sums,  # [BLOCK_N, BLOCK_M]
    hidden,
    b,  # [N, R]
    token,
    row,
    m,
    ranks,
    place,
    width,
    dtype: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """Add one adapter's ``B h``."""
    plane = tl.cast(m, tl.int64) * width
    for start in range(0, ranks, BLOCK_R):
        rank = start + tl.arange(0, BLOCK_R)
        known = rank < ranks
        left = tl.load(b + row[:, None] * ranks + rank[None, :], mask=known[None, :], other=0.0)
        right = hidden_tile(
            hidden,
            token[None, :] * width + (place + rank)[:, None],
            (token < m)[None, :] & known[:, None],
            plane,
            dtype,
            SPLITS,
        )
        sums = tl.dot(left.to(dtype), right, sums, input_precision="ieee")
    return sums


@triton.jit
def _finish(
    sums,  # [BLOCK_N, BLOCK_M]
    hidden,
    b_0,
    b_1,
    table,
    row_index,
    bias,
    errors,
    out,
    tile_m,
    tile_n,
    m,
    n,
    ranks_0,
    ranks_1,
    table_rows,
    HAS_TABLE: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HIDDEN_SPLITS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """Add adapters, table and bias to a tile's sums and store it."""
    dtype: tl.constexpr = out.dtype.element_ty
    token = tile_m.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    column = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    row = tl.minimum(column, n - 1).to(tl.int64)
    width = ranks_0 + ranks_1
    sums = _expand(
        sums, hidden, b_0, token, row, m, ranks_0, 0, width, dtype, HIDDEN_SPLITS, BLOCK_R
    )
    sums = _expand(
        sums, hidden, b_1, token, row, m, ranks_1, ranks_0, width, dtype, HIDDEN_SPLITS, BLOCK_R
    )
    tile = tl.trans(sums)
    if HAS_BIAS:
        tile += tl.load(bias + row).to(tl.float32)[None, :]
    if HAS_TABLE:
        index = tl.load(row_index + token, mask=token < m, other=-1)
        good = (index >= 0) & (index < table_rows)
        bad = (index < -1) | (index >= table_rows)
        if (tile_n == 0) & (tl.max(bad.to(tl.int32), 0) > 0):
            tl.atomic_or(errors, _BAD_ROW)
        chosen = table + tl.where(good, index, 0).to(tl.int64) * n
        at = chosen[:, None] + tl.minimum(column, n - 1)[None, :]
        tile += tl.load(at, mask=good[:, None], other=0.0).to(tl.float32)
    # Offsets inside a tile fit into 32 bits, which halves the registers that they take.
    corner = out + tile_m.to(tl.int64) * BLOCK_M * n + tile_n * BLOCK_N
    inner = tl.arange(0, BLOCK_M)[:, None] * n + tl.arange(0, BLOCK_N)[None, :]
    tl.store(corner + inner, tile.to(dtype), mask=(token < m)[:, None] & (column < n)[None, :])


@triton.jit
def _multiply(
    sums,  # [BLOCK_N, BLOCK_M]
    halves,
    odd_half,
    packed,
    absmax,
    nested_absmax,
    nested_code,
    offset,
    code,
    scale,
    row,
    flat,
    token,
    live,
    half,
    start,
    BLOCK_SIZE: tl.constexpr,
    NESTED: tl.constexpr,
    ALIGNED: tl.constexpr,
    PERMUTE: tl.constexpr,
    FEW: tl.constexpr,
):
    """Add the product of 64 columns."""
    dtype: tl.constexpr = halves.dtype.element_ty
    pair = start + tl.arange(0, _CHUNK)
    inside = pair < half
    # Bytes past the row are zeros, a code that meets zeros of x.
    bytes_ = tl.load(packed + row[:, None] * half + pair[None, :], mask=inside[None, :], other=0)
    at = token[None, :] * half + pair[:, None]
    used = live[None, :] & inside[:, None]
    even = tl.load(halves + at, mask=used, other=0.0)
    odd = tl.load(odd_half + at, mask=used, other=0.0)
    first, second = codes_of(bytes_, code, PERMUTE)
    # Where a chunk of a row lies in one block, its scale is a factor of the sum. With few tokens
    # scaling that is the least work, and a weight is rounded once.
    if ALIGNED and FEW:
        part = tl.dot(first, even, input_precision="ieee")
        part = tl.dot(second, odd, part, input_precision="ieee")
        sums += part * scale[:, None]
    elif ALIGNED:
        # Hopper's matrix unit adds to registers by itself: touching wide sums between two chunks
        # makes every product wait for the one before.
        first = (first.to(tl.float32) * scale[:, None]).to(dtype)
        second = (second.to(tl.float32) * scale[:, None]).to(dtype)
        sums = tl.dot(first, even, sums, input_precision="ieee")
        sums = tl.dot(second, odd, sums, input_precision="ieee")
    else:
        block = (flat[:, None] + 2 * pair[None, :]) // BLOCK_SIZE
        scales = scales_of(
            absmax, nested_absmax, nested_code, offset, block, inside[None, :], NESTED
        )
        sums = tl.dot((first.to(tl.float32) * scales).to(dtype), even, sums, input_precision="ieee")
        sums = tl.dot((second.to(tl.float32) * scales).to(dtype), odd, sums, input_precision="ieee")
    return sums


@triton.jit(do_not_specialize=["m", "steps"])
def linear_kernel(
    halves,  # [2, M, K / 2]
    packed,  # [N, K / 2] bytes
    absmax,
    nested_absmax,
    nested_code,
    offset,
    code,  # [16] in x's dtype
    hidden,  # [HIDDEN_SPLITS, M, R_0 + R_1]: gated and scaled A x
    b_0,  # [N, R_0]
    b_1,
    table,  # [T, N]
    row_index,  # [M]
    bias,  # [N]
    errors,  # [1] int32
    out,  # [M, N], or with SPLIT float32 [splits, M, N]
    m,
    n,
    units,
    ranks_0,
    ranks_1,
    table_rows,
    steps,
    BLOCK_SIZE: tl.constexpr,
    NESTED: tl.constexpr,
    ALIGNED: tl.constexpr,
    PERMUTE: tl.constexpr,
    SPLIT: tl.constexpr,
    HAS_TABLE: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HIDDEN_SPLITS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
    GROUP: tl.constexpr,
    CHUNKS: tl.constexpr,
):
    """Compute one tile of the output, or with SPLIT one share of its columns' sum."""
    tile_m, tile_n = tile_of(tl.program_id(0), tl.cdiv(m, BLOCK_M), tl.cdiv(n, BLOCK_N), GROUP)
    # So that the compiler knows how rows of whole chunks are aligned.
    half = units * (_CHUNK if ALIGNED else 1)
    token = tl.arange(0, BLOCK_M)
    live = token < m - tile_m * BLOCK_M
    row = tl.minimum(tl.arange(0, BLOCK_N), n - 1 - tile_n * BLOCK_N)
    even_half = halves + tile_m.to(tl.int64) * BLOCK_M * half
    odd_half = even_half + tl.cast(m, tl.int64) * half
    bytes_ = packed + tile_n.to(tl.int64) * BLOCK_N * half
    flat = (tile_n * BLOCK_N + row).to(tl.int64) * (2 * half)
    scales = absmax, nested_absmax, nested_code, offset
    first = tl.program_id(1) * steps * (CHUNKS * _CHUNK)
    last = tl.minimum(half, first + steps * (CHUNKS * _CHUNK))
    # Scales are read one step ahead: the pipeline of tiles does not carry them.
    next_0 = _chunk_scales(*scales, flat, first, half, BLOCK_SIZE, NESTED, ALIGNED)
    if CHUNKS == 2:
        next_1 = _chunk_scales(*scales, flat, first + _CHUNK, half, BLOCK_SIZE, NESTED, ALIGNED)
    sums = tl.zeros((BLOCK_N, BLOCK_M), dtype=tl.float32)
    for start in range(first, last, CHUNKS * _CHUNK):
        ahead = start + CHUNKS * _CHUNK
        scale_0 = next_0
        next_0 = _chunk_scales(*scales, flat, ahead, half, BLOCK_SIZE, NESTED, ALIGNED)
        sums = _multiply(
            sums, even_half, odd_half, bytes_, *scales, code, scale_0, row, flat, token, live, half,
            start, BLOCK_SIZE, NESTED, ALIGNED, PERMUTE, SPLIT,
        )  # fmt: skip
        if CHUNKS == 2:
            scale_1 = next_1
            ahead += _CHUNK
            next_1 = _chunk_scales(*scales, flat, ahead, half, BLOCK_SIZE, NESTED, ALIGNED)
            sums = _multiply(
                sums, even_half, odd_half, bytes_, *scales, code, scale_1, row, flat, token, live,
                half, start + _CHUNK, BLOCK_SIZE, NESTED, ALIGNED, PERMUTE, SPLIT,
            )  # fmt: skip
    if SPLIT:
        share = tl.program_id(1) * tl.cast(m, tl.int64) + tile_m * BLOCK_M
        column = tl.arange(0, BLOCK_N)
        inside = (column < n - tile_n * BLOCK_N)[:, None] & live[None, :]
        corner = out + share * n + tile_n * BLOCK_N
        tl.store(corner + token[None, :] * n + column[:, None], sums, mask=inside)
    else:
        _finish(
            sums, hidden, b_0, b_1, table, row_index, bias, errors, out, tile_m, tile_n, m, n,
            ranks_0, ranks_1, table_rows, HAS_TABLE, HAS_BIAS, HIDDEN_SPLITS, BLOCK_M, BLOCK_N,
            BLOCK_R,
        )  # fmt: skip


@triton.jit
def _chunk_scales(
    absmax,
    nested_absmax,
    nested_code,
    offset,
    flat,
    start,
    half,
    BLOCK_SIZE: tl.constexpr,
    NESTED: tl.constexpr,
    ALIGNED: tl.constexpr,
):
    """Load the scales of 64 columns of each row, 0 beyond the row's end; unused if not ALIGNED."""
    if ALIGNED:
        live = (flat >= 0) & (start < half)
        block = (flat + 2 * start) // BLOCK_SIZE
        scale = scales_of(absmax, nested_absmax, nested_code, offset, block, live, NESTED)
    else:
        scale = tl.zeros_like(flat).to(tl.float32)
    return scale


@triton.jit
def tile_of(program, tiles_m, tiles_n, GROUP: tl.constexpr):
    """Return a program's tile: GROUP token tiles side by side share their weights in the cache."""
    in_group = GROUP * tiles_n
    group = program // in_group
    height = tl.minimum(tiles_m - group * GROUP, GROUP)
    tile_m = group * GROUP + (program % in_group) % height
    tile_n = (program % in_group) // height
    return tile_m, tile_n


@triton.jit(do_not_specialize=["m"])
def sum_kernel(
    shares,  # float32 [SPLITS, M, N]
    hidden,
    b_0,
    b_1,
    table,
    row_index,
    bias,
    errors,
    out,  # [M, N]
    m,
    n,
    ranks_0,
    ranks_1,
    table_rows,
    SPLITS: tl.constexpr,
    HAS_TABLE: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HIDDEN_SPLITS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """Add the shares of a tile's sum in fixed order, then adapters, table and bias."""
    tile_m, tile_n = tl.program_id(0), tl.program_id(1)
    token = tile_m.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    column = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = (column < n)[:, None] & (token < m)[None, :]
    at = token[None, :] * n + column[:, None]
    sums = tl.zeros((BLOCK_N, BLOCK_M), dtype=tl.float32)
    for split in tl.static_range(SPLITS):
        sums += tl.load(shares + split * tl.cast(m, tl.int64) * n + at, mask=inside, other=0.0)
    _finish(
        sums, hidden, b_0, b_1, table, row_index, bias, errors, out, tile_m, tile_n, m, n, ranks_0,
        ranks_1, table_rows, HAS_TABLE, HAS_BIAS, HIDDEN_SPLITS, BLOCK_M, BLOCK_N, BLOCK_R,
    )  # fmt: skip
