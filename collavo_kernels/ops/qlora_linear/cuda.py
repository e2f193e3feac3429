"""CUDA C++ for sm_80 and later, on bitsandbytes' own bytes: decoding, prefill and backward.

Up to ``FEW_TOKENS`` tokens two launches do everything and stream the packed weight. Beyond that the
weight is decoded into a buffer, with the adapters beside it, and PyTorch's matrix product runs on
it: ``[x | h] [W | B]^T`` gives the whole sum in one float32 accumulation. The backward does the
same with columns, ``[g | h'] [W; A]``. A weight that is larger than the buffer comes in strips; of
columns there, since strips of rows would have to be summed over in memory, in float32 or with a
rounding each.
"""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from collavo_kernels._backends import device_of
from collavo_kernels._derivative import Nothing
from collavo_kernels._flags import error_word
from collavo_kernels._native import DTYPE_CODES, cuda_check, cuda_library, cuda_reason
from collavo_kernels.ops.qlora_linear.cuda_arguments import (
    AddRowsArguments,
    Arguments,
    Branches,
    DecodeArguments,
    StripArguments,
    SumRowsArguments,
    aligned,
    branch_of,
    epilogue_fields,
    readable,
    weight_fields,
)
from collavo_kernels.ops.qlora_linear.inputs import (
    MAX_MASKED_ADAPTERS,
    PANELS_DECLINE,
    Gradients,
    QLoRAInputs,
    QLoRAOutputGrads,
    QLoRAResult,
    Wanted,
    gated,
    scaled,
)

FEW_TOKENS = 16
_CHUNK = 64
_MAX_DECODED_K = 1 << 25
_RANK_TILE = 16
# Rows of 16-bit numbers that start at multiples of 16 bytes.
_ALIGNED = 8
# Decoding and multiplying strips that stay in L2 was slower on an H200 than one product of all:
# each strip ends in a wave that leaves most of the processors idle.
_STRIP_BYTES = 96 << 20
# From one to the other Triton, which reads the packed weight, took 0.5 to 0.95 of the time there.
_LEAST_YIELDED, _MOST_YIELDED = FEW_TOKENS + 1, 128
_threads = threading.local()

unavailable = cuda_reason


def declines(inputs: QLoRAInputs) -> str | None:
    """Say why these inputs are not taken, or None."""
    if inputs.scales is None:
        return "the weight is dense: the reference serves"
    if inputs.in_panels:
        return PANELS_DECLINE
    if inputs.x.dtype not in DTYPE_CODES:
        return "takes float32, bfloat16 and float16; float64 is the reference's"
    if inputs.x.numel() == 0 or inputs.out_features == 0:
        return "there is nothing to compute"
    if len(inputs.a) > MAX_MASKED_ADAPTERS:
        return f"it takes {MAX_MASKED_ADAPTERS} adapters, not {len(inputs.a)}"
    return None


def yields(inputs: QLoRAInputs) -> str | None:
    """Say why Triton serves these inputs better, or None."""
    tokens = inputs.x.numel() // inputs.x.shape[-1]
    if inputs.x.dtype == torch.float32:
        return "PyTorch's product may round float32 to fewer bits, where a program allows it"
    if _LEAST_YIELDED <= tokens <= _MOST_YIELDED:
        return f"{_LEAST_YIELDED} to {_MOST_YIELDED} tokens are too few to decode the weight for"
    if tokens <= FEW_TOKENS and not _is_whole(inputs):
        return "few tokens meet whole chunks of 64 columns here"
    return None


def forward(inputs: QLoRAInputs) -> QLoRAResult:
    """Return ``[M, N]`` in x's dtype, on the current stream; nothing waits for the device."""
    few = inputs.x.shape[0] <= FEW_TOKENS and inputs.x.dtype != torch.float32
    if few and _is_whole(inputs):
        return QLoRAResult(_forward_few(inputs))
    return QLoRAResult(_forward_many(inputs))


