"""The Triton kernels of the backward: gradients of key and value, and of the query.

Each sum belongs to one program and is made in a fixed order: the same input gives the same bits.
Both kernels read the prepared query from memory, because the first one reads every query once for
each block of keys: adding and rotating there would repeat that work, and its loads could not be
copied to shared memory ahead of their use.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators
from __future__ import annotations

import triton
import triton.language as tl

from collavo_kernels.ops.crayon_attention.triton_parts import (
    angles,
    block_at,
    columns,
    halves,
    keys_of,
    queries_of,
    rows_at,
    turned_back,
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


@triton.jit
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
    D: tl.constexpr,
    HALF: tl.constexpr,
    QUERIES: tl.constexpr,
    KEYS: tl.constexpr,
    ROTATE: tl.constexpr,
    ADD_KEY: tl.constexpr,
    ADD_VALUE: tl.constexpr,
    HAS_RANGE: tl.constexpr,
    CAUSAL: tl.constexpr,
    WINDOW: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Compute dk and dv of a block of keys of one key/value head, over the heads that read it."""
    # Early keys are seen by most queries under a causal mask: the longest programs start first.
    start = tl.program_id(0) * KEYS
    batch = (tl.program_id(1) // groups).to(tl.int64)
    group = tl.program_id(1) % groups
    members = heads // groups
    first, end = valid_range(key_range, batch, length, flags, HAS_RANGE)
    n = tl.arange(0, KEYS)
    j = start + n
    live = (j >= first) & (j < end)
    place, exists = columns(D, HALF)
    corner = batch * k_batch + group * k_head + tl.cast(start, tl.int64) * k_token
    keys = rows_at(key + corner, n, k_token, live, True, D, HALF)
    corner = batch * v_batch + group * v_head + tl.cast(start, tl.int64) * v_token
    values = rows_at(value + corner, n, v_token, live, True, D, HALF)
    head = group * members
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
    column = j[:, None].to(tl.int64)
    at = ((batch * length + column) * groups + group) * D + place[None, :]
    stored = (j < length)[:, None] & exists[None, :]
    if ADD_VALUE:
        d_values += tl.load(grad_value + at, mask=stored, other=0.0).to(tl.float32)
    tl.store(dv + at, d_values.to(dv.dtype.element_ty), mask=stored)
    if ADD_KEY:
        d_keys += tl.load(grad_key + at, mask=stored, other=0.0).to(tl.float32)
    _store_turned_back(
        dk, d_keys, (batch * length + column) * groups + group, batch * angle_batch, column,
        cos, sin, j < length, D, HALF, KEYS, ROTATE,
    )  # fmt: skip


@triton.jit
def _store_turned_back(
    out,
    x,  # [ROWS, 2 HALF]
    place,  # of the head's row in out: [ROWS, 1]
    angle,
    column,
    cos,
    sin,
    known,
    D: tl.constexpr,
    HALF: tl.constexpr,
    ROWS: tl.constexpr,
    ROTATE: tl.constexpr,
):
    """Undo the rotation and store."""
    low, high = halves(x, ROWS, HALF)
    d = tl.arange(0, HALF)[None, :]
    inside = known[:, None] & (d < D // 2)
    at = angle + column * D + d
    cos_low, cos_high = angles(cos, at, D // 2, inside, ROTATE)
    sin_low, sin_high = angles(sin, at, D // 2, inside, ROTATE)
    low, high = turned_back(low, high, cos_low, cos_high, sin_low, sin_high, ROTATE)
    at = place * D + d
    tl.store(out + at, low.to(out.dtype.element_ty), mask=inside)
    tl.store(out + at + D // 2, high.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _over_keys(
    d_query,
    queries,
    upstream,
    less,
    mean,
    i,
    key,
    value,
    key_token,
    value_token,
    first,
    end,
    begin,
    before,
    whole,
    count,
    window,
    scale_log2,
    MASKED: tl.constexpr,
    D: tl.constexpr,
    HALF: tl.constexpr,
    KEYS: tl.constexpr,
    CAUSAL: tl.constexpr,
    WINDOW: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Add the shares of ``count`` blocks of keys to the query's gradient."""
    n = tl.arange(0, KEYS)
    for t in range(0, count):
        start = block_at(t, begin, before, whole, MASKED) * KEYS
        j = start + n
        kept = (j >= first) & (j < end)
        corner = tl.cast(start, tl.int64)
        keys = rows_at(key + corner * key_token, n, key_token, kept, MASKED, D, HALF)
        values = rows_at(value + corner * value_token, n, value_token, kept, MASKED, D, HALF)
        scores = tl.dot(queries, tl.trans(keys), input_precision=PRECISION)
        weights = tl.exp2(scores * scale_log2 - less[:, None])
        if MASKED:
            seen = kept[None, :] & visible_to(i[:, None], j[None, :], window, CAUSAL, WINDOW)
            weights = tl.where(seen, weights, 0.0)
        d_weights = tl.dot(upstream, tl.trans(values), input_precision=PRECISION)
        d_scores = (weights * (d_weights - mean[:, None])).to(keys.dtype)
        d_query = tl.dot(d_scores, keys, d_query, input_precision=PRECISION)
    return d_query


@triton.jit
def query_gradients_kernel(
    query,  # [B, S, H, D], prepared
    key,
    value,
    grad_out,  # [B, S, H, D]
    shift,  # [B, H, S]
    delta,
    cos,  # [B or 1, S, D]
    sin,
    key_range,  # [B, 2]
    dq,  # [B, S, H, D]
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
    D: tl.constexpr,
    HALF: tl.constexpr,
    QUERIES: tl.constexpr,
    KEYS: tl.constexpr,
    ROTATE: tl.constexpr,
    HAS_RANGE: tl.constexpr,
    CAUSAL: tl.constexpr,
    WINDOW: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Compute dq of a block of queries of one head."""
    # Late queries see most keys under a causal mask: the longest programs start first.
    start = (tl.num_programs(0) - 1 - tl.program_id(0)) * QUERIES
    batch = (tl.program_id(1) // heads).to(tl.int64)
    head = tl.program_id(1) % heads
    group = head // (heads // groups)
    first, end = valid_range(key_range, batch, length, flags, HAS_RANGE)
    m = tl.arange(0, QUERIES)
    i = start + m
    live = (i >= first) & (i < end)
    corner = ((batch * length + start) * heads + head) * D
    queries = rows_at(query + corner, m, heads * D, live, True, D, HALF)
    upstream = rows_at(grad_out + corner, m, heads * D, live, True, D, HALF)
    at = (batch * heads + head) * length + i
    less = tl.load(shift + at, mask=live, other=float("inf"))
    mean = tl.load(delta + at, mask=live, other=0.0)
    begin, before, whole, cut = keys_of(start, first, end, window, QUERIES, KEYS, CAUSAL, WINDOW)
    key += batch * k_batch + group * k_head
    value += batch * v_batch + group * v_head
    d_query = tl.zeros((QUERIES, 2 * HALF), tl.float32)
    for part in tl.static_range(2):
        d_query = _over_keys(
            d_query, queries, upstream, less, mean, i, key, value, k_token, v_token, first, end,
            begin, before, whole, cut if part else whole, window, scale_log2, part == 1, D, HALF,
            KEYS, CAUSAL, WINDOW, PRECISION,
        )  # fmt: skip

    d_query = tl.where(live[:, None], d_query * scale, 0.0)
    column = i[:, None].to(tl.int64)
    _store_turned_back(
        dq, d_query, (batch * length + column) * heads + head, batch * angle_batch, column,
        cos, sin, i < length, D, HALF, QUERIES, ROTATE,
    )  # fmt: skip
