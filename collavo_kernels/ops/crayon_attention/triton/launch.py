"""The Triton backend for NVIDIA and AMD: launches of the forward and of the backward.

A forward is a launch that prepares k and v and one that attends: K is rotated once, since inside
the attention every block of queries would rotate it again. A backward prepares q and what it needs
of each query, then computes the gradients of keys and values, of queries, and of the tables' rows.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from collavo_kernels._backends import device_of, triton_reason
from collavo_kernels._flags import error_word
from collavo_kernels._gpu import kind_of
from collavo_kernels._rows_triton import sum_rows
from collavo_kernels._triton import constants
from collavo_kernels.ops.crayon_attention.inputs import (
    LARGEST_HEAD_DIM,
    AttentionInputs,
    AttentionOutputGrads,
    AttentionResult,
    AttentionSaved,
    Gradients,
    Wanted,
)
from collavo_kernels.ops.crayon_attention.triton import tiles
from collavo_kernels.ops.crayon_attention.triton.backward import (
    key_gradients_kernel,
    sum_shares_kernel,
)
from collavo_kernels.ops.crayon_attention.triton.backward_query import query_gradients_kernel
from collavo_kernels.ops.crayon_attention.triton.forward import attend_kernel
from collavo_kernels.ops.crayon_attention.triton.parts import Angles, Heads
from collavo_kernels.ops.crayon_attention.triton.prepare import prepare_kernel

_LARGEST_GRID = 65535  # a launch's second dimension: heads while preparing, then blocks of tokens
_LOG2_E = math.log2(math.e)
_CONTIGUOUS = ("cos", "sin", "crayon_q", "crayon_k", "crayon_v", "row_index", "key_range")


class Prepared(NamedTuple):
    """What attention runs on.

    Attributes:
        query: ``[B, S, H, D]``: q with the crayon, rotated; q itself where neither is asked for, or
            where the pass was not to make it.
        key: ``[B, S, G, D]``: the same of k.
        value: ``[B, S, G, D]``: v with the crayon, or v itself.
    """

    query: Tensor
    key: Tensor
    value: Tensor


class Statistics(NamedTuple):
    """What the backward needs of each query, ``[B, H, S]`` float32.

    Attributes:
        shift: The log-sum-exp in base 2; infinity for a query that sees no key.
        delta: ``dOut . out``.
    """

    shift: Tensor
    delta: Tensor


unavailable = triton_reason


def declines(inputs: AttentionInputs) -> str | None:
    """Say why these inputs are not taken, or None."""
    if inputs.q.dtype == torch.float64:
        return "takes float32, bfloat16 and float16; float64 is the reference's"
    if inputs.q.shape[-1] > LARGEST_HEAD_DIM:
        return f"takes head dims up to {LARGEST_HEAD_DIM}"
    if inputs.q.shape[0] * (inputs.q.shape[2] + 2 * inputs.k.shape[2]) > _LARGEST_GRID:
        return f"takes up to {_LARGEST_GRID} heads of q, k and v of all samples together"
    if inputs.q.shape[1] > _LARGEST_GRID * tiles.SMALLEST_BLOCK:
        return f"takes up to {_LARGEST_GRID * tiles.SMALLEST_BLOCK} tokens"
    return None


def forward(inputs: AttentionInputs) -> AttentionResult:
    """Prepare key and value in one launch, attend in a second."""
    inputs = readable(inputs)
    q = inputs.q
    batch, length, heads, _ = q.shape
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    lse = q.new_empty((batch, heads, length), dtype=torch.float32)
    with device_of(q):
        ready = prepared(inputs, query=False)
        if q.numel():
            _launch_attend(inputs, ready, out, lse)
    return result(inputs, ready, out, lse)


def backward(
    inputs: AttentionInputs, saved: AttentionSaved, grads: AttentionOutputGrads, wanted: Wanted
) -> Gradients:
    """Return the gradients of q, k, v and the three tables; None where one is not wanted."""
    inputs = readable(inputs._replace(k=saved.key, v=saved.value))
    saved = saved._replace(key=inputs.k, value=inputs.v, out=saved.out.contiguous())
    grads = grads._replace(out=grads.out.contiguous())
    q = inputs.q
    dq, dk, dv = (_like(x) for x in (q, saved.key, saved.value))
    with device_of(q):
        if q.numel() and any(wanted):
            query, statistics = _prepared_backward(inputs, saved, grads)
            if wanted.k or wanted.v or wanted.crayon_k or wanted.crayon_v:
                _launch_key_gradients(inputs, saved, grads, query, statistics, dk, dv)
            if wanted.q or wanted.crayon_q:
                _launch_query_gradients(inputs, saved, grads, query, statistics, dq)
        return Gradients(
            q=dq if wanted.q else None,
            k=dk if wanted.k else None,
            v=dv if wanted.v else None,
            crayon_q=_table_gradient(inputs, inputs.crayon_q, dq) if wanted.crayon_q else None,
            crayon_k=_table_gradient(inputs, inputs.crayon_k, dk) if wanted.crayon_k else None,
            crayon_v=_table_gradient(inputs, inputs.crayon_v, dv) if wanted.crayon_v else None,
        )


def readable(inputs: AttentionInputs) -> AttentionInputs:
    """Return the inputs as the kernels read them: dense where strides are not passed on."""
    dense: dict[str, Any] = {name: _dense(getattr(inputs, name)) for name in ("q", "k", "v")}
    for name in _CONTIGUOUS:
        x = getattr(inputs, name)
        dense[name] = None if x is None else x.contiguous()
    window = inputs.window
    if window is not None and window >= inputs.q.shape[1]:
        window = None
    return inputs._replace(**dense, window=window)


def prepared(inputs: AttentionInputs, *, query: bool) -> Prepared:
    """Launch the preparation pass; without ``query`` it leaves q alone.

    Args:
        inputs: As ``readable`` returns them.
        query: Whether to prepare q too.
    """
    q, k, v = inputs[:3]
    query = query and (inputs.cos is not None or inputs.crayon_q is not None)
    ready = Prepared(
        _like(q) if query else q,
        _like(k) if inputs.changes_key else k,
        _like(v) if inputs.changes_value else v,
    )
    switches = {"Q": query, "K": inputs.changes_key, "V": inputs.changes_value}
    _launch_prepare(inputs, ready, switches)
    return ready


def result(inputs: AttentionInputs, ready: Prepared, out: Tensor, lse: Tensor) -> AttentionResult:
    """Return the forward's results; a key or value that did not change is left out."""
    empty = inputs.q.new_empty
    key = ready.key if inputs.changes_key else empty(0)
    return AttentionResult(out, key, ready.value if inputs.changes_value else empty(0), lse)


