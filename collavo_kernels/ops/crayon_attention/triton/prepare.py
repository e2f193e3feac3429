"""The Triton kernel of the preparation pass: what a token's heads need before any attention."""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators
from __future__ import annotations

import math

import triton
import triton.language as tl

from collavo_kernels.ops.crayon_attention.triton.parts import (
    checked_rows,
    half_columns,
    load_angles,
    load_halves,
    load_with_row,
    rotate,
    store_halves,
    valid_range,
)

_LOG2_E = tl.constexpr(math.log2(math.e))


@triton.jit
def _store_statistics(
    grad_out, out, lse, statistics, where, live, known, inside, CONST: tl.constexpr
):
    """Write what the backward needs of each query: its log-sum-exp in base 2, and dOut . out.

    A query that sees no key gets the shift infinity, so that its weights come out as exact zeros.
    """
    shift, delta = statistics
    inside = inside & live[:, None]
    grad_low, grad_high = load_halves(grad_out, inside, CONST)
    low, high = load_halves(out, inside, CONST)
    tl.store(delta + where, tl.sum(grad_low * low + grad_high * high, 1), mask=known)
    log_sum = tl.load(lse + where, mask=live, other=float("-inf"))
    log_sum = tl.where(log_sum == float("-inf"), float("inf"), log_sum * _LOG2_E)
    tl.store(shift + where, log_sum, mask=known)


@triton.jit(do_not_specialize=["length", "rows"])
def prepare_kernel(
    q,  # Heads, as k and v
    k,
    v,
    angles,  # Angles
    tables,  # of q [T, H, D], of k and v [T, G, D]
    row_index,  # [B, S]
    key_range,  # [B, 2]
    grad_out,  # [B, S, H, D]
    out,
    lse,  # [B, H, S]
    prepared,  # query [B, S, H, D], key and value [B, S, G, D]
    statistics,  # shift and delta [B, H, S]
    flags,
    length,
    heads,
    kv_heads,
    rows,
    CONST: tl.constexpr,
):
    """Write ``R (q + row)``, ``R (k + row)``, ``v + row`` and statistics, as the switches say.

    A program takes a block of tokens and HEADS of their heads, counted through q's, k's and v's:
    angles and rows are read once for all of them.

    CONST: D, HALF, TOKENS, HEADS; Q, K, V and STATISTICS, what to write; ROTATE; ADD_Q, ADD_K and
    ADD_V, which tables there are; HAS_RANGE.
    """
    query, key, value = prepared
    table_q, table_k, table_v = tables
    of_q = heads if CONST.Q or CONST.STATISTICS else 0
    of_k = kv_heads if CONST.K else 0
    of_v = kv_heads if CONST.V else 0
    shares = tl.cdiv(of_q + of_k + of_v, CONST.HEADS)
    batch = (tl.program_id(1) // shares).to(tl.int64)
    slot = (tl.program_id(1) % shares) * CONST.HEADS
    token = tl.program_id(0) * CONST.TOKENS + tl.arange(0, CONST.TOKENS)
    known = token < length
    d, inside = half_columns(known, CONST)
    row = tl.full((CONST.TOKENS,), -1, tl.int32)
    if CONST.ADD_Q or CONST.ADD_K or CONST.ADD_V:
        row = checked_rows(row_index, batch * length + token, known, rows, flags)
    angle = load_angles(angles, batch, token, inside, CONST)
    place = batch * length + token[:, None].to(tl.int64)
    for n in range(slot, tl.minimum(slot + CONST.HEADS, of_q + of_k + of_v)):
        if n < of_q:
            at = (place * heads + n) * CONST.D + d
            if CONST.Q:
                low, high = load_with_row(
                    q, table_q, n, heads, batch, token, row, inside, CONST.ADD_Q, CONST
                )
                low, high = rotate(low, high, angle, CONST)
                store_halves(query + at, low, high, inside, CONST)
            if CONST.STATISTICS:
                first, end = valid_range(key_range, batch, length, flags, CONST)
                live = known & (token >= first) & (token < end)
                where = (batch * heads + n) * length + token
                _store_statistics(
                    grad_out + at, out + at, lse, statistics, where, live, known, inside, CONST
                )
        elif n < of_q + of_k:
            kv_head = n - of_q
            low, high = load_with_row(
                k, table_k, kv_head, kv_heads, batch, token, row, inside, CONST.ADD_K, CONST
            )
            low, high = rotate(low, high, angle, CONST)
            at = (place * kv_heads + kv_head) * CONST.D + d
            store_halves(key + at, low, high, inside, CONST)
        else:
            kv_head = n - of_q - of_k
            low, high = load_with_row(
                v, table_v, kv_head, kv_heads, batch, token, row, inside, CONST.ADD_V, CONST
            )
            at = (place * kv_heads + kv_head) * CONST.D + d
            store_halves(value + at, low, high, inside, CONST)
