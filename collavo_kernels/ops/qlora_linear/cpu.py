"""The C++ backend for CPUs: decoding in registers for a few tokens, dense strips for many.

Up to ``FEW_TOKENS`` tokens one native call does everything and streams the weight's codes. Beyond
that a strip of the weight is decoded into a buffer that stays in cache, with the adapters' B as
further columns: ``[x | h] [W | B]^T`` gives the whole sum in one float32 accumulation. The backward
does the same with columns of the weight. Where the processor multiplies bfloat16 pairs, strips and
products are native too; elsewhere PyTorch's matrix product runs on the strips.
"""

from __future__ import annotations

from types import ModuleType

import torch
from torch import Tensor

from collavo_kernels._derivative import Nothing
from collavo_kernels._native import DTYPE_CODES, best_isa, native, native_reason
from collavo_kernels.ops.qlora_linear.inputs import (
    Gradients,
    LoRAAdapter,
    QLoRAInputs,
    QLoRAOutputGrads,
    QLoRAResult,
    Wanted,
    active,
    gated,
)
from collavo_kernels.ops.qlora_linear.nf4.panels import cannot_pack
from collavo_kernels.ops.qlora_linear.reference import checked_rows

FEW_TOKENS = 64
_CHUNK = 64
_STRIP_BYTES = 1 << 20
_BEST = -1


def unavailable() -> str | None:
    """Say why the backend cannot run here, or None."""
    return native_reason()


def declines(inputs: QLoRAInputs) -> str | None:
    """Say why the backend does not take these inputs, or None."""
    if inputs.scales is None:
        return "the weight is dense: PyTorch's own linear layer serves"
    if inputs.x.dtype not in DTYPE_CODES:
        return f"x is {inputs.x.dtype}"
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
    in_tiles = cannot_pack(inputs.shape, inputs.block_size) is None
    if in_tiles and inputs.tokens <= FEW_TOKENS:
        out = _forward_few(_module(), inputs)
    elif in_tiles and _multiplies_pairs(inputs.x.dtype):
        out = _forward_pairs(_module(), inputs)
    else:
        out = _forward_many(_module(), inputs)
    return QLoRAResult(out)


def backward(
    inputs: QLoRAInputs, saved: Nothing, grads: QLoRAOutputGrads, wanted: Wanted
) -> Gradients:
    """Return the gradients that are wanted."""
    grad = grads.out
    module, dtype = _module(), _product_dtype(inputs.x.dtype)
    x, wide_grad = inputs.x.to(dtype), grad.to(dtype)
    grads_a: list[Tensor | None] = [None] * len(inputs.a)
    grads_b: list[Tensor | None] = [None] * len(inputs.b)
    upstream: list[Tensor] = []
    for i, (a, b, _) in enumerate(inputs.adapters):
        if wanted.x or wanted.a[i]:
            columns = b.to(dtype).t().contiguous()
            upstream.append(_gate(inputs, i, _product(wide_grad, columns.t())))
            if wanted.a[i]:
                grads_a[i] = _product(upstream[-1].t(), gated(inputs, i, x)).to(a.dtype)
        if wanted.b[i]:
            hidden = _gate(inputs, i, _product(x, a.to(dtype).t()))
            # Transposed, because the kernel is quick along rows of its right factor.
            turned = _product(hidden.t(), gated(inputs, i, wide_grad))
            grads_b[i] = turned.t().to(b.dtype).contiguous()
    return Gradients(
        x=_grad_x(module, inputs, wide_grad, upstream) if wanted.x else None,
        weight=None,
        row_table=_grad_row_table(module, inputs, grad) if wanted.row_table else None,
        bias=_grad_bias(inputs, grad) if wanted.bias else None,
        a=grads_a,
        b=grads_b,
    )


def _module() -> ModuleType:
    module = native()
    if module is None:
        raise RuntimeError(f"qlora_linear: {native_reason()}")
    return module


def _multiplies_pairs(dtype: torch.dtype) -> bool:
    # Without the processor's bfloat16 products float32 is faster, and float16 has none.
    return dtype == torch.bfloat16 and best_isa() == "avx512"


def _product_dtype(dtype: torch.dtype) -> torch.dtype:
    return dtype if _multiplies_pairs(dtype) else torch.float32


def _weight(inputs: QLoRAInputs) -> tuple[int, ...]:
    scales = inputs.scales
    if scales is None:
        raise RuntimeError("qlora_linear: the CPU backend has no dense weight")
    n, k = inputs.shape
    flags = int(inputs.double_quant), int(inputs.in_panels)
    return inputs.weight.data_ptr(), scales.data_ptr(), n, k, inputs.block_size, *flags