def _prepared_backward(
    inputs: AttentionInputs, saved: AttentionSaved, grads: AttentionOutputGrads
) -> tuple[Tensor, Statistics]:
    """Prepare q again, and the statistics, in one launch."""
    query = inputs.cos is not None or inputs.crayon_q is not None
    ready = Prepared(_like(inputs.q) if query else inputs.q.contiguous(), saved.key, saved.value)
    lse = saved.lse.contiguous()
    statistics = Statistics(torch.empty_like(lse), torch.empty_like(lse))
    switches = {"Q": query, "K": False, "V": False}
    _launch_prepare(inputs, ready, switches, (grads.out, saved.out, lse), statistics)
    return ready.query, statistics


def _launch_prepare(
    inputs: AttentionInputs,
    ready: Prepared,
    switches: dict[str, bool],
    results: tuple[Tensor, ...] = (),
    statistics: Statistics | None = None,
) -> None:
    q, k, v = inputs[:3]
    batch, length, heads, head_dim = q.shape
    kv_heads = k.shape[2]
    slots = heads if switches["Q"] or statistics is not None else 0
    slots += kv_heads * (switches["K"] + switches["V"])
    if not slots or not q.numel():
        return
    sizes = tiles.preparation(head_dim)
    grid = triton.cdiv(length, sizes["TOKENS"]), batch * triton.cdiv(slots, sizes["HEADS"])
    const = constants(
        **tiles.padded(head_dim),
        **sizes,
        **switches,
        STATISTICS=statistics is not None,
        ROTATE=inputs.cos is not None,
        ADD_Q=switches["Q"] and inputs.crayon_q is not None,
        ADD_K=switches["K"] and inputs.crayon_k is not None,
        ADD_V=switches["V"],
        HAS_RANGE=inputs.key_range is not None,
    )
    prepare_kernel[grid](
        *(_heads(x) for x in (q, k, v)),
        _angles(inputs),
        _or(q, *inputs.tables),
        *_or(q, inputs.row_index, inputs.key_range),
        *(results or (q, q, q)),
        ready,
        statistics or (q, q),
        error_word(q.device),
        length,
        heads,
        kv_heads,
        inputs.table_rows or 0,
        const,
    )


def _launch_attend(inputs: AttentionInputs, ready: Prepared, out: Tensor, lse: Tensor) -> None:
    q = inputs.q
    batch, length, heads, head_dim = q.shape
    plan = _plan(q).attend
    const = constants(
        **tiles.padded(head_dim),
        **plan.blocks,
        ADD_Q=inputs.crayon_q is not None,
        **_switches(inputs),
    )
    attend_kernel[(batch * heads, triton.cdiv(length, plan.queries))](
        *(_heads(x) for x in (q, ready.key, ready.value)),
        _angles(inputs),
        *_or(q, inputs.crayon_q, inputs.row_index, inputs.key_range),
        out,
        lse,
        error_word(q.device),
        length,
        heads,
        ready.key.shape[2],
        inputs.table_rows or 0,
        inputs.window or 0,
        inputs.softmax_scale * _LOG2_E,
        const,
        **plan.options,
    )


