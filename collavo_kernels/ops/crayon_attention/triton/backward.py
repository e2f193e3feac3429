"""The Triton kernels of the gradients of key and value.

Each sum belongs to one program and is made in a fixed order: the same input gives the same bits.
The query is read as it was prepared, from memory: every query is read once for each block of keys,
so adding and rotating here would repeat that work, and its loads could not be copied to shared
memory ahead of their use.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators
from __future__ import annotations

import triton
import triton.language as tl

from collavo_kernels.ops.crayon_attention.triton.parts import (
    block_at,
    columns,
    half_columns,
    halves,
    load_halves,
    load_tokens,
    queries_of,
    store_halves,
    store_unrotated,
    valid_range,
    visible_to,
)


@triton.jit
def _over_queries(
    d_keys,
    d_values,
    operands,  # keys, values, j
    query,  # addresses of the first head's first token; grad_out, shift and delta too
    grad_out,
    statistics,
    token_stride,
    length,
    first,
    end,
    blocks,
    members,
    window,
    scale_log2,
    MASKED: tl.constexpr,
    CONST: tl.constexpr,
):
    """Add the shares of blocks of queries, whole or cut, of each head that reads these keys.

    Heads and blocks are one loop, so that a short sequence does not drain the pipeline at each
    head. Everything is transposed, ``[keys, queries]``: weights then stay in registers as the left
    operand of both sums.
    """
    m = tl.arange(0, CONST.QUERIES)
    keys, values, j = operands
    shift, delta = statistics
    _, _, whole, cut = blocks
    count = cut if MASKED else whole
    for t in range(0, members * count):
        member = t // count
        start = block_at(t - member * count, blocks, MASKED) * CONST.QUERIES
        i = start + m
        kept = (i >= first) & (i < end)
        corner = tl.cast(start, tl.int64) * token_stride + member * CONST.D
        queries = load_tokens(query + corner, m, token_stride, kept, MASKED, CONST)
        upstream = load_tokens(grad_out + corner, m, token_stride, kept, MASKED, CONST)
        at = tl.cast(member, tl.int64) * length + i
        if MASKED:
            # Queries outside the range have the shift infinity: their weights are zeros.
            less = tl.load(shift + at, mask=kept, other=float("inf"))
            mean = tl.load(delta + at, mask=kept, other=0.0)
        else:
            less = tl.load(shift + at)
            mean = tl.load(delta + at)
        scores = tl.dot(keys, tl.trans(queries), input_precision=CONST.PRECISION)
        weights = tl.exp2(scores * scale_log2 - less[None, :])
        if MASKED:
            seen = visible_to(i[None, :], j[:, None], window, CONST)
            weights = tl.where(seen, weights, 0.0)
        low = weights.to(upstream.dtype)
        d_values = tl.dot(low, upstream, d_values, input_precision=CONST.PRECISION)
        d_weights = tl.dot(values, tl.trans(upstream), input_precision=CONST.PRECISION)
        d_scores = (weights * (d_weights - mean[None, :])).to(queries.dtype)
        d_keys = tl.dot(d_scores, queries, d_keys, input_precision=CONST.PRECISION)
    return d_keys, d_values


# A length known to be a multiple of 16 lets the statistics be copied in pieces twice as wide.
@triton.jit(do_not_specialize=["window"])
def key_gradients_kernel(
    query,  # [B, S, H, D], prepared
    key,  # Heads, as value; prepared
    value,
    grad_out,  # [B, S, H, D]
    statistics,  # shift and delta [B, H, S]
    extra,  # gradients of the prepared key and value [B, S, G, D]
    angles,  # Angles
    key_range,  # [B, 2]
    gradients,  # dk and dv [B, S, G, D]
    flags,
    length,
    heads,
    kv_heads,
    window,
    scale,
    scale_log2,
    shares,
    CONST: tl.constexpr,
):
    """Compute dk and dv of a block of keys of one key/value head, over the heads that read it.

    Where these heads are shared out between programs, dk and dv are float32
    ``[shares, B, S, G, D]`` for ``sum_shares_kernel``.

    CONST: D, HALF, QUERIES, KEYS; SHARED, whether they are; ROTATE, ADD_KEY, ADD_VALUE and
    HAS_RANGE, what there is; CAUSAL, WINDOW, PRECISION.
    """
    # Early keys are seen by most queries under a causal mask. Heads are the grid's first axis, so
    # that the longest programs of all of them start first.
    start = tl.program_id(1) * CONST.KEYS
    lanes = kv_heads * shares
    batch = (tl.program_id(0) // lanes).to(tl.int64)
    kv_head = tl.program_id(0) % lanes // shares
    share = tl.program_id(0) % shares
    members = heads // lanes
    first, end = valid_range(key_range, batch, length, flags, CONST)
    n = tl.arange(0, CONST.KEYS)
    j = start + n
    live = (j >= first) & (j < end)
    corner = batch * key.batch + kv_head * key.head + tl.cast(start, tl.int64) * key.token
    keys = load_tokens(key.data + corner, n, key.token, live, True, CONST)
    corner = batch * value.batch + kv_head * value.head + tl.cast(start, tl.int64) * value.token
    values = load_tokens(value.data + corner, n, value.token, live, True, CONST)
    shift, delta = statistics
    head = (kv_head * shares + share) * members
    corner = (batch * length * heads + head) * CONST.D
    at = (batch * heads + head) * length
    blocks = queries_of(start, first, end, window, CONST)
    d_keys = tl.zeros((CONST.KEYS, 2 * CONST.HALF), tl.float32)
    d_values = tl.zeros((CONST.KEYS, 2 * CONST.HALF), tl.float32)
    for part in tl.static_range(2):
        d_keys, d_values = _over_queries(
            d_keys, d_values, (keys, values, j), query + corner, grad_out + corner,
            (shift + at, delta + at), heads * CONST.D, length, first, end, blocks, members, window,
            scale_log2, part == 1, CONST,
        )  # fmt: skip

    # Keys outside the range were zeros there: what they got is no one's gradient.
    d_values = tl.where(live[:, None], d_values, 0.0)
    d_keys = tl.where(live[:, None], d_keys * scale, 0.0)
    dk, dv = gradients
    grad_key, grad_value = extra
    column, exists = columns(CONST)
    place = (batch * length + j[:, None].to(tl.int64)) * kv_heads + kv_head
    stored = (j < length)[:, None] & exists[None, :]
    if CONST.SHARED:
        place += share.to(tl.int64) * (tl.num_programs(0) // lanes) * length * kv_heads
        tl.store(dv + place * CONST.D + column[None, :], d_values, mask=stored)
        tl.store(dk + place * CONST.D + column[None, :], d_keys, mask=stored)
    else:
        at = place * CONST.D + column[None, :]
        if CONST.ADD_VALUE:
            d_values += tl.load(grad_value + at, mask=stored, other=0.0).to(tl.float32)
        tl.store(dv + at, d_values.to(dv.dtype.element_ty), mask=stored)
        if CONST.ADD_KEY:
            d_keys += tl.load(grad_key + at, mask=stored, other=0.0).to(tl.float32)
        low, high = halves(d_keys, CONST)
        store_unrotated(dk, low, high, place, j, j < length, batch, angles, CONST)


@triton.jit
def _sum_of(parts, extra, plane, shares, inside, ADD: tl.constexpr, CONST: tl.constexpr):
    """Sum the shares of both halves in order, and what came from outside."""
    low, high = load_halves(parts, inside, CONST)
    for share in range(1, shares):
        more_low, more_high = load_halves(parts + share * plane, inside, CONST)
        low += more_low
        high += more_high
    if ADD:
        more_low, more_high = load_halves(extra, inside, CONST)
        low += more_low
        high += more_high
    return low, high


@triton.jit
def sum_shares_kernel(
    parts,  # of dk and dv [shares, B, S, G, D] float32
    extra,  # gradients of the prepared key and value [B, S, G, D]
    angles,  # Angles
    gradients,  # dk and dv [B, S, G, D]
    length,
    kv_heads,
    shares,
    CONST: tl.constexpr,
):
    """Finish dk and dv of a block of tokens of one key/value head.

    CONST: D, HALF, TOKENS; ROTATE, ADD_KEY and ADD_VALUE, what there is.
    """
    batch = (tl.program_id(1) // kv_heads).to(tl.int64)
    kv_head = tl.program_id(1) % kv_heads
    token = tl.program_id(0) * CONST.TOKENS + tl.arange(0, CONST.TOKENS)
    known = token < length
    d, inside = half_columns(known, CONST)
    place = (batch * length + token[:, None].to(tl.int64)) * kv_heads + kv_head
    plane = tl.num_programs(1).to(tl.int64) * length * CONST.D
    at = place * CONST.D + d
    key_parts, value_parts = parts
    grad_key, grad_value = extra
    dk, dv = gradients
    low, high = _sum_of(
        value_parts + at, grad_value + at, plane, shares, inside, CONST.ADD_VALUE, CONST
    )
    store_halves(dv + at, low, high, inside, CONST)
    low, high = _sum_of(key_parts + at, grad_key + at, plane, shares, inside, CONST.ADD_KEY, CONST)
    store_unrotated(dk, low, high, place, token, known, batch, angles, CONST)
