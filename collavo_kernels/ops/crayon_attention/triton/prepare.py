"""The Triton kernel of the preparation pass: what a token's heads need before any attention."""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators
from __future__ import annotations

import triton
import triton.language as tl

from collavo_kernels.ops.crayon_attention.triton.parts import (
    angles,
    checked_rows,
    turned,
    valid_range,
    with_row,
)

_LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def _store(out, at, low, high, half, inside):
    tl.store(out + at, low.to(out.dtype.element_ty), mask=inside)
    tl.store(out + at + half, high.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _store_statistics(
    grad_out, out, at, lse, shift, delta, where, live, inside, half, length_inside
):
    """Write what the backward needs of each query: its log-sum-exp in base 2, and dOut . out.

    A query that sees no key gets the shift infinity, so that its weights come out as exact zeros.
    """
    inside = inside & live[:, None]
    product = tl.load(grad_out + at, mask=inside, other=0.0).to(tl.float32)
    product *= tl.load(out + at, mask=inside, other=0.0).to(tl.float32)
    second = tl.load(grad_out + at + half, mask=inside, other=0.0).to(tl.float32)
    second *= tl.load(out + at + half, mask=inside, other=0.0).to(tl.float32)
    tl.store(delta + where, tl.sum(product + second, 1), mask=length_inside)
    log_sum = tl.load(lse + where, mask=live, other=float("-inf"))
    log_sum = tl.where(log_sum == float("-inf"), float("inf"), log_sum * _LOG2_E)
    tl.store(shift + where, log_sum, mask=length_inside)


@triton.jit(do_not_specialize=["length", "rows"])
def prepare_kernel(
    q,
    k,
    v,
    cos,  # [B or 1, S, D]
    sin,
    table_q,  # [T, H, D]
    table_k,  # [T, G, D]
    table_v,
    row_index,  # [B, S]
    key_range,  # [B, 2]
    grad_out,  # [B, S, H, D]
    out,
    lse,  # [B, H, S]
    query,  # [B, S, H, D]
    key,  # [B, S, G, D]
    value,
    shift,  # [B, H, S]
    delta,
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
    D: tl.constexpr,
    HALF: tl.constexpr,
    TOKENS: tl.constexpr,
    HEADS: tl.constexpr,
    Q: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    STATISTICS: tl.constexpr,
    ROTATE: tl.constexpr,
    ADD_Q: tl.constexpr,
    ADD_K: tl.constexpr,
    ADD_V: tl.constexpr,
    HAS_RANGE: tl.constexpr,
):
    """Write ``R (q + row)``, ``R (k + row)``, ``v + row`` and statistics, as the switches say.

    A program takes a block of tokens and HEADS of their heads, counted through q's, k's and v's:
    angles and rows are read once for all of them.
    """
    of_q = heads if Q or STATISTICS else 0
    of_k = groups if K else 0
    of_v = groups if V else 0
    shares = tl.cdiv(of_q + of_k + of_v, HEADS)
    batch = (tl.program_id(1) // shares).to(tl.int64)
    slot = (tl.program_id(1) % shares) * HEADS
    token = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    d = tl.arange(0, HALF)[None, :]
    known = token < length
    inside = known[:, None] & (d < D // 2)
    column = token[:, None].to(tl.int64)
    row = tl.full((TOKENS,), -1, tl.int32)
    if ADD_Q or ADD_K or ADD_V:
        row = checked_rows(row_index, batch * length + token, known, rows, flags)
    at = batch * angle_batch + column * D + d
    cos_low, cos_high = angles(cos, at, D // 2, inside, ROTATE)
    sin_low, sin_high = angles(sin, at, D // 2, inside, ROTATE)
    place = batch * length + column
    for n in range(slot, tl.minimum(slot + HEADS, of_q + of_k + of_v)):
        if n < of_q:
            stored = (place * heads + n) * D + d
            if Q:
                at = batch * q_batch + n * q_head + column * q_token + d
                low, high = with_row(
                    q, at, table_q + n * D, row, heads * D, d, D // 2, inside, ADD_Q
                )
                low, high = turned(low, high, cos_low, cos_high, sin_low, sin_high, ROTATE)
                _store(query, stored, low, high, D // 2, inside)
            if STATISTICS:
                first, end = valid_range(key_range, batch, length, flags, HAS_RANGE)
                live = known & (token >= first) & (token < end)
                where = (batch * heads + n) * length + token
                _store_statistics(
                    grad_out, out, stored, lse, shift, delta, where, live, inside, D // 2, known
                )
        elif n < of_q + of_k:
            group = n - of_q
            at = batch * k_batch + group * k_head + column * k_token + d
            low, high = with_row(
                k, at, table_k + group * D, row, groups * D, d, D // 2, inside, ADD_K
            )
            low, high = turned(low, high, cos_low, cos_high, sin_low, sin_high, ROTATE)
            _store(key, (place * groups + group) * D + d, low, high, D // 2, inside)
        else:
            group = n - of_q - of_k
            at = batch * v_batch + group * v_head + column * v_token + d
            low, high = with_row(
                v, at, table_v + group * D, row, groups * D, d, D // 2, inside, ADD_V
            )
            _store(value, (place * groups + group) * D + d, low, high, D // 2, inside)
