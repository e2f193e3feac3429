"""Triton kernels of the forward: the product with the weight, and the sum of its shares.

The weight's bytes hold two neighbouring columns each. Taking them apart would cost a shuffle per
weight tile, so x is taken apart instead, once: its even columns meet the high halves of the bytes,
its odd columns the low ones, and a tile of bytes becomes two operands without leaving the registers
that the matrix unit reads.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators
from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from collavo_kernels._flags import ROW_INDEX_OUT_OF_RANGE
from collavo_kernels.ops.qlora_linear.triton import tiles
from collavo_kernels.ops.qlora_linear.triton.hidden import hidden_tile
from collavo_kernels.ops.qlora_linear.triton.weight import codes_of, scales_of

_BAD_ROW = tl.constexpr(ROW_INDEX_OUT_OF_RANGE)
CHUNK_BYTES = tl.constexpr(tiles.CHUNK_BYTES)


class Epilogue(NamedTuple):
    """What the kernels that store the output add to a product.

    Attributes:
        hidden: ``[HIDDEN_SPLITS, M, R_0 + R_1]``: gated and scaled A x.
        b: Of two adapters, ``[N, R]``.
        table: ``[T, N]``.
        row_index: ``[M]``.
        bias: ``[N]``.
        errors: ``[1]`` int32.
        rank_0, rank_1: Of b. No tuple: Triton 3.6 loses a 1 in a tuple inside of a tuple.
        table_rows: T.
    """

    hidden: Any
    b: Any
    table: Any
    row_index: Any
    bias: Any
    errors: Any
    rank_0: Any
    rank_1: Any
    table_rows: Any


@triton.jit
def _expand(
    sums,  # [BLOCK_N, BLOCK_M]
    hidden,
    b,  # [N, R]
    ranks,
    place,
    width,
    token,
    weight_row,
    m,
    dtype: tl.constexpr,
    CONST: tl.constexpr,
):
    """Add one adapter's ``B h``."""
    plane = tl.cast(m, tl.int64) * width
    for start in range(0, ranks, CONST.BLOCK_R):
        rank = start + tl.arange(0, CONST.BLOCK_R)
        known = rank < ranks
        left = tl.load(
            b + weight_row[:, None] * ranks + rank[None, :], mask=known[None, :], other=0.0
        )
        right = hidden_tile(
            hidden,
            token[None, :] * width + (place + rank)[:, None],
            (token < m)[None, :] & known[:, None],
            plane,
            dtype,
            CONST.HIDDEN_SPLITS,
        )
        sums = tl.dot(left.to(dtype), right, sums, input_precision="ieee")
    return sums


@triton.jit
def _finish(
    sums,  # [BLOCK_N, BLOCK_M]
    epilogue,
    out,
    tile_m,
    tile_n,
    m,
    n,
    CONST: tl.constexpr,
):
    """Add adapters, table and bias to a tile's sums and store it.

    CONST: HAS_TABLE, HAS_BIAS, HIDDEN_SPLITS; BLOCK_M, BLOCK_N, BLOCK_R.
    """
    dtype: tl.constexpr = out.dtype.element_ty
    token = tile_m.to(tl.int64) * CONST.BLOCK_M + tl.arange(0, CONST.BLOCK_M)
    column = tile_n * CONST.BLOCK_N + tl.arange(0, CONST.BLOCK_N)
    weight_row = tl.minimum(column, n - 1).to(tl.int64)
    hidden, b = epilogue.hidden, epilogue.b
    rank_0, rank_1 = epilogue.rank_0, epilogue.rank_1
    width = rank_0 + rank_1
    sums = _expand(sums, hidden, b[0], rank_0, 0, width, token, weight_row, m, dtype, CONST)
    sums = _expand(sums, hidden, b[1], rank_1, rank_0, width, token, weight_row, m, dtype, CONST)
    tile = tl.trans(sums)
    if CONST.HAS_BIAS:
        tile += tl.load(epilogue.bias + weight_row).to(tl.float32)[None, :]
    if CONST.HAS_TABLE:
        row = tl.load(epilogue.row_index + token, mask=token < m, other=-1)
        good = (row >= 0) & (row < epilogue.table_rows)
        bad = (row < -1) | (row >= epilogue.table_rows)
        if (tile_n == 0) & (tl.max(bad.to(tl.int32), 0) > 0):
            tl.atomic_or(epilogue.errors, _BAD_ROW)
        chosen = epilogue.table + tl.where(good, row, 0).to(tl.int64) * n
        at = chosen[:, None] + tl.minimum(column, n - 1)[None, :]
        tile += tl.load(at, mask=good[:, None], other=0.0).to(tl.float32)
    # Offsets inside a tile fit into 32 bits, which halves the registers that they take.
    corner = out + tile_m.to(tl.int64) * CONST.BLOCK_M * n + tile_n * CONST.BLOCK_N
    inner = tl.arange(0, CONST.BLOCK_M)[:, None] * n + tl.arange(0, CONST.BLOCK_N)[None, :]
    tl.store(corner + inner, tile.to(dtype), mask=(token < m)[:, None] & (column < n)[None, :])


