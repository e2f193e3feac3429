"""The Triton kernel of the forward: attention that prepares its queries as it loads them."""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators
from __future__ import annotations

import math

import triton
import triton.language as tl

from collavo_kernels.ops.crayon_attention.triton.parts import (
    block_at,
    block_of_queries,
    checked_rows,
    columns,
    half_columns,
    joined,
    keys_of,
    load_angles,
    load_tokens,
    load_with_row,
    rotate,
    valid_range,
    visible_to,
)

_LN_2 = tl.constexpr(math.log(2))


@triton.jit
def _over_keys(
    top,
    total,
    mixed,
    query,
    i,
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
    """Run the softmax on over the blocks of keys that a mask cuts, or over the whole ones.

    A whole block needs no comparison at all, and its scores are scaled by the product that is fused
    with the subtraction of the maximum.
    """
    n = tl.arange(0, CONST.KEYS)
    key, key_token = key
    value, value_token = value
    _, _, whole, cut = blocks
    for t in range(0, cut if MASKED else whole):
        start = block_at(t, blocks, MASKED) * CONST.KEYS
        j = start + n
        kept = (j >= first) & (j < end)
        corner = tl.cast(start, tl.int64)
        keys = load_tokens(key + corner * key_token, n, key_token, kept, MASKED, CONST)
        scores = tl.dot(query, tl.trans(keys), input_precision=CONST.PRECISION)
        if MASKED:
            seen = kept[None, :] & visible_to(i[:, None], j[None, :], window, CONST)
            scores = tl.where(seen, scores * scale_log2, float("-inf"))
            higher = tl.maximum(top, tl.max(scores, 1))
            # A query that has seen no key yet.
            safe = tl.where(higher == float("-inf"), 0.0, higher)
            weights = tl.exp2(scores - safe[:, None])
            shrink = tl.exp2(top - safe)
        else:
            higher = tl.maximum(top, tl.max(scores, 1) * scale_log2)
            weights = tl.exp2(scores * scale_log2 - higher[:, None])
            shrink = tl.exp2(top - higher)
        total = total * shrink + tl.sum(weights, 1)
        values = load_tokens(value + corner * value_token, n, value_token, kept, MASKED, CONST)
        mixed = mixed * shrink[:, None]
        mixed = tl.dot(weights.to(values.dtype), values, mixed, input_precision=CONST.PRECISION)
        top = higher
    return top, total, mixed


# Each new length would compile anew, up to three times, and gain nothing here.
@triton.jit(do_not_specialize=["length", "rows", "window"])
def attend_kernel(
    q,  # Heads, as key and value, which are prepared
    key,
    value,
    angles,  # Angles
    table_q,  # [T, H, D]
    row_index,  # [B, S]
    key_range,  # [B, 2]
    out,  # [B, S, H, D]
    lse,  # [B, H, S]
    flags,
    length,
    heads,
    kv_heads,
    rows,
    window,
    scale_log2,
    CONST: tl.constexpr,
):
    """Attend a block of queries of one head: add, rotate, running softmax over blocks of keys.

    CONST: D, HALF, QUERIES, KEYS; ADD_Q, ROTATE and HAS_RANGE, what there is; CAUSAL, WINDOW,
    PRECISION.
    """
    start, batch, head, kv_head = block_of_queries(heads, kv_heads, CONST)
    first, end = valid_range(key_range, batch, length, flags, CONST)
    i = start + tl.arange(0, CONST.QUERIES)
    live = (i >= first) & (i < end)
    _, inside = half_columns(live, CONST)
    row = tl.full((CONST.QUERIES,), -1, tl.int32)
    if CONST.ADD_Q:
        row = checked_rows(row_index, batch * length + i, i < length, rows, flags)
    low, high = load_with_row(q, table_q, head, heads, batch, i, row, inside, CONST.ADD_Q, CONST)
    low, high = rotate(low, high, load_angles(angles, batch, i, inside, CONST), CONST)
    # The running maximum is taken before the scale is applied, so the scale must not turn it over.
    sign = tl.where(scale_log2 < 0, -1.0, 1.0)
    query = (joined(low, high, CONST) * sign).to(key.data.dtype.element_ty)
    scale_log2 = tl.abs(scale_log2)

    blocks = keys_of(start, first, end, window, CONST)
    keys = key.data + (batch * key.batch + kv_head * key.head), key.token
    values = value.data + (batch * value.batch + kv_head * value.head), value.token
    top = tl.full((CONST.QUERIES,), float("-inf"), tl.float32)
    total = tl.zeros((CONST.QUERIES,), tl.float32)
    mixed = tl.zeros((CONST.QUERIES, 2 * CONST.HALF), tl.float32)
    for part in tl.static_range(2):
        top, total, mixed = _over_keys(
            top, total, mixed, query, i, keys, values, first, end, blocks, window, scale_log2,
            part == 1, CONST,
        )  # fmt: skip

    # Not "> 0": what is no number stays visible. With any key the total is at least 1.
    alive = live & (total != 0)
    divisor = tl.where(alive, total, 1.0)
    mixed = tl.where(alive[:, None], mixed / divisor[:, None], 0.0)
    place, exists = columns(CONST)
    token = batch * length + i[:, None].to(tl.int64)
    at = (token * heads + head) * CONST.D + place[None, :]
    stored = (i < length)[:, None] & exists[None, :]
    tl.store(out + at, mixed.to(out.dtype.element_ty), mask=stored)
    log_sum = tl.where(alive, (top + tl.log2(divisor)) * _LN_2, float("-inf"))
    tl.store(lse + (batch * heads + head) * length + i, log_sum, mask=i < length)
