"""The operator in C++: preparation and attention in one call, the backward in another."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from collavo_kernels._native import BEST_ISA, DTYPE_CODES, native_of, native_reason, scratch
from collavo_kernels.ops.crayon_attention.inputs import (
    AttentionInputs,
    AttentionOutputGrads,
    AttentionResult,
    AttentionSaved,
    Gradients,
    Wanted,
)
from collavo_kernels.ops.crayon_attention.reference import checked_ranges, checked_rows

NAME = "crayon_attention"

unavailable = native_reason


def declines(inputs: AttentionInputs) -> str | None:
    """Say why these inputs are not taken, or None."""
    if inputs.q.dtype not in DTYPE_CODES:
        return "takes float32, bfloat16 and float16; float64 is the reference's"
    largest = int(native_of(NAME).crayon_attention_largest_head_dim)
    if inputs.q.shape[-1] > largest:
        return f"takes head dims up to {largest}"
    return None


def forward(inputs: AttentionInputs) -> AttentionResult:
    """Prepare keys and values in one pass, then attend block by block."""
    q, k, v = (_dense(x) for x in (inputs.q, inputs.k, inputs.v))
    batch, length, heads, _ = q.shape
    result = AttentionResult(
        torch.empty(q.shape, dtype=q.dtype),
        torch.empty(k.shape if inputs.changes_key else 0, dtype=k.dtype),
        torch.empty(v.shape if inputs.changes_value else 0, dtype=v.dtype),
        torch.empty((batch, heads, length), dtype=torch.float32),
    )
    if q.numel():
        native_of(NAME).crayon_attention_forward(
            isa=BEST_ISA,
            allocate=scratch,
            problem=_problem(inputs),
            q=q,
            k=k,
            v=v,
            crayon_q=_contiguous(inputs.crayon_q),
            crayon_k=_contiguous(inputs.crayon_k),
            crayon_v=_contiguous(inputs.crayon_v),
            key=result.key if inputs.changes_key else None,
            value=result.value if inputs.changes_value else None,
            out=result.out,
            lse=result.lse,
        )
    return result


def backward(
    inputs: AttentionInputs, saved: AttentionSaved, grads: AttentionOutputGrads, wanted: Wanted
) -> Gradients:
    """Recompute the weights block by block; every sum is made in an order of its own."""
    q, key, value = (_dense(x) for x in (inputs.q, saved.key, saved.value))
    found = Gradients(
        *(
            torch.empty(leaf.shape, dtype=q.dtype) if want and leaf is not None else None
            for leaf, want in zip((q, key, value, *inputs.tables), wanted, strict=True)
        )
    )
    tables = [x for x in (found.crayon_q, found.crayon_k, found.crayon_v) if x is not None]
    if not q.numel():
        for x in tables:
            x.zero_()
        return found
    if not any(x is not None for x in found):
        return found
    problem = _problem(inputs)
    slots, slot_count = _slots(inputs, problem["row_index"]) if tables else (None, 0)
    native_of(NAME).crayon_attention_backward(
        isa=BEST_ISA,
        allocate=scratch,
        problem=problem,
        q=q,
        key=key,
        value=value,
        crayon_q=_contiguous(inputs.crayon_q),
        out=_dense(saved.out),
        grad_out=_dense(grads.out),
        grad_key=None if grads.key is None else _dense(grads.key),
        grad_value=None if grads.value is None else _dense(grads.value),
        lse=saved.lse.contiguous(),
        grad_q=found.q,
        grad_k=found.k,
        grad_v=found.v,
        grad_crayon_q=found.crayon_q,
        grad_crayon_k=found.crayon_k,
        grad_crayon_v=found.crayon_v,
        slots=slots,
        slot_count=slot_count,
    )
    return found


def _problem(inputs: AttentionInputs) -> dict[str, Any]:
    """Return what forward and backward share, row index and key ranges checked.

    Raises:
        ValueError: if a row index or a key range is out of range.
    """
    batch, length, q_heads, head_dim = inputs.q.shape
    cos, sin = (None if x is None else x.float().contiguous() for x in (inputs.cos, inputs.sin))
    shared = cos is None or cos.shape[0] == 1
    return {
        "dtype": DTYPE_CODES[inputs.q.dtype],
        "batch": batch,
        "length": length,
        "q_heads": q_heads,
        "kv_heads": inputs.k.shape[2],
        "head_dim": head_dim,
        "table_rows": inputs.table_rows or 0,
        "cos": cos,
        "sin": sin,
        "angle_batch_stride": 0 if shared else length * head_dim,
        "row_index": _rows(inputs),
        "key_range": _ranges(inputs),
        "causal": inputs.causal,
        # As far as the sequence is long, and no overflow where a window is longer.
        "window": length if inputs.window is None else min(inputs.window, length),
        "softmax_scale": inputs.softmax_scale,
    }


def _rows(inputs: AttentionInputs) -> Tensor | None:
    """Return the row index, contiguous and with every entry within the tables."""
    count = inputs.table_rows
    if inputs.row_index is None or count is None:
        return None
    rows = inputs.row_index.contiguous()
    bad = native_of(NAME).crayon_attention_first_bad_row(
        row_index=rows, count=rows.numel(), table_rows=count
    )
    if bad >= 0:
        checked_rows(inputs)
    return rows


def _slots(inputs: AttentionInputs, rows: Tensor | None) -> tuple[Tensor | None, int]:
    """Return int32 ``[B, T]`` that numbers the pairs of a sample and a row in use, and how many."""
    if rows is None or inputs.table_rows is None:
        return None, 0
    batch, length = rows.shape
    slots = torch.empty((batch, inputs.table_rows), dtype=torch.int32)
    used = native_of(NAME).crayon_attention_number_slots(
        row_index=rows, batch=batch, length=length, table_rows=inputs.table_rows, slots=slots
    )
    return slots, int(used)


def _ranges(inputs: AttentionInputs) -> Tensor | None:
    """Return the key ranges, contiguous and within the sequence."""
    if inputs.key_range is None:
        return None
    ranges = inputs.key_range.contiguous()
    batch, length = inputs.q.shape[:2]
    bad = native_of(NAME).crayon_attention_first_bad_range(
        key_range=ranges, batch=batch, length=length
    )
    if bad >= 0:
        checked_ranges(inputs)
    return ranges


def _dense(x: Tensor) -> Tensor:
    """Return x with its last dimension contiguous, copied only if it is not."""
    return x if x.stride(-1) == 1 else x.contiguous()


def _contiguous(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.contiguous()