@triton.jit
def _multiply(
    sums,  # [BLOCK_N, BLOCK_M]
    halves,  # addresses of the tile's even and odd columns
    packed,  # of the tile's weight rows
    weight,
    scale,
    weight_row,  # counted from the tile's first
    flat,
    token,
    live,
    half,
    start,
    CONST: tl.constexpr,
):
    """Add the product of 64 columns."""
    even_half, odd_half = halves
    dtype: tl.constexpr = even_half.dtype.element_ty
    pair = start + tl.arange(0, CHUNK_BYTES)
    inside = pair < half
    # Bytes past the row are zeros, a code that meets zeros of x.
    bytes_ = tl.load(
        packed + weight_row[:, None] * half + pair[None, :], mask=inside[None, :], other=0
    )
    at = token[None, :] * half + pair[:, None]
    used = live[None, :] & inside[:, None]
    even = tl.load(even_half + at, mask=used, other=0.0)
    odd = tl.load(odd_half + at, mask=used, other=0.0)
    first, second = codes_of(bytes_, weight, CONST)
    # Where a chunk of a row lies in one block, its scale is a factor of the sum. With few tokens
    # (SPLIT) scaling that is the least work, and a weight is rounded once.
    if CONST.ALIGNED and CONST.SPLIT:
        part = tl.dot(first, even, input_precision="ieee")
        part = tl.dot(second, odd, part, input_precision="ieee")
        sums += part * scale[:, None]
    elif CONST.ALIGNED:
        # Hopper's matrix unit adds to registers by itself: touching wide sums between two chunks
        # makes every product wait for the one before.
        first = (first.to(tl.float32) * scale[:, None]).to(dtype)
        second = (second.to(tl.float32) * scale[:, None]).to(dtype)
        sums = tl.dot(first, even, sums, input_precision="ieee")
        sums = tl.dot(second, odd, sums, input_precision="ieee")
    else:
        scales = scales_of(weight, flat[:, None] + 2 * pair[None, :], inside[None, :], CONST)
        sums = tl.dot((first.to(tl.float32) * scales).to(dtype), even, sums, input_precision="ieee")
        sums = tl.dot((second.to(tl.float32) * scales).to(dtype), odd, sums, input_precision="ieee")
    return sums


