"""Checks of the operator's arguments: made where the operator runs, so native code can trust them.

Values (row indices, key ranges) are checked by the backends, where that costs no host
synchronisation.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from collavo_kernels._validation import REFERENCE_DTYPES, describe, expect_int, expect_tensor
from collavo_kernels.ops.crayon_attention.inputs import AttentionInputs, BackwardInputs


def expect_tensors(**arguments: Tensor | None) -> None:
    """Check that every argument is a tensor; all but q, k and v may be None.

    Raises:
        TypeError: naming the first one that is not.
    """
    for name, value in arguments.items():
        optional = name not in ("q", "k", "v")
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
    batch, length, heads, size = q.shape
    same = (q.dtype,)
    expect_tensor("k", k, shape=(batch, length, "G", size), dtypes=same, device=q.device)
    expect_tensor("v", inputs.v, shape=k.shape, dtypes=same, device=q.device)
    if size == 0 or size % 2:
        raise ValueError(f"q: expected an even head dim (its halves are rotated), got {size}")
    groups = k.shape[2]
    if groups == 0 or heads == 0 or heads % groups:
        raise ValueError(
            f"k: expected a number of heads that divides q's {heads}, got {groups} heads"
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


def validate_backward(given: BackwardInputs) -> None:
    """Check the backward's arguments: the forward's, and what belongs to them.

    Raises:
        TypeError: if a dtype is wrong.
        ValueError: if a shape, device or option is wrong.
    """
    inputs = given.inputs
    validate(inputs)
    q, k = inputs.q, inputs.k
    for name, tensor in (("grad_out", given.grad_out), ("out", given.out)):
        expect_tensor(name, tensor, shape=q.shape, dtypes=(q.dtype,), device=q.device)
    for name, extra in (("grad_key", given.grad_key), ("grad_value", given.grad_value)):
        if extra is not None:
            expect_tensor(name, extra, shape=k.shape, dtypes=(k.dtype,), device=q.device)
    shape = (q.shape[0], q.shape[2], q.shape[1])
    expect_tensor("lse", given.lse, shape=shape, dtypes=(lse_dtype(q),), device=q.device)


def lse_dtype(q: Tensor) -> torch.dtype:
    """Return the log-sum-exp's dtype: float64 for float64 inputs, else float32."""
    return torch.float64 if q.dtype == torch.float64 else torch.float32


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
    batch, length, _, size = q.shape
    shared = cos.dim() == 3 and cos.shape[0] == 1
    hint = "pass the angles of exactly these S tokens, for one sample or for all"
    expect_tensor(
        "cos",
        cos,
        shape=(1 if shared else batch, length, size),
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
