"""The specification of ``crayon_attention`` in plain PyTorch: forward and hand-written backward.

Sums are made in float32 (float64 for float64 inputs). The prepared q, k and v are rounded to their
dtype once, after the rotation, as the key/value cache stores them. Queries are taken in blocks, so
that no tensor of S x S elements per head ever exists.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from collavo_kernels._flags import KEY_RANGE_INVERTED, error_word
from collavo_kernels._rows import add_rows, checked_index, sum_rows
from collavo_kernels.ops.crayon_attention.inputs import (
    AttentionInputs,
    AttentionOutputGrads,
    AttentionResult,
    AttentionSaved,
    Gradients,
    Wanted,
)

# Scores held at a time: 64 MiB in float32.
_SCORES_PER_BLOCK = 1 << 24


def forward(inputs: AttentionInputs) -> AttentionResult:
    """Prepare q, k and v, attend, and return the forward's results."""
    rows = checked_rows(inputs)
    ranges = checked_ranges(inputs)
    query = prepared(inputs.q, inputs.crayon_q, rows, inputs.cos, inputs.sin)
    key = prepared(inputs.k, inputs.crayon_k, rows, inputs.cos, inputs.sin)
    value = with_rows(inputs.v, inputs.crayon_v, rows)
    out, lse = _attend(query, key, value, ranges, inputs)
    empty = inputs.v.new_empty(0)
    return AttentionResult(
        out,
        _owned(key, inputs.k) if inputs.changes_key else empty,
        _owned(value, inputs.v) if inputs.changes_value else empty.clone(),
        lse,
    )


def backward(
    inputs: AttentionInputs, saved: AttentionSaved, grads: AttentionOutputGrads, wanted: Wanted
) -> Gradients:
    """Return the gradients of q, k, v and the three tables; None where one is not wanted."""
    rows = checked_rows(inputs)
    ranges = checked_ranges(inputs)
    query = prepared(inputs.q, inputs.crayon_q, rows, inputs.cos, inputs.sin)
    d_query, d_key, d_value = _attend_backward(query, inputs, saved, grads.out, ranges)
    if grads.key is not None:
        d_key += grads.key
    if grads.value is not None:
        d_value += grads.value
    d_q = unrotate(d_query, inputs.cos, inputs.sin)
    d_k = unrotate(d_key, inputs.cos, inputs.sin)

    def rounded(dense: Tensor, want: bool) -> Tensor | None:
        return dense.to(inputs.q.dtype).contiguous() if want else None

    def summed(dense: Tensor, table: Tensor | None, want: bool) -> Tensor | None:
        if not want or table is None:
            return None
        if rows is None:
            return torch.zeros_like(table, memory_format=torch.contiguous_format)
        return sum_rows(dense, rows, table.shape[0]).to(table.dtype)

    return Gradients(
        q=rounded(d_q, wanted.q),
        k=rounded(d_k, wanted.k),
        v=rounded(d_value, wanted.v),
        crayon_q=summed(d_q, inputs.crayon_q, wanted.crayon_q),
        crayon_k=summed(d_k, inputs.crayon_k, wanted.crayon_k),
        crayon_v=summed(d_value, inputs.crayon_v, wanted.crayon_v),
    )


def prepared(
    x: Tensor,
    table: Tensor | None,
    rows: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
) -> Tensor:
    """Add each token's table row, rotate, and round to x's dtype once.

    Args:
        x: ``[B, S, N, D]``.
        table: ``[T, N, D]`` or None.
        rows: ``[B, S]``, -1 = no row.
        cos: ``[B or 1, S, D]``, or None: no rotation.
        sin: ``[B or 1, S, D]``, or None beside it.
    """
    if cos is None or sin is None:
        return with_rows(x, table, rows)
    y = x.to(_compute_dtype(x))
    if table is not None and rows is not None:
        y = add_rows(y, table, rows)
    c, s = cos.to(y.dtype).unsqueeze(2), sin.to(y.dtype).unsqueeze(2)
    low, high = y.chunk(2, dim=-1)
    return (y * c + torch.cat((-high, low), dim=-1) * s).to(x.dtype)


