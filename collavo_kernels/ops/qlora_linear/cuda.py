"""CUDA C++ for decoding: up to 16 tokens, both adapters in the same two launches.

It is compiled for sm_80 and later and has not run on a GPU yet, so it serves only when asked for
by name (``backend="cuda"``).
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from collavo_kernels._flags import error_word
from collavo_kernels._native import DTYPE_CODES, cuda_check, cuda_library, cuda_reason
from collavo_kernels.ops.qlora_linear.inputs import MAX_MASKED_ADAPTERS, QLoRAInputs
from collavo_kernels.ops.qlora_linear.nf4 import block_count, split_scales

MAX_TOKENS = 16
_LAUNCHER = "collavo_qlora_linear_decode"


def unavailable() -> str | None:
    """Say why the backend cannot run here, or None."""
    return cuda_reason()


def declines(inputs: QLoRAInputs) -> str | None:
    """Say why the backend does not take these inputs, or None."""
    m, k = inputs.x.shape
    if inputs.scales is None:
        return "the weight is dense: PyTorch's own linear layer serves"
    if inputs.x.dtype not in (torch.bfloat16, torch.float16):
        return f"x is {inputs.x.dtype}, not bfloat16 or float16"
    if not 1 <= m <= MAX_TOKENS:
        return f"it takes 1 to {MAX_TOKENS} tokens, not {m}"
    if k % 64 or inputs.block_size < 64:
        return f"K = {k} in blocks of {inputs.block_size}: it needs whole blocks of 64 or more"
    if len(inputs.a) > MAX_MASKED_ADAPTERS:
        return f"it takes {MAX_MASKED_ADAPTERS} adapters, not {len(inputs.a)}"
    return None


def forward(inputs: QLoRAInputs) -> Tensor:
    """Return ``[M, N]`` in x's dtype, on the current stream; nothing waits for the device."""
    library, scales = cuda_library(), inputs.scales
    if library is None or scales is None:
        raise RuntimeError(f"qlora_linear: {cuda_reason() or 'the weight is dense'}")
    x = _aligned(inputs.x, 16)
    (m, k), n = x.shape, inputs.out_features
    out = x.new_empty((m, n))
    factors = [
        (_side(a, x.dtype), _side(b, x.dtype)) for a, b in zip(inputs.a, inputs.b, strict=True)
    ]
    hidden = x.new_empty((m, sum(a.shape[0] for a, _ in factors)), dtype=torch.float32)
    blocks = block_count(inputs.shape, inputs.block_size)
    parts = split_scales(scales, blocks, inputs.double_quant)
    table = None if inputs.row_table is None else inputs.row_table.float().contiguous()
    tensors = [
        x,
        _aligned(inputs.weight, 8),
        parts.absmax,
        parts.nested_absmax,
        parts.nested_code,
        parts.offset,
        None if inputs.adapter_mask is None else inputs.adapter_mask.contiguous(),
        table,
        None if inputs.row_index is None else inputs.row_index.contiguous(),
        None if inputs.bias is None else inputs.bias.float().contiguous(),
        error_word(x.device),
        hidden,
        out,
    ]
    rows = 0 if table is None else table.shape[0]
    shift = inputs.block_size.bit_length() - 1
    sizes = [m, n, k, rows, shift, len(factors), DTYPE_CODES[x.dtype]]
    adapters = [
        entry
        for a, b in factors
        for entry in (a.data_ptr(), b.data_ptr(), a.shape[0], int(a.dtype == torch.float32))
    ]
    launcher = getattr(library, _LAUNCHER)
    launcher.restype = ctypes.c_int
    with torch.cuda.device(x.device):
        stream = torch.cuda.current_stream().cuda_stream
        error = launcher(
            _array(ctypes.c_void_p, [None if t is None else t.data_ptr() for t in tensors]),
            _array(ctypes.c_int64, sizes),
            _array(ctypes.c_int64, adapters),
            _array(ctypes.c_float, inputs.scaling),
            ctypes.c_void_p(stream),
        )
    cuda_check(error, _LAUNCHER)
    return out


def _array(kind: Any, values: Sequence[float | None]) -> Any:
    return (kind * max(1, len(values)))(*values)


def _aligned(tensor: Tensor, alignment: int) -> Tensor:
    tensor = tensor.contiguous()
    return tensor.clone() if tensor.data_ptr() % alignment else tensor


def _side(factor: Tensor, dtype: torch.dtype) -> Tensor:
    return factor.to(dtype if factor.dtype == dtype else torch.float32).contiguous()