@triton.jit(do_not_specialize=["m", "steps"])
def linear_kernel(
    halves,  # [2, M, K / 2]
    weight,  # Weight
    epilogue,  # Epilogue
    out,  # [M, N], or with SPLIT float32 [splits, M, N]
    m,
    n,
    units,
    steps,
    CONST: tl.constexpr,
):
    """Compute one tile of the output, or with SPLIT one share of its columns' sum.

    CONST: BLOCK_SIZE, NESTED, ALIGNED and PERMUTE, of the weight; SPLIT; what ``_finish`` reads;
    BLOCK_M, BLOCK_N, GROUP, CHUNKS.
    """
    tile_m, tile_n = tile_of(m, n, CONST.BLOCK_N, CONST)
    # So that the compiler knows how rows of whole chunks are aligned.
    half = units * (CHUNK_BYTES if CONST.ALIGNED else 1)
    token = tl.arange(0, CONST.BLOCK_M)
    live = token < m - tile_m * CONST.BLOCK_M
    weight_row = tl.minimum(tl.arange(0, CONST.BLOCK_N), n - 1 - tile_n * CONST.BLOCK_N)
    even_half = halves + tile_m.to(tl.int64) * CONST.BLOCK_M * half
    pair = even_half, even_half + tl.cast(m, tl.int64) * half
    packed = weight.packed + tile_n.to(tl.int64) * CONST.BLOCK_N * half
    flat = (tile_n * CONST.BLOCK_N + weight_row).to(tl.int64) * (2 * half)
    first = tl.program_id(1) * steps * (CONST.CHUNKS * CHUNK_BYTES)
    last = tl.minimum(half, first + steps * (CONST.CHUNKS * CHUNK_BYTES))
    # Scales are read one step ahead: the pipeline of tiles does not carry them.
    next_0 = _chunk_scales(weight, flat, first, half, CONST)
    if CONST.CHUNKS == 2:
        next_1 = _chunk_scales(weight, flat, first + CHUNK_BYTES, half, CONST)
    sums = tl.zeros((CONST.BLOCK_N, CONST.BLOCK_M), dtype=tl.float32)
    for start in range(first, last, CONST.CHUNKS * CHUNK_BYTES):
        ahead = start + CONST.CHUNKS * CHUNK_BYTES
        scale_0 = next_0
        next_0 = _chunk_scales(weight, flat, ahead, half, CONST)
        sums = _multiply(
            sums, pair, packed, weight, scale_0, weight_row, flat, token, live, half, start, CONST
        )
        if CONST.CHUNKS == 2:
            scale_1 = next_1
            next_1 = _chunk_scales(weight, flat, ahead + CHUNK_BYTES, half, CONST)
            sums = _multiply(
                sums, pair, packed, weight, scale_1, weight_row, flat, token, live, half,
                start + CHUNK_BYTES, CONST,
            )  # fmt: skip
    if CONST.SPLIT:
        share = tl.program_id(1) * tl.cast(m, tl.int64) + tile_m * CONST.BLOCK_M
        column = tl.arange(0, CONST.BLOCK_N)
        inside = (column < n - tile_n * CONST.BLOCK_N)[:, None] & live[None, :]
        corner = out + share * n + tile_n * CONST.BLOCK_N
        tl.store(corner + token[None, :] * n + column[:, None], sums, mask=inside)
    else:
        _finish(sums, epilogue, out, tile_m, tile_n, m, n, CONST)


@triton.jit
def _chunk_scales(weight, flat, start, half, CONST: tl.constexpr):
    """Load the scales of 64 columns of each row, 0 beyond the row's end; unused if not ALIGNED."""
    if CONST.ALIGNED:
        live = (flat >= 0) & (start < half)
        scale = scales_of(weight, flat + 2 * start, live, CONST)
    else:
        scale = tl.zeros_like(flat).to(tl.float32)
    return scale


@triton.jit
def tile_of(m, n, BLOCK: tl.constexpr, CONST: tl.constexpr):
    """Return a program's tile of ``[M, N]``, BLOCK_M by BLOCK.

    GROUP token tiles side by side share their weights in the cache. CONST: BLOCK_M, GROUP.
    """
    program, tiles_m, tiles_n = tl.program_id(0), tl.cdiv(m, CONST.BLOCK_M), tl.cdiv(n, BLOCK)
    in_group = CONST.GROUP * tiles_n
    group = program // in_group
    height = tl.minimum(tiles_m - group * CONST.GROUP, CONST.GROUP)
    tile_m = group * CONST.GROUP + (program % in_group) % height
    tile_n = (program % in_group) // height
    return tile_m, tile_n


@triton.jit(do_not_specialize=["m"])
def sum_kernel(
    shares,  # float32 [SPLITS, M, N]
    epilogue,  # Epilogue
    out,  # [M, N]
    m,
    n,
    CONST: tl.constexpr,
):
    """Add the shares of a tile's sum in fixed order, then adapters, table and bias.

    CONST: SPLITS; what ``_finish`` reads.
    """
    tile_m, tile_n = tl.program_id(0), tl.program_id(1)
    token = tile_m.to(tl.int64) * CONST.BLOCK_M + tl.arange(0, CONST.BLOCK_M)
    column = tile_n * CONST.BLOCK_N + tl.arange(0, CONST.BLOCK_N)
    inside = (column < n)[:, None] & (token < m)[None, :]
    at = token[None, :] * n + column[:, None]
    sums = tl.zeros((CONST.BLOCK_N, CONST.BLOCK_M), dtype=tl.float32)
    for split in tl.static_range(CONST.SPLITS):
        sums += tl.load(shares + split * tl.cast(m, tl.int64) * n + at, mask=inside, other=0.0)
    _finish(sums, epilogue, out, tile_m, tile_n, m, n, CONST)