def backward(
    inputs: QLoRAInputs, saved: Nothing, grads: QLoRAOutputGrads, wanted: Wanted
) -> Gradients:
    """Return the gradients that are wanted."""
    x, grad = inputs.x, grads.out.contiguous()
    dtype = x.dtype
    _enter_context(grad)
    one, (a, b), want_a, want_b = _grouped(inputs, wanted)
    grads_a: list[Tensor | None] = []
    grads_b: list[Tensor | None] = []
    upstream: list[Tensor] = []
    for i in range(len(a)):
        grad_a = grad_b = None
        if wanted.x or want_a[i]:
            upstream.append(scaled(inputs, i, torch.mm(grad, b[i].to(dtype))))
            if want_a[i]:
                grad_a = torch.mm(upstream[-1].t(), gated(inputs, i, x))
        if want_b[i]:
            hidden = scaled(inputs, i, F.linear(x, a[i].to(dtype)))
            grad_b = torch.mm(gated(inputs, i, grad).t(), hidden)
        grads_a.append(grad_a)
        grads_b.append(grad_b)
    return Gradients(
        x=_grad_x(inputs, grad, upstream) if wanted.x else None,
        weight=None,
        row_table=_grad_row_table(inputs, grad) if wanted.row_table else None,
        bias=_grad_bias(inputs, grad) if wanted.bias else None,
        a=_each(grads_a, inputs.a, wanted.a, 0, one),
        b=_each(grads_b, inputs.b, wanted.b, 1, one),
    )


def _alike(inputs: QLoRAInputs) -> bool:
    """Tell whether nothing tells the adapters apart: they are one then, with all the ranks."""
    return len(inputs.a) > 1 and inputs.adapter_mask is None and len(set(inputs.scaling)) == 1


def _grouped(
    inputs: QLoRAInputs, wanted: Wanted
) -> tuple[bool, tuple[list[Tensor], list[Tensor]], list[bool], list[bool]]:
    """Return whether the adapters are one, their factors, and which gradients of those to make."""
    if not _alike(inputs):
        return False, (inputs.a, inputs.b), wanted.a, wanted.b
    factors = [torch.cat(inputs.a)], [torch.cat(inputs.b, dim=1)]
    return True, factors, [any(wanted.a)], [any(wanted.b)]


def _each(
    grads: list[Tensor | None], of: list[Tensor], wanted: list[bool], dim: int, one: bool
) -> list[Tensor | None]:
    """Return the adapters' gradients in their dtypes; those of one are taken apart along ``dim``.

    No two of them share memory.
    """
    if not one:
        return [
            None if grad is None else grad.to(each.dtype)
            for grad, each in zip(grads, of, strict=True)
        ]
    if grads[0] is None:
        return [None] * len(of)
    parts = torch.split(grads[0], [each.shape[dim] for each in of], dim=dim)
    return [
        part.to(each.dtype, copy=True, memory_format=torch.contiguous_format) if want else None
        for part, each, want in zip(parts, of, wanted, strict=True)
    ]


def _is_whole(inputs: QLoRAInputs) -> bool:
    """Say whether every row of the weight is made of chunks that have one scale."""
    k = inputs.x.shape[-1]
    return k % _CHUNK == 0 and k <= _MAX_DECODED_K and inputs.block_size >= _CHUNK


def _enter_context(on: Tensor) -> None:
    """Make a thread the device's: cuBLAS, called first in one of autograd's threads, warns."""
    if not getattr(_threads, "entered", False):
        torch.zeros(1, device=on.device)
        _threads.entered = True


def _forward_few(inputs: QLoRAInputs) -> Tensor:
    x = aligned(inputs.x)
    m, n = x.shape[0], inputs.out_features
    out = x.new_empty((m, n))
    ranks = sum(_round_up(a.shape[0], _RANK_TILE) for a in inputs.a)
    mask = inputs.adapter_mask
    branches = [
        branch_of(a.shape[0], readable(a, x), readable(b, x), scaling)
        for a, b, scaling in zip(inputs.a, inputs.b, inputs.scaling, strict=True)
    ]
    arguments = DecodeArguments(
        **weight_fields(inputs),
        **epilogue_fields(inputs),
        adapters=Branches(branches),
        num_adapters=len(branches),
        adapter_mask=None if mask is None else mask.contiguous(),
        x=x,
        hidden=x.new_empty((_round_up(m, 8), ranks)),
        out=out,
        m=m,
        dtype=DTYPE_CODES[x.dtype],
    )
    _launch("collavo_qlora_linear_decode", x, arguments)
    return out


def _forward_many(inputs: QLoRAInputs) -> Tensor:
    x = inputs.x.contiguous()
    m, n = x.shape[0], inputs.out_features
    factors = [torch.cat(inputs.a)] if _alike(inputs) else inputs.a
    hidden = [
        scaled(inputs, i, F.linear(x, a.to(x.dtype))) for i, a in enumerate(factors) if a.shape[0]
    ]
    joined = _join(x, hidden)
    width = joined.shape[1]
    out = x.new_empty((m, n))
    weight = weight_fields(inputs)
    branches = Branches([branch_of(b.shape[1], b=readable(b, x)) for b in inputs.b])
    for start, stop, buffer in _strips(joined, n):
        strip = buffer.view(stop - start, width)
        _fill_strip(weight, branches, strip, row=start)
        torch.mm(joined, strip.t(), out=out[:, start:stop])
    if inputs.row_table is not None or inputs.bias is not None:
        arguments = AddRowsArguments(
            **epilogue_fields(inputs), out=out, m=m, n=n, dtype=DTYPE_CODES[x.dtype]
        )
        _launch("collavo_qlora_linear_add_rows", x, arguments)
    return out