def _launch_key_gradients(
    inputs: AttentionInputs,
    saved: AttentionSaved,
    grads: AttentionOutputGrads,
    query: Tensor,
    statistics: Statistics,
    dk: Tensor,
    dv: Tensor,
) -> None:
    batch, length, kv_heads, head_dim = saved.key.shape
    plan, switches = _plan(query).key_gradients, _switches(inputs)
    blocks = triton.cdiv(length, plan.keys)
    members = inputs.q.shape[2] // kv_heads
    shares = tiles.shares_of(members, blocks * batch * kv_heads, query.device)
    parts: tuple[Tensor, ...] = (dk, dv)
    if shares > 1:
        parts = query.new_empty((2, shares, *dk.shape), dtype=torch.float32).unbind()
    extra = _or(query, grads.key, grads.value)
    angles, padded = _angles(inputs), tiles.padded(head_dim)
    added = {"ADD_KEY": grads.key is not None, "ADD_VALUE": grads.value is not None}
    key_gradients_kernel[(batch * kv_heads * shares, blocks)](
        query,
        _heads(saved.key),
        _heads(saved.value),
        grads.out,
        statistics,
        extra,
        angles,
        *_or(query, inputs.key_range),
        parts,
        *_common(inputs),
        shares,
        constants(**padded, **plan.blocks, **added, **switches, SHARED=shares > 1),
        **plan.options,
    )
    if shares > 1:
        tokens = tiles.preparation(head_dim)["TOKENS"]
        sum_shares_kernel[(triton.cdiv(length, tokens), batch * kv_heads)](
            parts,
            extra,
            angles,
            (dk, dv),
            length,
            kv_heads,
            shares,
            constants(**padded, **added, TOKENS=tokens, ROTATE=switches["ROTATE"]),
        )


def _launch_query_gradients(
    inputs: AttentionInputs,
    saved: AttentionSaved,
    grads: AttentionOutputGrads,
    query: Tensor,
    statistics: Statistics,
    dq: Tensor,
) -> None:
    batch, length, heads, head_dim = query.shape
    plan = _plan(query).query_gradients
    query_gradients_kernel[(batch * heads, triton.cdiv(length, plan.queries))](
        query,
        _heads(saved.key),
        _heads(saved.value),
        grads.out,
        statistics,
        _angles(inputs),
        *_or(query, inputs.key_range),
        dq,
        *_common(inputs),
        constants(**tiles.padded(head_dim), **plan.blocks, **_switches(inputs)),
        **plan.options,
    )


def _table_gradient(inputs: AttentionInputs, table: Tensor | None, dense: Tensor) -> Tensor | None:
    """Sum the stored gradient over the tokens of each row."""
    if table is None:
        return None
    out, rows = _like(table), inputs.row_index
    if rows is None or dense.numel() == 0 or out.numel() == 0:
        return out.zero_()
    sum_rows(dense.view(rows.numel(), -1), rows.view(-1), out.view(out.shape[0], -1))
    return out


def _common(inputs: AttentionInputs) -> tuple[Any, ...]:
    """Return the arguments from flags on that both kernels of gradients take."""
    scale = inputs.softmax_scale
    return (
        error_word(inputs.q.device),
        inputs.q.shape[1],
        inputs.q.shape[2],
        inputs.k.shape[2],
        inputs.window or 0,
        scale,
        scale * _LOG2_E,
    )


def _switches(inputs: AttentionInputs) -> dict[str, Any]:
    return {
        "ROTATE": inputs.cos is not None,
        "HAS_RANGE": inputs.key_range is not None,
        "CAUSAL": inputs.causal,
        "WINDOW": inputs.window is not None,
        "PRECISION": "ieee" if inputs.q.dtype == torch.float32 else "tf32",
    }


def _plan(x: Tensor) -> tiles.Plan:
    return tiles.plan_for(x.shape[-1], x.element_size(), kind_of(x.device))


def _heads(x: Tensor) -> Heads:
    return Heads(x, *x.stride()[:3])


def _angles(inputs: AttentionInputs) -> Angles:
    cos, sin = _or(inputs.q, inputs.cos, inputs.sin)
    stride = 0 if inputs.cos is None or cos.shape[0] == 1 else cos.stride(0)
    return Angles(cos, sin, stride)


def _or(instead: Tensor, *given: Tensor | None) -> tuple[Tensor, ...]:
    """Return tensors as they are, or another one's address where the kernel will not look."""
    return tuple(instead if x is None else x.contiguous() for x in given)


def _dense(x: Tensor) -> Tensor:
    """Return x as the kernels read it: last dimension dense, offsets of a block within int32."""
    _, token, head, last = (abs(n) for n in x.stride())
    reach = max(token * tiles.LARGEST_BLOCK, head * x.shape[2])
    return x if last == 1 and reach < 2**31 else x.contiguous()


def _like(x: Tensor) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)
