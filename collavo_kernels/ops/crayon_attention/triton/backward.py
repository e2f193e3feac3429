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
    halves,
    queries_of,
    rows_at,
    store_turned_back,
    valid_range,
    visible_to,
)


@triton.jit
def _over_queries(
    d_keys,
    d_values,
    keys,
    values,
    j,
    query,
    grad_out,
    shift,
    delta,
    token_stride,
    length,
    first,
    end,
    begin,
    before,
    whole,
    count,
    members,
    window,
    scale_log2,
    MASKED: tl.constexpr,
    D: tl.constexpr,
    HALF: tl.constexpr,
    QUERIES: tl.constexpr,
    CAUSAL: tl.constexpr,
    WINDOW: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Add the shares of ``count`` blocks of queries of each head that reads these keys.

    Heads and blocks are one loop, so that a short sequence does not drain the pipeline at each
    head. Everything is transposed, ``[keys, queries]``: weights then stay in registers as the left
    operand of both sums.
    """
    m = tl.arange(0, QUERIES)
    for t in range(0, members * count):
        member = t // count
        start = block_at(t - member * count, begin, before, whole, MASKED) * QUERIES
        i = start + m
        kept = (i >= first) & (i < end)
        corner = tl.cast(start, tl.int64) * token_stride + member * D
        queries = rows_at(query + corner, m, token_stride, kept, MASKED, D, HALF)
        upstream = rows_at(grad_out + corner, m, token_stride, kept, MASKED, D, HALF)
        at = tl.cast(member, tl.int64) * length + i
        if MASKED:
            # Queries outside the range have the shift infinity: their weights are zeros.
            less = tl.load(shift + at, mask=kept, other=float("inf"))
            mean = tl.load(delta + at, mask=kept, other=0.0)
        else:
            less = tl.load(shift + at)
            mean = tl.load(delta + at)
        scores = tl.dot(keys, tl.trans(queries), input_precision=PRECISION)
        weights = tl.exp2(scores * scale_log2 - less[None, :])
        if MASKED:
            seen = visible_to(i[None, :], j[:, None], window, CAUSAL, WINDOW)
            weights = tl.where(seen, weights, 0.0)
        d_values = tl.dot(weights.to(upstream.dtype), upstream, d_values, input_precision=PRECISION)
        d_weights = tl.dot(values, tl.trans(upstream), input_precision=PRECISION)
        d_scores = (weights * (d_weights - mean[None, :])).to(queries.dtype)
        d_keys = tl.dot(d_scores, queries, d_keys, input_precision=PRECISION)
    return d_keys, d_values


# A length known to be a multiple of 16 lets the statistics be copied in pieces twice as wide.
@triton.jit(do_not_specialize=["window"])
def key_gradients_kernel(
    query,  # [B, S, H, D], prepared
    key,
    value,
    grad_out,  # [B, S, H, D]
    shift,  # [B, H, S]
    delta,
    grad_key,  # [B, S, G, D]
    grad_value,
    cos,  # [B or 1, S, D]
    sin,
    key_range,  # [B, 2]
    dk,  # [B, S, G, D]
    dv,
    flags,
    k_batch,
    k_token,
    k_head,
    v_batch,
    v_token,
    v_head,
    angle_batch,
    length,
    heads,
    groups,
    window,
    scale,
    scale_log2,
    shares,
    D: tl.constexpr,
    HALF: tl.constexpr,
    QUERIES: tl.constexpr,
    KEYS: tl.constexpr,
    SHARED: tl.constexpr,
    ROTATE: tl.constexpr,
    ADD_KEY: tl.constexpr,
    ADD_VALUE: tl.constexpr,
    HAS_RANGE: tl.constexpr,
    CAUSAL: tl.constexpr,
    WINDOW: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Compute dk and dv of a block of keys of one key/value head, over the heads that read it.

    Where these heads are shared out between programs, dk and dv are float32
    ``[shares, B, S, G, D]`` for ``sum_shares_kernel``.
    """
    # Early keys are seen by most queries under a causal mask. Heads are the grid's first axis, so
    # that the longest programs of all of them start first.
    start = tl.program_id(1) * KEYS
    lanes = groups * shares
    batch = (tl.program_id(0) // lanes).to(tl.int64)
    group = tl.program_id(0) % lanes // shares
    share = tl.program_id(0) % shares
    members = heads // lanes
    first, end = valid_range(key_range, batch, length, flags, HAS_RANGE)
    n = tl.arange(0, KEYS)
    j = start + n
    live = (j >= first) & (j < end)
    place, exists = columns(D, HALF)
    corner = batch * k_batch + group * k_head + tl.cast(start, tl.int64) * k_token
    keys = rows_at(key + corner, n, k_token, live, True, D, HALF)
    corner = batch * v_batch + group * v_head + tl.cast(start, tl.int64) * v_token
    values = rows_at(value + corner, n, v_token, live, True, D, HALF)
    head = (group * shares + share) * members
    query += (batch * length * heads + head) * D
    grad_out += (batch * length * heads + head) * D
    shift += (batch * heads + head) * length
    delta += (batch * heads + head) * length
    begin, before, whole, cut = queries_of(start, first, end, window, KEYS, QUERIES, CAUSAL, WINDOW)
    d_keys = tl.zeros((KEYS, 2 * HALF), tl.float32)
    d_values = tl.zeros((KEYS, 2 * HALF), tl.float32)
    for part in tl.static_range(2):
        d_keys, d_values = _over_queries(
            d_keys, d_values, keys, values, j, query, grad_out, shift, delta, heads * D, length,
            first, end, begin, before, whole, cut if part else whole, members, window, scale_log2,
            part == 1, D, HALF, QUERIES, CAUSAL, WINDOW, PRECISION,
        )  # fmt: skip

    # Keys outside the range were zeros there: what they got is no one's gradient.
    d_values = tl.where(live[:, None], d_values, 0.0)
    d_keys = tl.where(live[:, None], d_keys * scale, 0.0)
    row = (batch * length + j[:, None].to(tl.int64)) * groups + group
    stored = (j < length)[:, None] & exists[None, :]
    if SHARED:
        row += share.to(tl.int64) * (tl.num_programs(0) // lanes) * length * groups
        tl.store(dv + row * D + place[None, :], d_values, mask=stored)
        tl.store(dk + row * D + place[None, :], d_keys, mask=stored)
    else:
        at = row * D + place[None, :]
        if ADD_VALUE:
            d_values += tl.load(grad_value + at, mask=stored, other=0.0).to(tl.float32)
        tl.store(dv + at, d_values.to(dv.dtype.element_ty), mask=stored)
        if ADD_KEY:
            d_keys += tl.load(grad_key + at, mask=stored, other=0.0).to(tl.float32)
        low, high = halves(d_keys, KEYS, HALF)
        store_turned_back(
            dk, low, high, row, j, j < length, batch * angle_batch, cos, sin, D, HALF, ROTATE
        )


@triton.jit
def _sum_of(parts, extra, at, plane, shares, half, inside, ADD: tl.constexpr):
    """Sum the shares of both halves in order, and what came from outside."""
    low = tl.load(parts + at, mask=inside, other=0.0)
    high = tl.load(parts + at + half, mask=inside, other=0.0)
    for share in range(1, shares):
        here = parts + at + share * plane
        low += tl.load(here, mask=inside, other=0.0)
        high += tl.load(here + half, mask=inside, other=0.0)
    if ADD:
        low += tl.load(extra + at, mask=inside, other=0.0).to(tl.float32)
        high += tl.load(extra + at + half, mask=inside, other=0.0).to(tl.float32)
    return low, high


@triton.jit
def sum_shares_kernel(
    key_shares,  # [shares, B, S, G, D] float32
    value_shares,
    grad_key,  # [B, S, G, D]
    grad_value,
    cos,  # [B or 1, S, D]
    sin,
    dk,  # [B, S, G, D]
    dv,
    angle_batch,
    length,
    groups,
    shares,
    D: tl.constexpr,
    HALF: tl.constexpr,
    TOKENS: tl.constexpr,
    ROTATE: tl.constexpr,
    ADD_KEY: tl.constexpr,
    ADD_VALUE: tl.constexpr,
):
    """Finish dk and dv of a block of tokens of one key/value head."""
    batch = (tl.program_id(1) // groups).to(tl.int64)
    group = tl.program_id(1) % groups
    token = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    known = token < length
    d = tl.arange(0, HALF)[None, :]
    inside = known[:, None] & (d < D // 2)
    row = (batch * length + token[:, None].to(tl.int64)) * groups + group
    plane = tl.num_programs(1).to(tl.int64) * length * D
    at = row * D + d
    low, high = _sum_of(value_shares, grad_value, at, plane, shares, D // 2, inside, ADD_VALUE)
    tl.store(dv + at, low.to(dv.dtype.element_ty), mask=inside)
    tl.store(dv + at + D // 2, high.to(dv.dtype.element_ty), mask=inside)
    low, high = _sum_of(key_shares, grad_key, at, plane, shares, D // 2, inside, ADD_KEY)
    store_turned_back(
        dk, low, high, row, token, known, batch * angle_batch, cos, sin, D, HALF, ROTATE
    )
