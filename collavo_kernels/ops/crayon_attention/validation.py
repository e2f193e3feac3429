"""Checks of the operator's arguments: made where the operator runs, so native code can trust them.

Values (row indices, key ranges) are checked by the backends, where that costs no host
synchronisation.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from collavo_kernels._schema import hints, is_optional
from collavo_kernels._validation import REFERENCE_DTYPES, describe, expect_int, expect_tensor
from collavo_kernels.ops.crayon_attention.inputs import (
    AttentionInputs,
    AttentionOutputGrads,
    AttentionSaved,
    Wanted,
    lse_dtype,
)

# Names of the tensors among the inputs, and whether each may be None.
_TENSORS = tuple(
    (name, is_optional(hint))
    for name, hint in hints(AttentionInputs).items()
    if hint in (Tensor, Tensor | None)
)


def expect_tensors(inputs: AttentionInputs) -> None:
    """Check that tensors are tensors; all but q, k and v may be None.

    Raises:
        TypeError: naming the first one that is not.
    """
    for name, optional in _TENSORS:
        value = getattr(inputs, name)
        if not isinstance(value, Tensor) and not (optional and value is None):
            raise TypeError(f"{name}: expected a tensor, got {describe(value)}")


def validate(inputs: AttentionInputs) -> None:
    """Check shapes, dtypes, devices and options of the forward's arguments.

    Raises:
        TypeError: if a dtype is wrong.
        ValueError: if a shape, device or option is wrong.
    """
    q, k = inputs.q, inputs.k
    expect_tensor("q", q, shape=("B", "S", "H", "D"), dtypes=REFERENCE_DTYPES)
    batch, length, heads, head_dim = q.shape
    same = (q.dtype,)
    expect_tensor("k", k, shape=(batch, length, "G", head_dim), dtypes=same, device=q.device)
    expect_tensor("v", inputs.v, shape=k.shape, dtypes=same, device=q.device)
    if head_dim == 0 or head_dim % 2:
        raise ValueError(f"q: expected an even head dim (its halves are rotated), got {head_dim}")
    kv_heads = k.shape[2]
    if kv_heads == 0 or heads == 0 or heads % kv_heads:
        raise ValueError(
            f"k: expected a number of heads that divides q's {heads}, got {kv_heads} heads"
        )
    _validate_angles(inputs)
    _validate_tables(inputs)
    ranges = inputs.key_range
    if ranges is not None:
        expect_tensor("key_range", ranges, shape=(batch, 2), dtypes=(torch.int32,), device=q.device)
    if inputs.window is not None:
        expect_int("window", inputs.window, minimum=1)
    if inputs.scale is not None and not math.isfinite(inputs.scale):
        raise ValueError(f"scale: expected a finite number or None, got {inputs.scale}")


def validate_backward(
    inputs: AttentionInputs, saved: AttentionSaved, grads: AttentionOutputGrads, wanted: Wanted
) -> None:
    """Check what the backward takes beside the forward's inputs, which are checked already.

    Raises:
        TypeError: if a dtype is wrong.
        ValueError: if a shape or device is wrong, or a gradient is wanted of what is not there.
    """
    q, k = inputs.q, inputs.k
    for name, tensor, like in (
        ("grad_out", grads.out, q),
        ("grad_key", grads.key, k),
        ("grad_value", grads.value, k),
        ("saved_key", saved.key, k),
        ("saved_value", saved.value, k),
        ("saved_out", saved.out, q),
    ):
        if tensor is not None:
            expect_tensor(name, tensor, shape=like.shape, dtypes=(q.dtype,), device=q.device)
    shape = (q.shape[0], q.shape[2], q.shape[1])
    expect_tensor("saved_lse", saved.lse, shape=shape, dtypes=(lse_dtype(q),), device=q.device)
    for name, want in zip(wanted._fields, wanted, strict=True):
        if want and getattr(inputs, name) is None:
            raise ValueError(f"wanted: a gradient of {name} is asked for, but there is none")


def _validate_angles(inputs: AttentionInputs) -> None:
    q, cos, sin = inputs.q, inputs.cos, inputs.sin
    if cos is None and sin is None:
        return
    if cos is None or sin is None:
        given, missing = ("sin", "cos") if cos is None else ("cos", "sin")
        raise ValueError(
            f"{missing}: expected a tensor beside {given}, got None; give both, or neither where q "
            "and k are rotated already"
        )
    batch, length, _, head_dim = q.shape
    shared = not cos.is_nested and cos.dim() == 3 and cos.shape[0] == 1
    hint = "pass the angles of exactly these S tokens, for one sample or for all"
    expect_tensor(
        "cos",
        cos,
        shape=(1 if shared else batch, length, head_dim),
        dtypes=REFERENCE_DTYPES,
        device=q.device,
        hint=hint,
    )
    expect_tensor("sin", sin, shape=cos.shape, dtypes=(cos.dtype,), device=q.device, hint=hint)


def _validate_tables(inputs: AttentionInputs) -> None:
    q, k, rows = inputs.q, inputs.k, inputs.row_index
    if rows is not None:
        expect_tensor("row_index", rows, shape=q.shape[:2], dtypes=(torch.int32,), device=q.device)
    count: int | str = "T"
    for name, table, heads in (
        ("crayon_q", inputs.crayon_q, q.shape[2]),
        ("crayon_k", inputs.crayon_k, k.shape[2]),
        ("crayon_v", inputs.crayon_v, k.shape[2]),
    ):
        if table is None:
            continue
        if rows is None:
            raise ValueError(
                f"row_index: expected a tensor beside {name}, got None; "
                "it says which tokens each table row is added to"
            )
        expect_tensor(
            name,
            table,
            shape=(count, heads, q.shape[3]),
            dtypes=(q.dtype,),
            device=q.device,
            hint="a table has the crayon's T rows and the heads of the tensor it is added to",
        )
        count = table.shape[0]
