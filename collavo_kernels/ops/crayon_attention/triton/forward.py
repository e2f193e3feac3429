"""The Triton kernel of the forward: attention that prepares its queries as it loads them."""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators
from __future__ import annotations

import triton
import triton.language as tl

from collavo_kernels.ops.crayon_attention.triton.parts import (
    angles,
    block_at,
    checked_rows,
    columns,
    joined,
    keys_of,
    rows_at,
    turned,
    valid_range,
    visible_to,
    with_row,
)

_LN_2 = tl.constexpr(0.6931471805599453)


@triton.jit
def _over_keys(
    top,
    total,
    mixed,
    query,
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
    """Run the softmax on over ``count`` blocks of keys: the whole ones, or those a mask cuts.

    A whole block needs no comparison at all, and its scores are scaled by the product that is fused
    with the subtraction of the maximum.
    """
    n = tl.arange(0, KEYS)
    for t in range(0, count):
        start = block_at(t, begin, before, whole, MASKED) * KEYS
        j = start + n
        kept = (j >= first) & (j < end)
        corner = tl.cast(start, tl.int64)
        keys = rows_at(key + corner * key_token, n, key_token, kept, MASKED, D, HALF)
        scores = tl.dot(query, tl.trans(keys), input_precision=PRECISION)
        if MASKED:
            seen = kept[None, :] & visible_to(i[:, None], j[None, :], window, CAUSAL, WINDOW)
            scores = tl.where(seen, scores * scale_log2, float("-inf"))
            higher = tl.maximum(top, tl.max(scores, 1))
            # A row that has seen no key yet.
            safe = tl.where(higher == float("-inf"), 0.0, higher)
            weights = tl.exp2(scores - safe[:, None])
            shrink = tl.exp2(top - safe)
        else:
            higher = tl.maximum(top, tl.max(scores, 1) * scale_log2)
            weights = tl.exp2(scores * scale_log2 - higher[:, None])
            shrink = tl.exp2(top - higher)
        total = total * shrink + tl.sum(weights, 1)
        values = rows_at(value + corner * value_token, n, value_token, kept, MASKED, D, HALF)
        mixed = mixed * shrink[:, None]
        mixed = tl.dot(weights.to(values.dtype), values, mixed, input_precision=PRECISION)
        top = higher
    return top, total, mixed


# Each new length would compile anew, up to three times, and gain nothing here.
@triton.jit(do_not_specialize=["length", "rows", "window"])
def attend_kernel(
    q,
    cos,  # [B or 1, S, D]
    sin,
    table_q,  # [T, H, D]
    row_index,  # [B, S]
    key,  # prepared
    value,
    key_range,  # [B, 2]
    out,  # [B, S, H, D]
    lse,  # [B, H, S]
    flags,
    q_batch,
    q_token,
    q_head,
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
    rows,
    window,
    scale_log2,
    D: tl.constexpr,
    HALF: tl.constexpr,
    QUERIES: tl.constexpr,
    KEYS: tl.constexpr,
    ADD_Q: tl.constexpr,
    ROTATE: tl.constexpr,
    HAS_RANGE: tl.constexpr,
    CAUSAL: tl.constexpr,
    WINDOW: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Attend a block of queries of one head: add, rotate, running softmax over blocks of keys."""
    # Late queries see most keys under a causal mask. Heads are the grid's first axis, so that the
    # longest programs of all of them start first.
    start = (tl.num_programs(1) - 1 - tl.program_id(1)) * QUERIES
    batch = (tl.program_id(0) // heads).to(tl.int64)
    head = tl.program_id(0) % heads
    group = head // (heads // groups)
    first, end = valid_range(key_range, batch, length, flags, HAS_RANGE)
    i = start + tl.arange(0, QUERIES)
    live = (i >= first) & (i < end)
    d = tl.arange(0, HALF)[None, :]
    inside = live[:, None] & (d < D // 2)
    row = tl.full((QUERIES,), -1, tl.int32)
    if ADD_Q:
        row = checked_rows(row_index, batch * length + i, i < length, rows, flags)
    column = i[:, None].to(tl.int64)
    at = batch * q_batch + head * q_head + column * q_token + d
    low, high = with_row(q, at, table_q + head * D, row, heads * D, d, D // 2, inside, ADD_Q)
    at = batch * angle_batch + column * D + d
    cos_low, cos_high = angles(cos, at, D // 2, inside, ROTATE)
    sin_low, sin_high = angles(sin, at, D // 2, inside, ROTATE)
    low, high = turned(low, high, cos_low, cos_high, sin_low, sin_high, ROTATE)
    # The running maximum is taken before the scale is applied, so the scale must not turn it over.
    sign = tl.where(scale_log2 < 0, -1.0, 1.0)
    query = (joined(low, high, QUERIES, HALF) * sign).to(key.dtype.element_ty)
    scale_log2 = tl.abs(scale_log2)

    begin, before, whole, cut = keys_of(start, first, end, window, QUERIES, KEYS, CAUSAL, WINDOW)
    key += batch * k_batch + group * k_head
    value += batch * v_batch + group * v_head
    top = tl.full((QUERIES,), float("-inf"), tl.float32)
    total = tl.zeros((QUERIES,), tl.float32)
    mixed = tl.zeros((QUERIES, 2 * HALF), tl.float32)
    for part in tl.static_range(2):
        top, total, mixed = _over_keys(
            top, total, mixed, query, i, key, value, k_token, v_token, first, end, begin, before,
            whole, cut if part else whole, window, scale_log2, part == 1, D, HALF, KEYS, CAUSAL,
            WINDOW, PRECISION,
        )  # fmt: skip

    # Not "> 0": what is no number stays visible. With any key the total is at least 1.
    alive = live & (total != 0)
    divisor = tl.where(alive, total, 1.0)
    mixed = tl.where(alive[:, None], mixed / divisor[:, None], 0.0)
    place, exists = columns(D, HALF)
    at = ((batch * length + column) * heads + head) * D + place[None, :]
    stored = (i < length)[:, None] & exists[None, :]
    tl.store(out + at, mixed.to(out.dtype.element_ty), mask=stored)
    log_sum = tl.where(alive, (top + tl.log2(divisor)) * _LN_2, float("-inf"))
    tl.store(lse + (batch * heads + head) * length + i, log_sum, mask=i < length)
