"""A frozen NF4 weight, low-rank adapters and the crayon table in one linear operator."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from collavo_kernels._validation import describe, expect_list, expect_number, expect_tensor
from collavo_kernels.ops.qlora_linear.inputs import LoRAAdapter, QLoRAInputs
from collavo_kernels.ops.qlora_linear.nf4.quantize import quantize_nf4
from collavo_kernels.ops.qlora_linear.nf4.weight import NF4Weight
from collavo_kernels.ops.qlora_linear.registration import OPERATOR

__all__ = ["OPERATOR", "LoRAAdapter", "NF4Weight", "qlora_linear", "quantize_nf4"]

_OPTIONAL = ("adapter_mask", "row_table", "row_index", "bias")


def qlora_linear(
    x: Tensor,
    weight: NF4Weight | Tensor,
    adapters: Sequence[LoRAAdapter] = (),
    *,
    adapter_mask: Tensor | None = None,
    row_table: Tensor | None = None,
    row_index: Tensor | None = None,
    bias: Tensor | None = None,
    int8_activations: bool = False,
    backend: str = "",
) -> Tensor:
    r"""Apply a (4-bit) linear layer with any number of LoRA adapters and a table of row vectors.

    ``y = W x + sum_i [bit i of mask] s_i B_i (A_i x) + table[row] + bias``

    Two adapters side by side over one NF4 weight are CoLLaVO's Dual QLoRA (arXiv 2402.11248,
    section 3.3); a mask that is set on image tokens only is the PLoRA of the released checkpoint;
    the table carries the crayon.

    Args:
        x: ``[..., K]``, float32, bfloat16 or float16 (float64 with the reference backend).
        weight: An ``NF4Weight`` of shape ``(N, K)``, or dense ``[N, K]`` in x's dtype.
        adapters: ``LoRAAdapter(a=[R, K], b=[N, R], scaling)``; in x's dtype or float32. Ranks can
            differ.
        adapter_mask: uint8, x's leading shape; bit i set means that adapter i is active for that
            token. None: all are.
        row_table: ``[T, N]``, added to tokens that have a row; x's dtype or float32.
        row_index: int32, x's leading shape; the token's row, or -1 for none. Needed with
            ``row_table``.
        bias: ``[N]``, x's dtype or float32.
        int8_activations: Round x to 8 bits (a scale per 64 values) and the codes to multiples of
            1/127 for the product with the weight: about 1 % of relative error, up to twice as fast
            for 4 to 16 tokens. Inference on a CPU with AVX-512 only, up to 64 tokens, K a multiple
            of 64; the adapters stay exact.
        backend: A backend by name; empty picks the best that serves.

    Returns:
        ``[..., N]`` in x's dtype, accumulated in float32. Gradients flow to x, the adapters,
        row_table, bias and a dense weight, never to an NF4 weight.

    Raises:
        TypeError: if an argument is no tensor of the dtypes above.
        ValueError: if a shape, device, row index or mask does not fit, or ``int8_activations`` or a
            backend cannot serve; the argument is named.

    Example:
        >>> import torch
        >>> from collavo_kernels import LoRAAdapter, qlora_linear, quantize_nf4
        >>> weight = quantize_nf4(torch.randn(32, 64))
        >>> image = LoRAAdapter(torch.randn(8, 64), torch.zeros(32, 8), scaling=2.0)
        >>> x = torch.randn(2, 5, 64)
        >>> y = qlora_linear(x, weight, [image])
        >>> y.shape, torch.allclose(y, x @ weight.dequantize().T, atol=1e-4)
        (torch.Size([2, 5, 32]), True)
    """
    optional = (adapter_mask, row_table, row_index, bias)
    _expect_tensors(x, adapters, optional)
    stored = _stored(x, weight)
    inputs = QLoRAInputs(
        x=x,
        weight=stored.codes,
        scales=stored.scales,
        out_features=stored.out_features,
        block_size=stored.block_size,
        double_quant=stored.double_quant,
        a=[each[0] for each in adapters],
        b=[each[1] for each in adapters],
        scaling=[float(each[2]) for each in adapters],
        adapter_mask=adapter_mask,
        row_table=row_table,
        row_index=row_index,
        bias=bias,
        int8_activations=int8_activations,
    )
    return OPERATOR(inputs, backend).out


def _expect_tensors(
    x: Tensor, adapters: Sequence[LoRAAdapter], optional: tuple[Tensor | None, ...]
) -> None:
    """Name what is no tensor; the operator itself checks shapes, dtypes and devices."""
    if not isinstance(x, Tensor) or x.is_nested:
        expect_tensor("x", x)
    expect_list("adapters", adapters, "LoRAAdapter(a, b, scaling)")
    for i, adapter in enumerate(adapters):
        if not isinstance(adapter, tuple) or len(adapter) != 3:
            came = describe(adapter)
            raise TypeError(f"adapters[{i}]: expected LoRAAdapter(a, b, scaling), got {came}")
        a, b, scaling = adapter
        if not isinstance(a, Tensor) or not isinstance(b, Tensor):
            expect_tensor(f"adapters[{i}].a", a)
            expect_tensor(f"adapters[{i}].b", b)
        if not isinstance(scaling, float):
            expect_number(f"adapters[{i}].scaling", scaling)
    for name, value in zip(_OPTIONAL, optional, strict=True):
        if value is not None:
            expect_tensor(name, value)


class _Stored(NamedTuple):
    """A weight as the operator takes it; without scales it is dense."""

    codes: Tensor
    scales: Tensor | None
    out_features: int
    block_size: int
    double_quant: bool


def _stored(x: Tensor, weight: NF4Weight | Tensor) -> _Stored:
    if isinstance(weight, NF4Weight):
        n, columns = weight.shape
        if x.dim() and columns != x.shape[-1]:
            raise ValueError(
                f"x: expected [..., {columns}] for the weight {[n, columns]}, got {describe(x)}"
            )
        if weight.packed.requires_grad or weight.scales.requires_grad:
            raise ValueError("weight: a 4-bit weight cannot get a gradient; train the adapters")
        return _Stored(weight.packed, weight.scales, n, weight.block_size, weight.double_quant)
    expect_tensor("weight", weight, shape=("N", "K"))
    return _Stored(weight, None, weight.shape[0], 64, False)