def _grad_x(inputs: QLoRAInputs, grad: Tensor, upstream: list[Tensor]) -> Tensor:
    k = inputs.x.shape[1]
    joined = _join(grad, upstream)
    height = joined.shape[1]
    out = grad.new_empty((grad.shape[0], k))
    weight = weight_fields(inputs)
    branches = Branches([branch_of(a.shape[0], a=readable(a, grad)) for a in inputs.a])
    for start, stop, buffer in _strips(joined, k):
        strip = buffer.view(height, stop - start)
        _fill_strip(weight, branches, strip, column=start, below=True)
        torch.mm(joined, strip, out=out[:, start:stop])
    return out


def _grad_row_table(inputs: QLoRAInputs, grad: Tensor) -> Tensor:
    if inputs.row_table is None or inputs.row_index is None:
        raise ValueError("row_table: a gradient was asked for, but there is none")
    out = grad.new_zeros(inputs.row_table.shape, dtype=torch.float32)
    if out.numel():
        arguments = SumRowsArguments(
            grad_out=grad,
            row_index=inputs.row_index.contiguous(),
            errors=error_word(grad.device),
            grad_row_table=out,
            m=grad.shape[0],
            n=grad.shape[1],
            table_rows=out.shape[0],
            dtype=DTYPE_CODES[grad.dtype],
        )
        _launch("collavo_qlora_linear_sum_rows", grad, arguments)
    return out.to(inputs.row_table.dtype)


def _grad_bias(inputs: QLoRAInputs, grad: Tensor) -> Tensor:
    if inputs.bias is None:
        raise ValueError("bias: a gradient was asked for, but there is none")
    return grad.sum(0, dtype=torch.float32).to(inputs.bias.dtype)


def _join(left: Tensor, parts: list[Tensor]) -> Tensor:
    ranks = sum(part.shape[1] for part in parts)
    if not ranks:
        return left
    missing = -(left.shape[1] + ranks) % _ALIGNED
    return torch.cat([left, *parts, left.new_zeros((left.shape[0], missing))], dim=1)


def _strips(joined: Tensor, count: int) -> Iterator[tuple[int, int, Tensor]]:
    """Cut ``count`` rows or columns of the weight into as few strips as the buffer allows.

    Yields:
        The first, one past the last, and memory for them; it is the same memory every time.
    """
    width, itemsize = joined.shape[1], joined.element_size()
    strips = -(-width * count * itemsize // _STRIP_BYTES)
    step = min(count, _round_up(-(-count // strips), _ALIGNED))
    memory = joined.new_empty(step * width)
    for start in range(0, count, step):
        stop = min(count, start + step)
        yield start, stop, memory[: (stop - start) * width]


def _fill_strip(
    weight: dict[str, Any],
    branches: Branches,
    out: Tensor,
    row: int = 0,
    column: int = 0,
    below: bool = False,
) -> None:
    """Decode a part of ``[W | B ..]``, or of ``[W; A ..]``, into ``out``; zeros beyond the factors.

    Args:
        weight: As :func:`weight_fields` gives it.
        branches: The adapters with B, or with A if ``below``.
        out: Contiguous, in x's dtype; its shape is the part's.
        row: The part's first row.
        column: Its first column.
        below: Whether the factors lie below the weight.
    """
    arguments = StripArguments(
        **weight,
        adapters=branches,
        num_adapters=len(branches),
        below=below,
        row=row,
        rows=out.shape[0],
        column=column,
        columns=out.shape[1],
        out=out,
        dtype=DTYPE_CODES[out.dtype],
    )
    _launch("collavo_qlora_linear_strip", out, arguments)


def _round_up(value: int, to: int) -> int:
    return -(-value // to) * to


def _library() -> ctypes.CDLL:
    library = cuda_library()
    if library is None:
        raise RuntimeError(f"qlora_linear: {cuda_reason()}")
    return library


def _launch(name: str, on: Tensor, arguments: Arguments) -> None:
    launcher = getattr(_library(), name)
    with device_of(on):
        # Not current_stream(): it makes an object, at a third of what the launch costs.
        stream = torch._C._cuda_getCurrentRawStream(on.get_device()) if on.is_cuda else 0
        error = launcher(ctypes.byref(arguments), ctypes.c_void_p(stream))
    cuda_check(error, name)