def with_rows(x: Tensor, table: Tensor | None, rows: Tensor | None) -> Tensor:
    """Add each token's table row to ``[B, S, N, D]``, rounding once; x itself without a table."""
    if table is None or rows is None:
        return x
    return add_rows(x.to(_compute_dtype(x)), table, rows).to(x.dtype)


def unrotate(y: Tensor, cos: Tensor | None, sin: Tensor | None) -> Tensor:
    """Apply the rotation's transpose to ``[B, S, N, D]``: what a gradient goes through."""
    if cos is None or sin is None:
        return y
    c, s = cos.to(y.dtype).unsqueeze(2), sin.to(y.dtype).unsqueeze(2)
    low, high = (y * s).chunk(2, dim=-1)
    return y * c + torch.cat((high, -low), dim=-1)


def checked_rows(inputs: AttentionInputs) -> Tensor | None:
    """Return the row index with no entry outside the tables, or None where no table is given.

    Raises:
        ValueError: on the CPU, naming the first bad entry; elsewhere a bad entry counts as -1 and
            is reported by ``collavo_kernels.check()``.
    """
    if inputs.row_index is None or inputs.table_rows is None:
        return None
    return checked_index(inputs.row_index, inputs.table_rows)


def checked_ranges(inputs: AttentionInputs) -> Tensor | None:
    """Return the key ranges with ``0 <= first <= end <= S`` everywhere, or None for all keys.

    Raises:
        ValueError: on the CPU, naming the first bad range; elsewhere a bad range is clipped (an
            inverted one is empty) and is reported by ``collavo_kernels.check()``.
    """
    ranges, length = inputs.key_range, inputs.q.shape[1]
    if ranges is None or ranges.numel() == 0:
        return ranges
    first, end = ranges[:, 0], ranges[:, 1]
    bad = (first < 0) | (end > length) | (first > end)
    if ranges.device.type != "cpu":
        error_word(ranges.device).bitwise_or_(bad.any().int() * KEY_RANGE_INVERTED)
        return ranges.clamp(0, length)
    if bool(bad.any()):
        sample = int(bad.nonzero()[0])
        raise ValueError(
            f"key_range: expected 0 <= first <= end <= {length}, got "
            f"[{int(first[sample])}, {int(end[sample])}] at sample {sample}"
        )
    return ranges


def _owned(x: Tensor, given: Tensor) -> Tensor:
    """Return x contiguous and never the tensor it was made from: no output aliases an input."""
    return x.clone(memory_format=torch.contiguous_format) if x is given else x.contiguous()


