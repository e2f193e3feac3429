"""Triton: one pass that prepares k and v, and attention that prepares q as it loads it.

K is rotated once, in a pass of its own: inside the attention every block of queries would rotate it
again. The rotation pairs the halves of a head, so q and k are held as two halves and a score is
the sum of two products. Head dims are padded to powers of two in registers, never in memory.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from collavo_kernels._backends import device_of
from collavo_kernels._flags import KEY_RANGE_INVERTED, ROW_INDEX_OUT_OF_RANGE, error_word
from collavo_kernels.ops.crayon_attention.inputs import AttentionInputs, ForwardResult

_BAD_ROW = tl.constexpr(ROW_INDEX_OUT_OF_RANGE)
_BAD_RANGE = tl.constexpr(KEY_RANGE_INVERTED)
_LARGEST_HEAD_DIM = 256
_LARGEST_GRID = 65535  # a launch's second dimension


@triton.jit
def _checked_rows(row_index, offsets, mask, rows, flags):
    """Load row indices; one outside the tables counts as -1 and is flagged."""
    row = tl.load(row_index + offsets, mask=mask, other=-1)
    bad = (row < -1) | (row >= rows)
    if tl.max(bad.to(tl.int32), 0) > 0:
        tl.atomic_or(flags, _BAD_ROW)
    return tl.where(bad, -1, row)


@triton.jit
def _rotated(x, stride, table, row, cos, sin, angle, d, half, inside, ROW_STRIDE, ADD):
    """Load a block of tokens' low and high halves, add the table rows, rotate; float32 pairs.

    x, table: at this head; stride: between tokens (already multiplied by the token: a column).
    """
    low = tl.load(x + stride + d, mask=inside, other=0.0).to(tl.float32)
    high = tl.load(x + stride + half + d, mask=inside, other=0.0).to(tl.float32)
    if ADD:
        used = inside & (row[:, None] >= 0)
        at = row[:, None].to(tl.int64) * ROW_STRIDE + d
        low += tl.load(table + at, mask=used, other=0.0).to(tl.float32)
        high += tl.load(table + at + half, mask=used, other=0.0).to(tl.float32)
    cos_low = tl.load(cos + angle + d, mask=inside, other=0.0).to(tl.float32)
    cos_high = tl.load(cos + angle + half + d, mask=inside, other=0.0).to(tl.float32)
    sin_low = tl.load(sin + angle + d, mask=inside, other=0.0).to(tl.float32)
    sin_high = tl.load(sin + angle + half + d, mask=inside, other=0.0).to(tl.float32)
    return low * cos_low - high * sin_low, high * cos_high + low * sin_high


@triton.jit
def prepare_kernel(
    k,
    v,
    cos,
    sin,
    table_k,
    table_v,
    row_index,
    key,
    value,
    flags,
    k_batch,
    k_token,
    k_head,
    v_batch,
    v_token,
    v_head,
    angle_batch,
    length,
    groups,
    rows,
    D: tl.constexpr,
    HALF: tl.constexpr,
    BLOCK: tl.constexpr,
    ADD_K: tl.constexpr,
    ADD_V: tl.constexpr,
    HAS_ROWS: tl.constexpr,
):
    """Write ``R (k + table_k[row])`` and ``v + table_v[row]`` for a block of tokens, one head."""
    batch = (tl.program_id(1) // groups).to(tl.int64)
    group = tl.program_id(1) % groups
    token = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    d = tl.arange(0, HALF)[None, :]
    inside = (token < length)[:, None] & (d < D // 2)
    row = tl.full((BLOCK,), -1, tl.int32)
    if HAS_ROWS:
        row = _checked_rows(row_index, batch * length + token, token < length, rows, flags)
    column = token[:, None].to(tl.int64)
    low, high = _rotated(
        k + batch * k_batch + group * k_head,
        column * k_token,
        table_k + group * D,
        row,
        cos,
        sin,
        batch * angle_batch + column * D,
        d,
        D // 2,
        inside,
        groups * D,
        ADD_K,
    )
    out = ((batch * length + column) * groups + group) * D + d
    tl.store(key + out, low.to(key.dtype.element_ty), mask=inside)
    tl.store(key + out + D // 2, high.to(key.dtype.element_ty), mask=inside)
    if ADD_V:
        used = inside & (row[:, None] >= 0)
        for part in tl.static_range(2):
            shift = part * (D // 2)
            x = v + batch * v_batch + group * v_head + column * v_token + shift
            y = tl.load(x + d, mask=inside, other=0.0).to(tl.float32)
            at = (row[:, None].to(tl.int64) * groups + group) * D + shift + d
            y += tl.load(table_v + at, mask=used, other=0.0).to(tl.float32)
            tl.store(value + out + shift, y.to(value.dtype.element_ty), mask=inside)


@triton.jit
def _valid_keys(key_range, batch, length, flags):
    """Load a key range; one that is inverted or leaves the sequence is clipped and flagged."""
    first = tl.load(key_range + 2 * batch)
    end = tl.load(key_range + 2 * batch + 1)
    if (first < 0) | (end > length) | (first > end):
        tl.atomic_or(flags, _BAD_RANGE)
    return tl.maximum(first, 0), tl.minimum(end, length)


@triton.jit
def attend_kernel(
    q,
    cos,
    sin,
    table_q,
    row_index,
    key,
    value,
    key_range,
    out,
    lse,
    flags,
    q_batch,
    q_token,
    q_head,
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
    WHOLE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    ADD_Q: tl.constexpr,
    HAS_RANGE: tl.constexpr,
    CAUSAL: tl.constexpr,
    WINDOW: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Attend a block of queries of one head: add, rotate, running softmax over blocks of keys."""
    start = (tl.num_programs(0) - 1 - tl.program_id(0)) * BLOCK_M
    batch = (tl.program_id(1) // heads).to(tl.int64)
    head = tl.program_id(1) % heads
    group = head // (heads // groups)
    first, end = 0, length
    if HAS_RANGE:
        first, end = _valid_keys(key_range, batch, length, flags)
    i = start + tl.arange(0, BLOCK_M)
    half = tl.arange(0, HALF)
    live = (i >= first) & (i < end)
    inside = live[:, None] & (half < D // 2)[None, :]
    row = tl.full((BLOCK_M,), -1, tl.int32)
    if ADD_Q:
        row = _checked_rows(row_index, batch * length + i, i < length, rows, flags)
    column = i[:, None].to(tl.int64)
    q_low, q_high = _rotated(
        q + batch * q_batch + head * q_head,
        column * q_token,
        table_q + head * D,
        row,
        cos,
        sin,
        batch * angle_batch + column * D,
        half[None, :],
        D // 2,
        inside,
        heads * D,
        ADD_Q,
    )
    q_low, q_high = q_low.to(key.dtype.element_ty), q_high.to(key.dtype.element_ty)

    low, high = first, end
    if CAUSAL:
        high = tl.minimum(high, start + BLOCK_M)
    if WINDOW:
        low = tl.maximum(low, start - window + 1)
        if not CAUSAL:
            high = tl.minimum(high, start + BLOCK_M + window - 1)
    whole = tl.arange(0, WHOLE)
    top = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    mixed = tl.zeros((BLOCK_M, WHOLE), tl.float32)
    for n in range((low // BLOCK_N) * BLOCK_N, high, BLOCK_N):
        j = n + tl.arange(0, BLOCK_N)
        seen = (j >= first) & (j < end)
        at = ((batch * length + j[None, :]) * groups + group) * D + half[:, None]
        present = seen[None, :] & (half < D // 2)[:, None]
        k_low = tl.load(key + at, mask=present, other=0.0)
        k_high = tl.load(key + at + D // 2, mask=present, other=0.0)
        scores = tl.dot(q_low, k_low, input_precision=PRECISION)
        scores += tl.dot(q_high, k_high, input_precision=PRECISION)
        visible = live[:, None] & seen[None, :]
        if CAUSAL:
            visible &= j[None, :] <= i[:, None]
        if WINDOW:
            apart = i[:, None] - j[None, :]
            visible &= (apart < window) & (-apart < window)
        scores = tl.where(visible, scores * scale_log2, float("-inf"))
        higher = tl.maximum(top, tl.max(scores, 1))
        safe = tl.where(higher == float("-inf"), 0.0, higher)
        weights = tl.exp2(scores - safe[:, None])
        shrink = tl.exp2(top - safe)
        total = total * shrink + tl.sum(weights, 1)
        at = batch * v_batch + j[:, None].to(tl.int64) * v_token + group * v_head + whole[None, :]
        present = seen[:, None] & (whole < D)[None, :]
        values = tl.load(value + at, mask=present, other=0.0)
        mixed = mixed * shrink[:, None]
        mixed = tl.dot(weights.to(values.dtype), values, mixed, input_precision=PRECISION)
        top = higher

    alive = total > 0
    divisor = tl.where(alive, total, 1.0)
    at = ((batch * length + column) * heads + head) * D + whole[None, :]
    stored = (i < length)[:, None] & (whole < D)[None, :]
    tl.store(out + at, (mixed / divisor[:, None]).to(out.dtype.element_ty), mask=stored)
    log_sum = tl.where(alive, (top + tl.log2(divisor)) * 0.6931471805599453, float("-inf"))
    tl.store(lse + (batch * heads + head) * length + i, log_sum, mask=i < length)


def declines(inputs: AttentionInputs) -> str | None:
    """Say why these inputs are not taken, or None."""
    if inputs.cos is None:
        return "rotates q and k; without cos and sin the reference serves"
    if inputs.q.dtype == torch.float64:
        return "takes float32, bfloat16 and float16; float64 is the reference's"
    if inputs.q.shape[-1] > _LARGEST_HEAD_DIM:
        return f"takes head dims up to {_LARGEST_HEAD_DIM}"
    if inputs.q.shape[0] * inputs.q.shape[2] > _LARGEST_GRID:
        return f"takes up to {_LARGEST_GRID} heads of all samples together"
    return None


def forward(inputs: AttentionInputs) -> ForwardResult:
    """Prepare key and value in one launch, attend in a second."""
    q, k, v = (_dense(x) for x in inputs[:3])
    cos, sin = inputs.cos.contiguous(), inputs.sin.contiguous()
    rows = None if inputs.row_index is None else inputs.row_index.contiguous()
    inputs = inputs._replace(q=q, k=k, v=v, cos=cos, sin=sin, row_index=rows)
    batch, length, heads, _ = q.shape
    out, key = torch.empty_like(q, memory_format=torch.contiguous_format), _like(k)
    value = v.new_empty(0) if inputs.crayon_v is None else _like(v)
    lse = q.new_empty((batch, heads, length), dtype=torch.float32)
    if q.numel():
        with device_of(q):
            _launch_prepare(inputs, key, value)
            used = v if inputs.crayon_v is None else value
            _launch_attend(inputs, key, used, out, lse)
    return ForwardResult(out, key, value, lse)


def tuning(size: int, bytes_per_element: int) -> dict[str, int]:
    """Return block sizes and launch options of ``attend_kernel`` for a head dim and element size.

    Every choice compiles without register spills and within the shared memory of all targets.
    """
    if bytes_per_element == 4:
        blocks = (32, 32, 4, 1) if size <= 64 else (16, 32, 8, 1)
    elif size <= 64:
        blocks = (128, 64, 8, 2)
    elif size <= 128:
        blocks = (128, 32, 8, 2)
    else:
        blocks = (64, 32, 8, 2)
    names = ("BLOCK_M", "BLOCK_N", "num_warps", "num_stages")
    return dict(zip(names, blocks, strict=True))


def prepare_block(size: int) -> int:
    """Return how many tokens a block of ``prepare_kernel`` takes, so that no register spills."""
    return 32 if size <= 128 else 16


def padded(size: int) -> dict[str, int]:
    """Return the head dim's constants: D, its half and itself padded to what a product takes."""
    half, whole = triton.next_power_of_2(size // 2), triton.next_power_of_2(size)
    return {"D": size, "HALF": max(16, half), "WHOLE": max(16, whole)}


def _launch_prepare(inputs: AttentionInputs, key: Tensor, value: Tensor) -> None:
    k, v = inputs.k, inputs.v
    batch, length, groups, size = k.shape
    used = _has_rows(inputs)
    options = padded(size)
    options.pop("WHOLE")
    block = prepare_block(size)
    prepare_kernel[(triton.cdiv(length, block), batch * groups)](
        k,
        v,
        inputs.cos,
        inputs.sin,
        _or(inputs.crayon_k, k),
        _or(inputs.crayon_v, k),
        _or(inputs.row_index, k),
        key,
        value,
        error_word(k.device),
        *k.stride()[:3],
        *v.stride()[:3],
        _angle_stride(inputs.cos),
        length,
        groups,
        _row_count(inputs),
        **options,
        BLOCK=block,
        ADD_K=used and inputs.crayon_k is not None,
        ADD_V=inputs.crayon_v is not None,
        HAS_ROWS=used,
    )


def _launch_attend(
    inputs: AttentionInputs, key: Tensor, value: Tensor, out: Tensor, lse: Tensor
) -> None:
    q = inputs.q
    batch, length, heads, size = q.shape
    options: dict[str, Any] = tuning(size, q.element_size())
    attend_kernel[(triton.cdiv(length, options["BLOCK_M"]), batch * heads)](
        q,
        inputs.cos,
        inputs.sin,
        _or(inputs.crayon_q, q),
        _or(inputs.row_index, q),
        key,
        value,
        q if inputs.key_range is None else inputs.key_range.contiguous(),
        out,
        lse,
        error_word(q.device),
        *q.stride()[:3],
        *value.stride()[:3],
        _angle_stride(inputs.cos),
        length,
        heads,
        key.shape[2],
        _row_count(inputs),
        inputs.window or 0,
        inputs.softmax_scale * 1.4426950408889634,
        **padded(size),
        **options,
        ADD_Q=_has_rows(inputs) and inputs.crayon_q is not None,
        HAS_RANGE=inputs.key_range is not None,
        CAUSAL=inputs.causal,
        WINDOW=inputs.window is not None,
        PRECISION="ieee" if q.dtype == torch.float32 else "tf32",
    )


def _row_count(inputs: AttentionInputs) -> int:
    tables = (inputs.crayon_q, inputs.crayon_k, inputs.crayon_v)
    return next((t.shape[0] for t in tables if t is not None), 0)


def _has_rows(inputs: AttentionInputs) -> bool:
    tables = (inputs.crayon_q, inputs.crayon_k, inputs.crayon_v)
    return inputs.row_index is not None and any(t is not None for t in tables)


def _or(x: Tensor | None, instead: Tensor) -> Tensor:
    """Return x contiguous, or another tensor's address where the kernel will not look."""
    return instead if x is None else x.contiguous()


def _dense(x: Tensor) -> Tensor:
    """Return x as the kernels read it: its last dimension dense, a head's offset within int32."""
    fits = x.stride(-1) == 1 and x.shape[2] * abs(x.stride(2)) < 2**31
    return x if fits else x.contiguous()


def _like(x: Tensor) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _angle_stride(cos: Tensor) -> int:
    return 0 if cos.shape[0] == 1 else cos.stride(0)
