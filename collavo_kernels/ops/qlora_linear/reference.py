"""``qlora_linear`` in plain PyTorch: the specification, and the fallback on every device.

Forward:   ``y = W x + sum_i m_i s_i B_i A_i x + table[row] + bias``
Backward:  ``dx = g W + sum_i h_i A_i``   with ``h_i = m_i s_i g B_i``
           ``dA_i = h_i^T x``,  ``dB_i = g^T (m_i s_i A_i x)``,  ``dtable[t] = sum of g over row ==
           t``,  ``dbias = sum g``

Matrix products run in x's dtype, as plain PyTorch code would, and their results are added in
float32 (float64 when x is). The dense weight is made a strip of rows at a time, so memory stays
bounded.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from collavo_kernels._derivative import Nothing
from collavo_kernels._rows import add_rows, checked_index, sum_rows
from collavo_kernels.ops.qlora_linear.inputs import (
    Gradients,
    QLoRAInputs,
    QLoRAOutputGrads,
    QLoRAResult,
    Wanted,
    gated,
    scaled,
)
from collavo_kernels.ops.qlora_linear.nf4 import panels
from collavo_kernels.ops.qlora_linear.nf4.format import dequantize_rows

_STRIP_ELEMENTS = 1 << 22


def forward(inputs: QLoRAInputs) -> QLoRAResult:
    """Return ``[M, N]`` in x's dtype."""
    x, n = inputs.x, inputs.out_features
    rows = checked_rows(inputs)
    wide = _accumulator(x.dtype)
    out = x.new_empty((x.shape[0], n), dtype=wide)
    for start, stop, dense in _weight_strips(inputs):
        out[:, start:stop] = F.linear(x, dense)
    for i, adapter in enumerate(inputs.adapters):
        hidden = scaled(inputs, i, F.linear(x, adapter.a.to(x.dtype)))
        out += F.linear(hidden, adapter.b.to(x.dtype))
    if inputs.row_table is not None and rows is not None:
        out = add_rows(out, inputs.row_table, rows)
    if inputs.bias is not None:
        out += inputs.bias
    return QLoRAResult(out.to(x.dtype))


def backward(
    inputs: QLoRAInputs, saved: Nothing, grads: QLoRAOutputGrads, wanted: Wanted
) -> Gradients:
    """Return the gradients that are wanted."""
    grad = grads.out
    x = inputs.x
    wide = _accumulator(x.dtype)
    grad_x = x.new_zeros(x.shape, dtype=wide) if wanted.x else None
    if grad_x is not None:
        for start, stop, dense in _weight_strips(inputs):
            grad_x += grad[:, start:stop] @ dense
    grads_a: list[Tensor | None] = [None] * len(inputs.a)
    grads_b: list[Tensor | None] = [None] * len(inputs.b)
    for i, (a, b, _) in enumerate(inputs.adapters):
        if wanted.x or wanted.a[i]:
            upstream = scaled(inputs, i, grad @ b.to(x.dtype))
            if wanted.a[i]:
                grads_a[i] = (upstream.t() @ gated(inputs, i, x)).to(a.dtype)
            if grad_x is not None:
                grad_x += upstream @ a.to(x.dtype)
        if wanted.b[i]:
            hidden = scaled(inputs, i, F.linear(x, a.to(x.dtype)))
            grads_b[i] = (gated(inputs, i, grad).t() @ hidden).to(b.dtype)
    return Gradients(
        x=None if grad_x is None else grad_x.to(x.dtype),
        weight=(grad.t() @ x).to(inputs.weight.dtype) if wanted.weight else None,
        row_table=_grad_row_table(inputs, grad) if wanted.row_table else None,
        bias=_grad_bias(inputs, grad) if wanted.bias else None,
        a=grads_a,
        b=grads_b,
    )


def checked_rows(inputs: QLoRAInputs) -> Tensor | None:
    """Return the row index with no entry outside the table, or None where no table is given.

    Raises:
        ValueError: on the CPU, naming the first bad entry; elsewhere a bad entry counts as -1 and
            is reported by ``collavo_kernels.check()``.
    """
    if inputs.row_index is None or inputs.row_table is None:
        return None
    return checked_index(inputs.row_index, inputs.row_table.shape[0])


def _accumulator(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _weight_strips(inputs: QLoRAInputs) -> Iterator[tuple[int, int, Tensor]]:
    n, k = inputs.shape
    if inputs.scales is None:
        yield 0, n, inputs.weight.to(inputs.x.dtype)
        return
    packed = panels.to_rows(inputs.weight, n) if inputs.in_panels else inputs.weight
    step = max(1, _STRIP_ELEMENTS // max(k, 1))
    for start in range(0, n, step):
        stop = min(n, start + step)
        dense = dequantize_rows(
            packed,
            inputs.scales,
            (n, k),
            inputs.block_size,
            inputs.double_quant,
            inputs.x.dtype,
            (start, stop),
        )
        yield start, stop, dense


def _grad_row_table(inputs: QLoRAInputs, grad: Tensor) -> Tensor:
    rows, table = checked_rows(inputs), inputs.row_table
    if table is None or rows is None:
        raise ValueError("row_table: a gradient was asked for, but there is none")
    return sum_rows(grad.to(_accumulator(grad.dtype)), rows, table.shape[0]).to(table.dtype)


def _grad_bias(inputs: QLoRAInputs, grad: Tensor) -> Tensor:
    if inputs.bias is None:
        raise ValueError("bias: a gradient was asked for, but there is none")
    return grad.to(_accumulator(grad.dtype)).sum(0).to(inputs.bias.dtype)
