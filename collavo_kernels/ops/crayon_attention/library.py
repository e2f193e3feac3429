"""PyTorch's library attention on NVIDIA, between this operator's own preparation and backward.

One launch adds the crayon to q, k and v and rotates; cuDNN's attention or FlashAttention, called
through the aten operators that return the log-sum-exp, does the rest. Nothing waits for the device
and no global setting is read or changed. The backward is the Triton backend's: it needs only the
log-sum-exp, and its bits do not change from run to run. Neither has been timed against the Triton
forward yet, so this backend serves only when asked for by name (``backend="library"``).
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any, cast

import torch
from torch import Tensor

from collavo_kernels._backends import device_of, triton_reason
from collavo_kernels.ops.crayon_attention.inputs import (
    LARGEST_HEAD_DIM,
    AttentionInputs,
    AttentionOutputGrads,
    AttentionResult,
    AttentionSaved,
    Gradients,
    Wanted,
)

_ALIGNED = 8  # elements of 16 bits that make the 16 bytes which both libraries load at a time
_LARGEST_HEAD_DIM = {"cudnn": 128, "flash": LARGEST_HEAD_DIM}
_FIRST_CUDNN = 90000
_OPERATORS = {
    "cudnn": "_scaled_dot_product_cudnn_attention",
    "flash": "_scaled_dot_product_flash_attention",
}


def unavailable() -> str | None:
    """Say why the backend cannot run here, or None."""
    if (reason := triton_reason()) is not None:
        return f"{reason}; it prepares q, k and v"
    if torch.version.cuda is None:
        return "this PyTorch is not built for CUDA"
    return None


def declines(inputs: AttentionInputs) -> str | None:
    """Say why these inputs are not taken, or None."""
    from collavo_kernels.ops.crayon_attention.triton import launch

    if inputs.key_range is not None:
        return "PyTorch's library attention takes no key range; Triton serves padded batches"
    if inputs.window is not None:
        return "PyTorch's library attention takes no window"
    if inputs.q.dtype not in (torch.bfloat16, torch.float16):
        return "PyTorch's library attention takes bfloat16 and float16"
    if inputs.softmax_scale <= 0:
        return "PyTorch's library attention takes positive scales"
    if inputs.q.numel() == 0:
        return "there is nothing to attend to"
    if library_for(inputs) is None:
        size, there = inputs.q.shape[-1], libraries(inputs.q.device)
        return f"of PyTorch's libraries {', '.join(there) or 'none'} is here for head dim {size}"
    return launch.declines(inputs)


def library_for(inputs: AttentionInputs) -> str | None:
    """Return the library that attends: the one place where shapes choose.

    cuDNN comes first where it is: on Hopper and later it is the faster of the two by what others
    publish. It takes no single key.
    """
    _, length, _, size = inputs.q.shape
    for library in libraries(inputs.q.device):
        fits = size % _ALIGNED == 0 and size <= _LARGEST_HEAD_DIM[library]
        if fits and (library != "cudnn" or length > 1):
            return library
    return None


@lru_cache
def libraries(device: torch.device) -> tuple[str, ...]:
    """Return the libraries that a device has, the preferred one first."""
    if device.type != "cuda" or torch.cuda.get_device_capability(device) < (8, 0):
        return ()
    found = ("flash",) if torch.backends.cuda.is_flash_attention_available() else ()
    version = cast(Any, torch.backends.cudnn).version()
    modern = torch.cuda.get_device_capability(device) >= (9, 0)
    return ("cudnn", *found) if modern and (version or 0) >= _FIRST_CUDNN else found


def forward(inputs: AttentionInputs) -> AttentionResult:
    """Prepare q, k and v in one launch and let the library attend."""
    from collavo_kernels.ops.crayon_attention.triton import launch

    inputs = launch.readable(inputs)
    library = library_for(inputs)
    if library is None:
        raise RuntimeError(f"crayon_attention: {declines(inputs)}")
    with device_of(inputs.q):
        ready = launch.prepared(inputs, query=True)
        out, lse = _attend(library, ready, inputs)
    return launch.result(inputs, ready, out, lse)


def backward(
    inputs: AttentionInputs, saved: AttentionSaved, grads: AttentionOutputGrads, wanted: Wanted
) -> Gradients:
    """Return the gradients, computed by the Triton kernels."""
    from collavo_kernels.ops.crayon_attention.triton import launch

    return launch.backward(inputs, saved, grads, wanted)


def _attend(
    library: str, ready: tuple[Tensor, Tensor, Tensor], inputs: AttentionInputs
) -> tuple[Tensor, Tensor]:
    """Call the library; return out ``[B, S, H, D]`` and the log-sum-exp ``[B, H, S]``.

    Both libraries read tensors by their strides, so heads come first without a copy, and both take
    fewer key heads than query heads.
    """
    query, key, value = (_aligned(x).transpose(1, 2) for x in ready)
    # cuDNN: no bias, but the log-sum-exp.
    extra = (None, True) if library == "cudnn" else ()
    found = operator_of(library)(
        query, key, value, *extra, 0.0, inputs.causal, False, scale=inputs.softmax_scale
    )
    out, lse = found[0].transpose(1, 2).contiguous(), found[1]
    # cuDNN keeps a last dimension of one.
    return out, lse.reshape(*query.shape[:3]).contiguous()


def operator_of(library: str) -> Any:
    """Return the aten operator of a library."""
    return getattr(torch.ops.aten, _OPERATORS[library]).default


def _aligned(x: Tensor) -> Tensor:
    """Return x with every head's row at a multiple of 16 bytes."""
    fits = x.data_ptr() % 16 == 0 and all(n % _ALIGNED == 0 for n in x.stride()[:-1])
    return x if fits else x.clone(memory_format=torch.contiguous_format)
