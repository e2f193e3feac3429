"""The Triton kernel of the gradient of the query."""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators
from __future__ import annotations

import triton
import triton.language as tl

from collavo_kernels.ops.crayon_attention.triton.parts import (
    block_at,
    block_of_queries,
    halves,
    keys_of,
    load_tokens,
    store_unrotated,
    valid_range,
    visible_to,
)


@triton.jit
def _over_keys(
    d_query,
    operands,  # queries, upstream, less, mean, i
    key,  # address of the head's first token, and stride; value too
    value,
    first,
    end,
    blocks,
    window,
    scale_log2,
    MASKED: tl.constexpr,
    CONST: tl.constexpr,
):
    """Add the shares of the blocks of keys that a mask cuts, or of the whole ones."""
    n = tl.arange(0, CONST.KEYS)
    queries, upstream, less, mean, i = operands
    key, key_token = key
    value, value_token = value
    _, _, whole, cut = blocks
    for t in range(0, cut if MASKED else whole):
        start = block_at(t, blocks, MASKED) * CONST.KEYS
        j = start + n
        kept = (j >= first) & (j < end)
        corner = tl.cast(start, tl.int64)
        keys = load_tokens(key + corner * key_token, n, key_token, kept, MASKED, CONST)
        values = load_tokens(value + corner * value_token, n, value_token, kept, MASKED, CONST)
        scores = tl.dot(queries, tl.trans(keys), input_precision=CONST.PRECISION)
        weights = tl.exp2(scores * scale_log2 - less[:, None])
        if MASKED:
            seen = kept[None, :] & visible_to(i[:, None], j[None, :], window, CONST)
            weights = tl.where(seen, weights, 0.0)
        d_weights = tl.dot(upstream, tl.trans(values), input_precision=CONST.PRECISION)
        d_scores = (weights * (d_weights - mean[:, None])).to(keys.dtype)
        d_query = tl.dot(d_scores, keys, d_query, input_precision=CONST.PRECISION)
    return d_query


@triton.jit(do_not_specialize=["length", "window"])
def query_gradients_kernel(
    query,  # [B, S, H, D], prepared
    key,  # Heads, as value; prepared
    value,
    grad_out,  # [B, S, H, D]
    statistics,  # shift and delta [B, H, S]
    angles,  # Angles
    key_range,  # [B, 2]
    dq,  # [B, S, H, D]
    flags,
    length,
    heads,
    kv_heads,
    window,
    scale,
    scale_log2,
    CONST: tl.constexpr,
):
    """Compute dq of a block of queries of one head.

    CONST: D, HALF, QUERIES, KEYS; ROTATE and HAS_RANGE, what there is; CAUSAL, WINDOW, PRECISION.
    """
    start, batch, head, kv_head = block_of_queries(heads, kv_heads, CONST)
    first, end = valid_range(key_range, batch, length, flags, CONST)
    m = tl.arange(0, CONST.QUERIES)
    i = start + m
    live = (i >= first) & (i < end)
    corner = ((batch * length + start) * heads + head) * CONST.D
    queries = load_tokens(query + corner, m, heads * CONST.D, live, True, CONST)
    upstream = load_tokens(grad_out + corner, m, heads * CONST.D, live, True, CONST)
    shift, delta = statistics
    at = (batch * heads + head) * length + i
    less = tl.load(shift + at, mask=live, other=float("inf"))
    mean = tl.load(delta + at, mask=live, other=0.0)
    blocks = keys_of(start, first, end, window, CONST)
    keys = key.data + (batch * key.batch + kv_head * key.head), key.token
    values = value.data + (batch * value.batch + kv_head * value.head), value.token
    d_query = tl.zeros((CONST.QUERIES, 2 * CONST.HALF), tl.float32)
    for part in tl.static_range(2):
        d_query = _over_keys(
            d_query, (queries, upstream, less, mean, i), keys, values, first, end, blocks, window,
            scale_log2, part == 1, CONST,
        )  # fmt: skip

    d_query = tl.where(live[:, None], d_query * scale, 0.0)
    place = (batch * length + i[:, None].to(tl.int64)) * heads + head
    low, high = halves(d_query, CONST)
    store_unrotated(dq, low, high, place, i, i < length, batch, angles, CONST)
