"""The C++ backend for CPUs: decoding in registers for a few tokens, dense strips for many.

Up to ``FEW_TOKENS`` tokens one native call does everything and streams the weight's codes. Beyond
that a strip of the weight is decoded into a buffer that stays in cache, with the adapters' B as
further columns: ``[x | h] [W | B]^T`` gives the whole sum in one float32 accumulation. The backward
does the same with columns of the weight. Where the processor multiplies bfloat16 pairs, strips and
products are native too; elsewhere this package's float32 product runs on the strips.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from collavo_kernels._derivative import Nothing
from collavo_kernels._native import (
    BEST_ISA,
    DTYPE_CODES,
    best_isa,
    native_of,
    native_reason,
    scratch,
)
from collavo_kernels.ops.qlora_linear.cpu_calls import (
    NAME,
    adapter_fields,
    add_rows,
    addition_fields,
    dequantize,
    product,
    sum_rows,
    weight_fields,
)
from collavo_kernels.ops.qlora_linear.inputs import (
    Gradients,
    LoRAAdapter,
    QLoRAInputs,
    QLoRAOutputGrads,
    QLoRAResult,
    Wanted,
    gated,
    scaled,
)
from collavo_kernels.ops.qlora_linear.nf4.panels import cannot_pack
from collavo_kernels.ops.qlora_linear.reference import checked_rows

FEW_TOKENS = 64
_CHUNK = 64
_STRIP_BYTES = 1 << 20


unavailable = native_reason


def declines(inputs: QLoRAInputs) -> str | None:
    """Say why these inputs are not taken, or None."""
    if inputs.scales is None:
        return "the weight is dense: the reference serves"
    if inputs.x.dtype not in DTYPE_CODES:
        return "takes float32, bfloat16 and float16; float64 is the reference's"
    if inputs.x.numel() == 0 or inputs.out_features == 0:
        return "there is nothing to compute"
    return _int8_declines(inputs) if inputs.int8_activations else None


def _int8_declines(inputs: QLoRAInputs) -> str | None:
    if best_isa() != "avx512":
        return "int8_activations needs a processor with AVX-512 and its byte products"
    reason = cannot_pack(inputs.shape, inputs.block_size)
    if reason is None and inputs.tokens > FEW_TOKENS:
        reason = f"int8_activations is for up to {FEW_TOKENS} tokens, got {inputs.tokens}"
    return reason


def forward(inputs: QLoRAInputs) -> QLoRAResult:
    """Return ``[M, N]`` in x's dtype."""
    if inputs.row_index is not None:
        inputs = inputs._replace(row_index=checked_rows(inputs))
    packable = cannot_pack(inputs.shape, inputs.block_size) is None
    if packable and inputs.tokens <= FEW_TOKENS:
        out = _forward_few(inputs)
    elif packable and _multiplies_pairs(inputs.x.dtype):
        out = _forward_many(inputs)
    else:
        out = _forward_strips(inputs)
    return QLoRAResult(out)


def backward(
    inputs: QLoRAInputs, saved: Nothing, grads: QLoRAOutputGrads, wanted: Wanted
) -> Gradients:
    """Return the gradients that are wanted."""
    grad = grads.out
    dtype = _product_dtype(inputs.x.dtype)
    x, wide_grad = inputs.x.to(dtype), grad.to(dtype)
    grads_a: list[Tensor | None] = [None] * len(inputs.a)
    grads_b: list[Tensor | None] = [None] * len(inputs.b)
    upstream: list[Tensor] = []
    for i, (a, b, _) in enumerate(inputs.adapters):
        if wanted.x or wanted.a[i]:
            columns = b.to(dtype).t().contiguous()
            upstream.append(scaled(inputs, i, _product(wide_grad, columns.t())))
            if wanted.a[i]:
                grads_a[i] = _product(upstream[-1].t(), gated(inputs, i, x)).to(a.dtype)
        if wanted.b[i]:
            hidden = scaled(inputs, i, _product(x, a.to(dtype).t()))
            # Transposed, because the kernel is quick along rows of its right factor.
            transposed = _product(hidden.t(), gated(inputs, i, wide_grad))
            grads_b[i] = transposed.t().to(b.dtype).contiguous()
    return Gradients(
        x=_grad_x(inputs, wide_grad, upstream) if wanted.x else None,
        weight=None,
        row_table=_grad_row_table(inputs, grad) if wanted.row_table else None,
        bias=_grad_bias(inputs, grad) if wanted.bias else None,
        a=grads_a,
        b=grads_b,
    )


