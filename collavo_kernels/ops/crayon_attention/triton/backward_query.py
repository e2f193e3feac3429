"""The Triton kernel of the gradient of the query."""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators
from __future__ import annotations

import triton
import triton.language as tl

from collavo_kernels.ops.crayon_attention.triton.parts import (
    block_at,
    halves,
    keys_of,
    rows_at,
    store_turned_back,
    valid_range,
    visible_to,
)


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


@triton.jit(do_not_specialize=["length", "window"])
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
    # Late queries see most keys under a causal mask. Heads are the grid's first axis, so that the
    # longest programs of all of them start first.
    start = (tl.num_programs(1) - 1 - tl.program_id(1)) * QUERIES
    batch = (tl.program_id(0) // heads).to(tl.int64)
    head = tl.program_id(0) % heads
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
    row = (batch * length + i[:, None].to(tl.int64)) * heads + head
    low, high = halves(d_query, QUERIES, HALF)
    store_turned_back(
        dq, low, high, row, i, i < length, batch * angle_batch, cos, sin, D, HALF, ROTATE
    )
