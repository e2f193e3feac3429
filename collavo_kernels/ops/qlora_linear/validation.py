"""Checks of the operator's arguments: made where the operator runs, so native code can trust them.

Values (row indices) are checked by the backends, where that costs no host synchronisation.
"""

from __future__ import annotations

import torch
from torch import Tensor

from collavo_kernels._derivative import Nothing
from collavo_kernels._validation import REFERENCE_DTYPES, describe, expect_tensor
from collavo_kernels.ops.qlora_linear.inputs import (
    MAX_MASKED_ADAPTERS,
    QLoRAInputs,
    QLoRAOutputGrads,
    Wanted,
)
from collavo_kernels.ops.qlora_linear.nf4 import panels
from collavo_kernels.ops.qlora_linear.nf4.format import BLOCK_SIZES, packed_bytes, scale_bytes


def validate(inputs: QLoRAInputs) -> None:
    """Check shapes, dtypes and devices of the operator's inputs.

    Raises:
        TypeError: if a dtype is wrong.
        ValueError: if a shape, device or number of adapters is wrong.
    """
    x = inputs.x
    expect_tensor("x", x, dtypes=REFERENCE_DTYPES)
    if x.dim() == 0:
        raise ValueError(f"x: expected shape [..., K], got {describe(x)}")
    if inputs.scales is None:
        expect_tensor(
            "weight", inputs.weight, shape=inputs.shape, dtypes=(x.dtype,), device=x.device
        )
    else:
        _validate_bytes(inputs, inputs.scales)
    _validate_adapters(inputs)
    _validate_mask(x, inputs.adapter_mask, len(inputs.a))
    _validate_rows(x, inputs.row_table, inputs.row_index, inputs.out_features)
    if inputs.bias is not None:
        _validate_side("bias", inputs.bias, x, (inputs.out_features,))


def validate_backward(
    inputs: QLoRAInputs, saved: Nothing, grads: QLoRAOutputGrads, wanted: Wanted
) -> None:
    """Check what the backward takes beside the forward's inputs, which are checked already.

    Raises:
        TypeError: if the gradient's dtype is wrong.
        ValueError: if its shape or device is wrong, or a gradient is wanted of what has none.
    """
    x = inputs.x
    shape = (*x.shape[:-1], inputs.out_features)
    expect_tensor("grad_out", grads.out, shape=shape, dtypes=(x.dtype,), device=x.device)
    if inputs.scales is not None and wanted.weight:
        raise ValueError("wanted: a 4-bit weight cannot get a gradient; train the adapters")
    for name in ("row_table", "bias"):
        if getattr(wanted, name) and getattr(inputs, name) is None:
            raise ValueError(f"wanted: a gradient of {name} is asked for, but there is none")


def _validate_bytes(inputs: QLoRAInputs, scales: Tensor) -> None:
    x, packed, shape = inputs.x, inputs.weight, inputs.shape
    block_size, double_quant = inputs.block_size, inputs.double_quant
    if block_size not in BLOCK_SIZES:
        choices = ", ".join(map(str, BLOCK_SIZES))
        raise ValueError(f"block_size: expected one of {choices}, got {block_size}")
    if packed.dim() == 3:
        reason = panels.cannot_pack(shape, block_size)
        if reason is None and packed.device.type not in ("cpu", "meta"):
            reason = f"it is on {packed.device}, and panels are for CPU kernels; use to_rows()"
        if reason is not None:
            raise ValueError(f"weight: cannot lie in panels: {reason}")
        expect_tensor("weight", packed, shape=panels.panels_shape(shape))
    codes = packed.numel() if packed.dim() == 3 else packed_bytes(shape)
    sizes = (codes, scale_bytes(shape, block_size, double_quant))
    for name, value, size in zip(("weight", "scales"), (packed, scales), sizes, strict=True):
        expect_tensor(name, value, dtypes=(torch.uint8,), device=x.device)
        if value.numel() != size:
            raise ValueError(
                f"{name}: expected {size} bytes for an NF4 matrix {list(shape)}, "
                f"got {describe(value)}"
            )


def _validate_adapters(inputs: QLoRAInputs) -> None:
    x, a, b, scaling = inputs.x, inputs.a, inputs.b, inputs.scaling
    if not len(a) == len(b) == len(scaling):
        raise ValueError(
            "adapters: expected as many a as b and scaling, "
            f"got {len(a)}, {len(b)} and {len(scaling)}"
        )
    for i, (down, up) in enumerate(zip(a, b, strict=True)):
        _validate_side(f"adapters[{i}].a", down, x, ("R", x.shape[-1]))
        _validate_side(f"adapters[{i}].b", up, x, (inputs.out_features, down.shape[0]))


def _validate_mask(x: Tensor, mask: Tensor | None, adapters: int) -> None:
    if mask is None:
        return
    expect_tensor("adapter_mask", mask, shape=x.shape[:-1], dtypes=(torch.uint8,), device=x.device)
    if adapters > MAX_MASKED_ADAPTERS:
        raise ValueError(
            f"adapters: expected at most {MAX_MASKED_ADAPTERS} beside adapter_mask "
            f"(a bit each), got {adapters}"
        )


def _validate_rows(x: Tensor, table: Tensor | None, index: Tensor | None, n: int) -> None:
    if (table is None) != (index is None):
        missing = "row_index" if index is None else "row_table"
        raise ValueError(f"{missing}: row_table and row_index go together, got only one of them")
    if table is not None:
        _validate_side("row_table", table, x, ("T", n))
        expect_tensor(
            "row_index", index, shape=x.shape[:-1], dtypes=(torch.int32,), device=x.device
        )


def _validate_side(argument: str, value: Tensor, x: Tensor, shape: tuple[int | str, ...]) -> None:
    dtypes = (x.dtype,) if x.dtype == torch.float32 else (x.dtype, torch.float32)
    expect_tensor(argument, value, shape=shape, dtypes=dtypes, device=x.device)
