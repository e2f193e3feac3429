"""The operator in C++: preparation and attention in one call, the backward in another."""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from collavo_kernels._native import DTYPE_CODES, native, native_reason
from collavo_kernels.ops.crayon_attention.inputs import (
    AttentionInputs,
    AttentionOutputGrads,
    AttentionResult,
    AttentionSaved,
    Gradients,
    Wanted,
)
from collavo_kernels.ops.crayon_attention.reference import checked_ranges, checked_rows

_BEST_ISA = -1
# Address, and strides of samples, tokens and heads in elements.
_Heads = tuple[int, int, int, int]
_ABSENT: _Heads = (0, 0, 0, 0)

unavailable = native_reason


def declines(inputs: AttentionInputs) -> str | None:
    """Say why these inputs are not taken, or None."""
    if inputs.q.dtype not in DTYPE_CODES:
        return "takes float32, bfloat16 and float16; float64 is the reference's"
    largest = int(_module().crayon_attention_largest_head_dim)
    if inputs.q.shape[-1] > largest:
        return f"takes head dims up to {largest}"
    return None


class _Call(NamedTuple):
    """What the kernels want to know beside q, k and v, and the tensors its addresses are of."""

    problem: tuple[Any, ...]
    cos: Tensor | None
    sin: Tensor | None
    rows: Tensor | None
    ranges: Tensor | None


def forward(inputs: AttentionInputs) -> AttentionResult:
    """Prepare keys and values in one pass, then attend panel by panel."""
    q, k, v = (_dense(x) for x in (inputs.q, inputs.k, inputs.v))
    batch, length, heads, _ = q.shape
    result = AttentionResult(
        torch.empty(q.shape, dtype=q.dtype),
        torch.empty(k.shape if inputs.changes_key else 0, dtype=k.dtype),
        torch.empty(v.shape if inputs.changes_value else 0, dtype=v.dtype),
        torch.empty((batch, heads, length), dtype=torch.float32),
    )
    tables = [None if t is None else t.contiguous() for t in inputs.tables]
    states = [
        *(_heads(x) for x in (q, k, v)),
        _heads(result.key if inputs.changes_key else None),
        _heads(result.value if inputs.changes_value else None),
        _heads(result.out),
    ]
    others = [*(_address(t) for t in tables), result.lse.data_ptr()]
    if q.numel():
        _run(_module().crayon_attention_forward, _call(inputs), states, others)
    return result


def backward(
    inputs: AttentionInputs, saved: AttentionSaved, grads: AttentionOutputGrads, wanted: Wanted
) -> Gradients:
    """Recompute the weights panel by panel; every sum is made in an order of its own."""
    q, key, value, out, grad_out = (
        _dense(x) for x in (inputs.q, saved.key, saved.value, saved.out, grads.out)
    )
    grad_key, grad_value = (None if x is None else _dense(x) for x in (grads.key, grads.value))
    found = Gradients(
        *(
            torch.empty(leaf.shape, dtype=q.dtype) if want and leaf is not None else None
            for leaf, want in zip((q, key, value, *inputs.tables), wanted, strict=True)
        )
    )
    tables = (found.crayon_q, found.crayon_k, found.crayon_v)
    if not q.numel():
        for x in tables:
            if x is not None:
                x.zero_()
        return found
    if not any(x is not None for x in found):
        return found
    states = [
        _heads(x)
        for x in (q, key, value, out, grad_out, grad_key, grad_value, found.q, found.k, found.v)
    ]
    call = _call(inputs)
    summed = any(x is not None for x in tables)
    slots, count = _slots(inputs, call.rows) if summed else (None, 0)
    table = None if inputs.crayon_q is None else inputs.crayon_q.contiguous()
    lse = saved.lse.contiguous()
    others = [*(_address(x) for x in (table, lse, *tables, slots)), count]
    _run(_module().crayon_attention_backward, call, states, others)
    return found


def _run(kernel: Any, call: _Call, states: Sequence[_Heads], others: Sequence[int]) -> None:
    """Ask the kernel how much scratch it needs, take that from torch, and run it."""
    threads = _module().num_threads()
    need = kernel(_BEST_ISA, threads, 0, call.problem, states, others)
    scratch = torch.empty(need, dtype=torch.uint8)
    kernel(_BEST_ISA, threads, scratch.data_ptr(), call.problem, states, others)


def _call(inputs: AttentionInputs) -> _Call:
    """Check the values of row index and key range, and put the arguments together.

    Raises:
        ValueError: if a row index or a key range is out of range.
    """
    batch, length, heads, head_dim = inputs.q.shape
    cos, sin = (None if x is None else x.float().contiguous() for x in (inputs.cos, inputs.sin))
    rows, ranges = _rows(inputs), _ranges(inputs)
    shared = cos is None or cos.shape[0] == 1
    kv_heads, count = inputs.k.shape[2], inputs.table_rows or 0
    sizes = (DTYPE_CODES[inputs.q.dtype], batch, length, heads, kv_heads, head_dim, count)
    angles = (_address(cos), _address(sin), 0 if shared else length * head_dim)
    tokens = (*angles, _address(rows), _address(ranges))
    # As far as the sequence is long, and no overflow where a window is longer.
    window = length if inputs.window is None else min(inputs.window, length)
    problem = (sizes, tokens, inputs.causal, window, inputs.softmax_scale)
    return _Call(problem, cos, sin, rows, ranges)


def _module() -> ModuleType:
    module = native()
    if module is None:
        raise RuntimeError(f"crayon_attention: {native_reason()}")
    return module


def _rows(inputs: AttentionInputs) -> Tensor | None:
    """Return the row index, contiguous and with every entry within the tables."""
    count = inputs.table_rows
    if inputs.row_index is None or count is None:
        return None
    rows = inputs.row_index.contiguous()
    if _module().crayon_attention_first_bad_row(rows.data_ptr(), rows.numel(), count) >= 0:
        checked_rows(inputs)
    return rows


def _slots(inputs: AttentionInputs, rows: Tensor | None) -> tuple[Tensor | None, int]:
    """Return int32 ``[B, T]`` that numbers the pairs of a sample and a row in use, and how many."""
    if rows is None or inputs.table_rows is None:
        return None, 0
    batch, length = rows.shape
    slots = torch.empty((batch, inputs.table_rows), dtype=torch.int32)
    used = _module().crayon_attention_number_slots(
        rows.data_ptr(), batch, length, inputs.table_rows, slots.data_ptr()
    )
    return slots, int(used)


def _ranges(inputs: AttentionInputs) -> Tensor | None:
    """Return the key ranges, contiguous and within the sequence."""
    if inputs.key_range is None:
        return None
    ranges = inputs.key_range.contiguous()
    batch, length = inputs.q.shape[:2]
    if _module().crayon_attention_first_bad_range(ranges.data_ptr(), batch, length) >= 0:
        checked_ranges(inputs)
    return ranges


def _dense(x: Tensor) -> Tensor:
    """Return x with its last dimension contiguous, copied only if it is not."""
    return x if x.stride(-1) == 1 else x.contiguous()


def _heads(x: Tensor | None) -> _Heads:
    if x is None:
        return _ABSENT
    batch, token, head, _ = x.stride()
    return x.data_ptr(), batch, token, head


def _address(x: Tensor | None) -> int:
    return 0 if x is None else x.data_ptr()