def _compute_dtype(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


class _Block(NamedTuple):
    """Queries ``[start, stop)`` and the keys ``[first, end)`` that any of them may see."""

    start: int
    stop: int
    first: int
    end: int


def _blocks(inputs: AttentionInputs) -> Iterator[_Block]:
    batch, length, heads, _ = inputs.q.shape
    size = max(32, min(512, _SCORES_PER_BLOCK // max(1, batch * heads * length)))
    for start in range(0, length, size):
        stop = min(start + size, length)
        first, end = 0, length
        if inputs.window is not None:
            first = max(0, start - inputs.window + 1)
            end = min(length, stop + inputs.window - 1)
        yield _Block(start, stop, first, stop if inputs.causal else end)


def _visible(block: _Block, ranges: Tensor | None, inputs: AttentionInputs) -> Tensor:
    """Return bool ``[B or 1, queries, keys]``: which keys of the block each query sees."""
    device = inputs.q.device
    i = torch.arange(block.start, block.stop, device=device)[:, None]
    j = torch.arange(block.first, block.end, device=device)[None, :]
    visible = (j <= i) if inputs.causal else torch.ones_like(i + j, dtype=torch.bool)
    if inputs.window is not None:
        visible = visible & ((i - j).abs() < inputs.window)
    if ranges is None:
        return visible[None]
    first, end = ranges[:, 0, None, None], ranges[:, 1, None, None]
    return visible & (i >= first) & (i < end) & (j >= first) & (j < end)


def _heads_first(x: Tensor, ranges: Tensor | None, kv_heads: int) -> Tensor:
    """Return ``[B, G, H / G, S, D]`` in the compute dtype, padding replaced by zeros."""
    batch, length, heads, head_dim = x.shape
    y = x.to(_compute_dtype(x))
    if ranges is not None:
        token = torch.arange(length, device=x.device)
        valid = (token >= ranges[:, :1]) & (token < ranges[:, 1:])
        y = y.masked_fill(~valid[:, :, None, None], 0)
    return y.transpose(1, 2).reshape(batch, kv_heads, heads // kv_heads, length, head_dim)


def _scores(
    query: Tensor, key: Tensor, block: _Block, visible: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """Return the block's queries ``[B, G, heads*queries, D]`` and its masked, scaled scores.

    Scores are ``[B, G, heads, queries, keys]``.
    """
    q = query[:, :, :, block.start : block.stop]
    flat = q.flatten(2, 3)
    scores = flat @ key[:, :, 0, block.first : block.end].mT * scale
    scores = scores.view(*q.shape[:4], -1)
    return flat, scores.masked_fill_(~visible[:, None, None], float("-inf"))


def _attend(
    query: Tensor, key: Tensor, value: Tensor, ranges: Tensor | None, inputs: AttentionInputs
) -> tuple[Tensor, Tensor]:
    """Return out ``[B, S, H, D]`` and the log-sum-exp ``[B, H, S]``."""
    batch, length, heads, head_dim = query.shape
    kv_heads = key.shape[2]
    q, k, v = (_heads_first(x, ranges, kv_heads) for x in (query, key, value))
    out, lse = torch.zeros_like(q), q.new_full(q.shape[:-1], float("-inf"))
    for block in _blocks(inputs) if q.numel() else ():
        visible = _visible(block, ranges, inputs)
        _, scores = _scores(q, k, block, visible, inputs.softmax_scale)
        log_sum = scores.logsumexp(-1)
        weights = _weights(scores, log_sum)
        mixed = weights.flatten(2, 3) @ v[:, :, 0, block.first : block.end]
        out[:, :, :, block.start : block.stop] = mixed.view(*weights.shape[:4], -1)
        lse[:, :, :, block.start : block.stop] = log_sum
    joined = out.reshape(batch, heads, length, head_dim).transpose(1, 2)
    return joined.to(query.dtype).contiguous(), lse.reshape(batch, heads, length)


def _weights(scores: Tensor, log_sum: Tensor) -> Tensor:
    """Return the softmax from the scores (overwritten); rows that see no key get zeros."""
    finite = log_sum.masked_fill(log_sum == float("-inf"), 0)
    return scores.sub_(finite.unsqueeze(-1)).exp_()


def _attend_backward(
    query: Tensor,
    inputs: AttentionInputs,
    saved: AttentionSaved,
    grad_out: Tensor,
    ranges: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of the prepared q, k and v, ``[B, S, heads, D]``, unrounded."""
    kv_heads, scale = saved.key.shape[2], inputs.softmax_scale
    operands = (query, saved.key, saved.value, grad_out)
    q, k, v, g = (_heads_first(x, ranges, kv_heads) for x in operands)
    o = _heads_first(saved.out, ranges, kv_heads)
    lse = saved.lse.reshape(q.shape[:-1])
    dq, dk, dv = torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)
    delta = (g * o).sum(-1, keepdim=True)
    for block in _blocks(inputs) if q.numel() else ():
        keys = slice(block.first, block.end)
        queries = slice(block.start, block.stop)
        visible = _visible(block, ranges, inputs)
        flat, scores = _scores(q, k, block, visible, scale)
        weights = _weights(scores, lse[:, :, :, queries])
        flat_g = g[:, :, :, queries].flatten(2, 3)
        d_scores = (flat_g @ v[:, :, 0, keys].mT).view_as(weights)
        d_scores = d_scores.sub_(delta[:, :, :, queries]).mul_(weights).mul_(scale).flatten(2, 3)
        dv[:, :, 0, keys] += weights.flatten(2, 3).mT @ flat_g
        dk[:, :, 0, keys] += d_scores.mT @ flat
        dq[:, :, :, queries] = (d_scores @ k[:, :, 0, keys]).view(*weights.shape[:4], -1)
    d_query, d_key, d_value = (x.flatten(1, 2).transpose(1, 2) for x in (dq, dk, dv))
    return d_query, d_key, d_value
