"""Checks of the operator's arguments: made where the operator runs, so native code can trust them.

Values (row indices) are checked by the backends, where that costs no host synchronisation.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from collavo_kernels._validation import REFERENCE_DTYPES, describe, expect_tensor
from collavo_kernels.ops.qlora_linear.inputs import MAX_MASKED_ADAPTERS
from collavo_kernels.ops.qlora_linear.nf4 import panels as nf4_panels
from collavo_kernels.ops.qlora_linear.nf4.format import BLOCK_SIZES, packed_bytes, scale_bytes


def validate(
    x: Tensor,
    weight: Tensor,
    scales: Tensor | None,
    out_features: int,
    block_size: int,
    double_quant: bool,
    a: Sequence[Tensor],
    b: Sequence[Tensor],
    scaling: Sequence[float],
    adapter_mask: Tensor | None,
    row_table: Tensor | None,
    row_index: Tensor | None,
    bias: Tensor | None,
) -> None:
    """Check shapes, dtypes and devices of the operator's flat arguments.

    Raises:
        TypeError: if a dtype is wrong.
        ValueError: if a shape, device or number of adapters is wrong.
    """
    expect_tensor("x", x, dtypes=REFERENCE_DTYPES)
    if x.dim() == 0:
        raise ValueError(f"x: expected shape [..., K], got {describe(x)}")
    shape = (out_features, x.shape[-1])
    if scales is None:
        expect_tensor("weight", weight, shape=shape, dtypes=(x.dtype,), device=x.device)
    else:
        _validate_bytes(x, weight, scales, shape, block_size, double_quant)
    _validate_adapters(x, out_features, a, b, scaling)
    _validate_mask(x, adapter_mask, len(a))
    _validate_rows(x, row_table, row_index, out_features)
    if bias is not None:
        _validate_side("bias", bias, x, (out_features,))


def validate_backward(
    grad: Tensor, x: Tensor, out_features: int, flags: Sequence[bool], count: int, *, nf4: bool
) -> None:
    """Check what the backward takes beside the forward's arguments.

    Args:
        grad: The output's gradient.
        x: The forward's.
        out_features: The forward's.
        flags: The output mask.
        count: Adapters.
        nf4: Whether the weight is in NF4.

    Raises:
        TypeError: if the gradient's dtype is wrong.
        ValueError: if its shape or device, or the number of flags, is wrong, or an NF4 weight is
            asked for a gradient.
    """
    shape = (*x.shape[:-1], out_features)
    expect_tensor("grad", grad, shape=shape, dtypes=(x.dtype,), device=x.device)
    if len(flags) != 4 + 2 * count:
        raise ValueError(
            f"output_mask: expected {4 + 2 * count} entries (x, weight, row_table, bias, every a, "
            f"every b), got {len(flags)}"
        )
    if nf4 and flags[1]:
        raise ValueError("output_mask: a 4-bit weight cannot get a gradient; train the adapters")


def _validate_bytes(
    x: Tensor,
    packed: Tensor,
    scales: Tensor,
    shape: tuple[int, int],
    block_size: int,
    double_quant: bool,
) -> None:
    if block_size not in BLOCK_SIZES:
        choices = ", ".join(map(str, BLOCK_SIZES))
        raise ValueError(f"block_size: expected one of {choices}, got {block_size}")
    if packed.dim() == 3:
        reason = nf4_panels.cannot_pack(shape, block_size)
        if reason is None and packed.device.type not in ("cpu", "meta"):
            reason = f"it is on {packed.device}, and panels are for CPU kernels; use to_rows()"
        if reason is not None:
            raise ValueError(f"weight: cannot lie in panels: {reason}")
        expect_tensor("weight", packed, shape=nf4_panels.panels_shape(shape))
    codes = packed.numel() if packed.dim() == 3 else packed_bytes(shape)
    sizes = (codes, scale_bytes(shape, block_size, double_quant))
    for name, value, size in zip(("weight", "scales"), (packed, scales), sizes, strict=True):
        expect_tensor(name, value, dtypes=(torch.uint8,), device=x.device)
        if value.numel() != size:
            raise ValueError(
                f"{name}: expected {size} bytes for an NF4 matrix {list(shape)}, "
                f"got {describe(value)}"
            )


def _validate_adapters(
    x: Tensor, n: int, a: Sequence[Tensor], b: Sequence[Tensor], scaling: Sequence[float]
) -> None:
    if not len(a) == len(b) == len(scaling):
        raise ValueError(
            "adapters: expected as many a as b and scaling, "
            f"got {len(a)}, {len(b)} and {len(scaling)}"
        )
    for i, (down, up) in enumerate(zip(a, b, strict=True)):
        _validate_side(f"adapters[{i}].a", down, x, ("R", x.shape[-1]))
        _validate_side(f"adapters[{i}].b", up, x, (n, down.shape[0]))


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