def _gate(inputs: QLoRAInputs, adapter: int, hidden: Tensor) -> Tensor:
    hidden = hidden.mul_(inputs.scaling[adapter])
    gate = active(inputs, adapter, torch.uint8)
    return hidden if gate is None else hidden.masked_fill_(gate == 0, 0.0)


def _forward_few(module: ModuleType, inputs: QLoRAInputs) -> Tensor:
    x = inputs.x.contiguous()
    m, k = x.shape
    out = x.new_empty((m, inputs.out_features))
    # The list keeps tensors alive until the call is over; addresses do not.
    kept = [_contiguous(each) for each in inputs.adapters]
    adapters = [
        (a.data_ptr(), b.data_ptr(), a.shape[0], scaling, DTYPE_CODES[a.dtype])
        for a, b, scaling in kept
    ]
    mask = None if inputs.adapter_mask is None else inputs.adapter_mask.contiguous()
    table = None if inputs.row_table is None else inputs.row_table.float().contiguous()
    index = None if inputs.row_index is None else inputs.row_index.contiguous()
    bias = None if inputs.bias is None else inputs.bias.float().contiguous()
    epilogue = [0 if each is None else each.data_ptr() for each in (mask, table, index, bias)]
    ranks = sum(a.shape[0] for a in inputs.a)
    scratch = x.new_empty(
        module.qlora_linear_scratch(m, inputs.out_features, k, len(adapters), ranks),
        dtype=torch.float32,
    )
    arguments = (_weight(inputs), DTYPE_CODES[x.dtype], x.data_ptr(), m, adapters, epilogue)
    pointers = (scratch.data_ptr(), out.data_ptr())
    module.qlora_linear_forward(_BEST, *arguments, inputs.int8_activations, *pointers)
    return out


def _contiguous(adapter: LoRAAdapter) -> LoRAAdapter:
    a, b, scaling = adapter
    if a.dtype != b.dtype:
        a, b = a.float(), b.float()
    return LoRAAdapter(a.contiguous(), b.contiguous(), scaling)


def _forward_pairs(module: ModuleType, inputs: QLoRAInputs) -> Tensor:
    x = inputs.x.contiguous()
    hidden = [_gate(inputs, i, x @ a.to(x.dtype).t()) for i, a in enumerate(inputs.a)]
    factors = [b.to(x.dtype).contiguous() for b in inputs.b]
    table = None if inputs.row_table is None else inputs.row_table.float().contiguous()
    index = None if inputs.row_index is None else inputs.row_index.contiguous()
    bias = None if inputs.bias is None else inputs.bias.float().contiguous()
    out = x.new_empty((x.shape[0], inputs.out_features))
    adapters = [(0, b.data_ptr(), b.shape[1], 1.0, DTYPE_CODES[b.dtype]) for b in factors]
    epilogue = [0 if each is None else each.data_ptr() for each in (table, index, bias)]
    _many(module, inputs, x, hidden, adapters, epilogue, out)
    return out


def _many(
    module: ModuleType,
    inputs: QLoRAInputs,
    left: Tensor,
    hidden: list[Tensor],
    adapters: list[tuple[int, int, int, float, int]],
    epilogue: list[int] | None,
    out: Tensor,
) -> None:
    """Run the native product of many tokens: forward with an epilogue, or the gradient of x."""
    joined = torch.cat(hidden, dim=1) if hidden else left
    ranks = [each.shape[1] for each in hidden]
    m, terms = left.shape
    scratch = left.new_empty(module.qlora_linear_many_scratch(terms, ranks))
    arguments = (_weight(inputs), (left.data_ptr(), m, joined.data_ptr()), sum(ranks), adapters)
    pointers = (scratch.data_ptr(), out.data_ptr())
    module.qlora_linear_many(_BEST, epilogue is None, *arguments, epilogue or [0, 0, 0], *pointers)


def _forward_many(module: ModuleType, inputs: QLoRAInputs) -> Tensor:
    dtype = _product_dtype(inputs.x.dtype)
    (m, k), n = inputs.x.shape, inputs.out_features
    ranks = [a.shape[0] for a in inputs.a]
    width = k + sum(ranks)
    joined = inputs.x.new_empty((m, width), dtype=dtype)
    x = joined[:, :k]
    x.copy_(inputs.x)
    column = k
    for i, a in enumerate(inputs.a):
        hidden = _gate(inputs, i, _product(x, a.to(dtype).t()))
        joined[:, column : column + ranks[i]] = hidden
        column += ranks[i]
    out = inputs.x.new_empty((m, n), dtype=dtype)
    step = _strip(width, n, dtype)
    buffer = inputs.x.new_empty((step, width), dtype=dtype)
    for start in range(0, n, step):
        stop = min(n, start + step)
        strip = buffer[: stop - start]
        _dequantize(module, inputs, (start, stop, 0, k), strip)
        column = k
        for b, rank in zip(inputs.b, ranks, strict=True):
            strip[:, column : column + rank] = b[start:stop]
            column += rank
        _product(joined, strip.t(), out[:, start:stop])
    return _epilogue(module, inputs, out).to(inputs.x.dtype)