def _multiplies_pairs(dtype: torch.dtype) -> bool:
    # Without the processor's bfloat16 products float32 is faster, and float16 has none.
    return dtype == torch.bfloat16 and best_isa() == "avx512"


def _product_dtype(dtype: torch.dtype) -> torch.dtype:
    return dtype if _multiplies_pairs(dtype) else torch.float32


def _forward_few(inputs: QLoRAInputs) -> Tensor:
    x = inputs.x.contiguous()
    out = x.new_empty((x.shape[0], inputs.out_features))
    mask = inputs.adapter_mask
    native_of(NAME).qlora_linear_forward(
        isa=BEST_ISA,
        allocate=scratch,
        weight=weight_fields(inputs),
        dtype=DTYPE_CODES[x.dtype],
        x=x,
        tokens=x.shape[0],
        adapters=[_few_adapter(each) for each in inputs.adapters],
        adapter_mask=None if mask is None else mask.contiguous(),
        int8_activations=inputs.int8_activations,
        out=out,
        **addition_fields(inputs),
    )
    return out


def _few_adapter(adapter: LoRAAdapter) -> dict[str, Any]:
    a, b, scaling = adapter
    if a.dtype != b.dtype:
        a, b = a.float(), b.float()
    return adapter_fields(a.shape[0], a.dtype, a.contiguous(), b.contiguous(), scaling)


def _forward_many(inputs: QLoRAInputs) -> Tensor:
    x = inputs.x.contiguous()
    hidden = [scaled(inputs, i, x @ a.to(x.dtype).t()) for i, a in enumerate(inputs.a)]
    factors = [b.to(x.dtype).contiguous() for b in inputs.b]
    out = x.new_empty((x.shape[0], inputs.out_features))
    native_of(NAME).qlora_linear_forward_many(
        isa=BEST_ISA,
        allocate=scratch,
        weight=weight_fields(inputs),
        x=x,
        tokens=x.shape[0],
        hidden=torch.cat(hidden, dim=1) if hidden else None,
        adapters=[adapter_fields(b.shape[1], b.dtype, b=b) for b in factors],
        out=out,
        **addition_fields(inputs),
    )
    return out


def _forward_strips(inputs: QLoRAInputs) -> Tensor:
    dtype = _product_dtype(inputs.x.dtype)
    (m, k), n = inputs.x.shape, inputs.out_features
    ranks = [a.shape[0] for a in inputs.a]
    width = k + sum(ranks)
    joined = inputs.x.new_empty((m, width), dtype=dtype)
    x = joined[:, :k]
    x.copy_(inputs.x)
    column = k
    for i, a in enumerate(inputs.a):
        hidden = scaled(inputs, i, _product(x, a.to(dtype).t()))
        joined[:, column : column + ranks[i]] = hidden
        column += ranks[i]
    out = inputs.x.new_empty((m, n), dtype=dtype)
    step = _strip(width, n, dtype)
    buffer = inputs.x.new_empty((step, width), dtype=dtype)
    for start in range(0, n, step):
        stop = min(n, start + step)
        strip = buffer[: stop - start]
        dequantize(inputs, slice(start, stop), slice(0, k), strip)
        column = k
        for b, rank in zip(inputs.b, ranks, strict=True):
            strip[:, column : column + rank] = b[start:stop]
            column += rank
        _product(joined, strip.t(), out[:, start:stop])
    return _add(inputs, out).to(inputs.x.dtype)