def _product(a: Tensor, b: Tensor, out: Tensor | None = None) -> Tensor:
    # PyTorch's float32 product gives other bits with other numbers of threads.
    if a.dtype != torch.float32:
        return torch.mm(a, b) if out is None else torch.mm(a, b, out=out)
    (m, k), n = a.shape, b.shape[1]
    if out is None:
        out = a.new_empty((m, n))
    left = (a.data_ptr(), *a.stride())
    right = (b.data_ptr(), *b.stride())
    target = (out.data_ptr(), out.stride(0))
    _module().qlora_linear_product(_BEST, left, right, target, (m, n, k))
    return out


def _epilogue(module: ModuleType, inputs: QLoRAInputs, out: Tensor) -> Tensor:
    if inputs.row_table is None or inputs.row_index is None:
        return out if inputs.bias is None else out.add_(inputs.bias)
    table, index = inputs.row_table.float().contiguous(), inputs.row_index.contiguous()
    if inputs.bias is not None:
        # Their sum is made in float32 and added once: large values in them may cancel.
        bias = inputs.bias.float()[None]
        table, index = torch.cat([bias, table + bias]), index + 1
    pointers = (out.data_ptr(), table.data_ptr(), index.data_ptr())
    module.qlora_linear_add_rows(_BEST, DTYPE_CODES[out.dtype], *pointers, *out.shape)
    return out


def _strip(width: int, count: int, dtype: torch.dtype) -> int:
    rows = _STRIP_BYTES // (width * dtype.itemsize)
    return min(count, max(_CHUNK, rows // _CHUNK * _CHUNK))


def _dequantize(
    module: ModuleType, inputs: QLoRAInputs, panel: tuple[int, int, int, int], out: Tensor
) -> None:
    code, stride = DTYPE_CODES[out.dtype], out.stride(0)
    module.qlora_linear_dequantize(_BEST, _weight(inputs), panel, code, out.data_ptr(), stride)


def _grad_x(
    module: ModuleType, inputs: QLoRAInputs, grad: Tensor, upstream: list[Tensor]
) -> Tensor:
    n, k = inputs.shape
    if _multiplies_pairs(grad.dtype) and cannot_pack(inputs.shape, inputs.block_size) is None:
        found = grad.new_empty((grad.shape[0], k))
        sides = [a.to(grad.dtype).contiguous() for a in inputs.a]
        adapters = [(a.data_ptr(), 0, a.shape[0], 1.0, DTYPE_CODES[a.dtype]) for a in sides]
        _many(module, inputs, grad.contiguous(), upstream, adapters, None, found)
        return found
    joined = torch.cat([grad, *upstream], dim=1) if upstream else grad
    height = joined.shape[1]
    out = grad.new_empty((grad.shape[0], k))
    step = _strip(height, k, grad.dtype)
    buffer = grad.new_empty(height * step)
    for start in range(0, k, step):
        stop = min(k, start + step)
        strip = buffer[: height * (stop - start)].view(height, stop - start)
        _dequantize(module, inputs, (0, n, start, stop), strip)
        row = n
        for a in inputs.a:
            strip[row : row + a.shape[0]] = a[:, start:stop]
            row += a.shape[0]
        _product(joined, strip, out[:, start:stop])
    return out.to(inputs.x.dtype)


def _grad_row_table(module: ModuleType, inputs: QLoRAInputs, grad: Tensor) -> Tensor:
    if inputs.row_table is None or inputs.row_index is None:
        raise ValueError("row_table: a gradient was asked for, but there is none")
    index = checked_rows(inputs)
    if index is None:
        raise ValueError("row_index: a gradient of row_table was asked for, but there is none")
    grad, index = grad.contiguous(), index.contiguous()
    table = grad.new_empty(inputs.row_table.shape, dtype=torch.float32)
    pointers = (grad.data_ptr(), index.data_ptr(), table.data_ptr())
    shape = (*grad.shape, table.shape[0])
    module.qlora_linear_sum_rows(_BEST, DTYPE_CODES[grad.dtype], *pointers, *shape)
    return table.to(inputs.row_table.dtype)


def _grad_bias(inputs: QLoRAInputs, grad: Tensor) -> Tensor:
    if inputs.bias is None:
        raise ValueError("bias: a gradient was asked for, but there is none")
    return grad.float().sum(0).to(inputs.bias.dtype)