def _product(a: Tensor, b: Tensor, out: Tensor | None = None) -> Tensor:
    # PyTorch's float32 product gives other bits with other numbers of threads.
    if a.dtype != torch.float32:
        return torch.mm(a, b) if out is None else torch.mm(a, b, out=out)
    if out is None:
        out = a.new_empty((a.shape[0], b.shape[1]))
    product(a, b, out)
    return out


def _add(inputs: QLoRAInputs, out: Tensor) -> Tensor:
    """Add the rows of the table and the bias, in place."""
    if inputs.row_table is None or inputs.row_index is None:
        return out if inputs.bias is None else out.add_(inputs.bias)
    table, index = inputs.row_table.float().contiguous(), inputs.row_index.contiguous()
    if inputs.bias is not None:
        # Their sum is made in float32 and added once: large values in them may cancel.
        bias = inputs.bias.float()[None]
        table, index = torch.cat([bias, table + bias]), index + 1
    add_rows(out, table, index)
    return out


def _strip(width: int, count: int, dtype: torch.dtype) -> int:
    rows = _STRIP_BYTES // (width * dtype.itemsize)
    return min(count, max(_CHUNK, rows // _CHUNK * _CHUNK))


def _grad_x(inputs: QLoRAInputs, grad: Tensor, upstream: list[Tensor]) -> Tensor:
    n, k = inputs.shape
    if _multiplies_pairs(grad.dtype) and cannot_pack(inputs.shape, inputs.block_size) is None:
        return _grad_x_many(inputs, grad.contiguous(), upstream)
    joined = torch.cat([grad, *upstream], dim=1) if upstream else grad
    height = joined.shape[1]
    out = grad.new_empty((grad.shape[0], k))
    step = _strip(height, k, grad.dtype)
    buffer = grad.new_empty(height * step)
    for start in range(0, k, step):
        stop = min(k, start + step)
        strip = buffer[: height * (stop - start)].view(height, stop - start)
        dequantize(inputs, slice(0, n), slice(start, stop), strip)
        row = n
        for a in inputs.a:
            strip[row : row + a.shape[0]] = a[:, start:stop]
            row += a.shape[0]
        _product(joined, strip, out[:, start:stop])
    return out.to(inputs.x.dtype)


def _grad_x_many(inputs: QLoRAInputs, grad: Tensor, upstream: list[Tensor]) -> Tensor:
    out = grad.new_empty((grad.shape[0], inputs.shape[1]))
    factors = [a.to(grad.dtype).contiguous() for a in inputs.a]
    native_of(NAME).qlora_linear_grad_x_many(
        isa=BEST_ISA,
        allocate=scratch,
        weight=weight_fields(inputs),
        x=grad,
        tokens=grad.shape[0],
        hidden=torch.cat(upstream, dim=1) if upstream else None,
        adapters=[adapter_fields(a.shape[0], a.dtype, a=a) for a in factors],
        row_table=None,
        row_index=None,
        bias=None,
        out=out,
    )
    return out


def _grad_row_table(inputs: QLoRAInputs, grad: Tensor) -> Tensor:
    if inputs.row_table is None or inputs.row_index is None:
        raise ValueError("row_table: a gradient was asked for, but there is none")
    index = checked_rows(inputs)
    if index is None:
        raise ValueError("row_index: a gradient of row_table was asked for, but there is none")
    table = grad.new_empty(inputs.row_table.shape, dtype=torch.float32)
    sum_rows(grad.contiguous(), index.contiguous(), table)
    return table.to(inputs.row_table.dtype)


def _grad_bias(inputs: QLoRAInputs, grad: Tensor) -> Tensor:
    if inputs.bias is None:
        raise ValueError("bias: a gradient was asked for, but there is none")
    return grad.float().sum(0).to(inputs.bias.dtype)
