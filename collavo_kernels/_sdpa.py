"""PyTorch's ``scaled_dot_product_attention`` where queries share keys, on every torch served."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

# Before 2.9 a CPU makes scores of S x S elements for ``enable_gqa``. A version compares itself with
# a string.
_TAKES_GQA = torch.__version__ >= "2.9"


@dataclass
class _Switch:
    """How many calls are inside, and what cuDNN's switch was before the first of them."""

    lock: threading.Lock = field(default_factory=threading.Lock)
    inside: int = 0
    before: bool = True


_switch = _Switch()


def grouped_attention(query: Tensor, key: Tensor, value: Tensor, **options: Any) -> Tensor:
    """Return ``softmax(scale q k^T) v``, H query heads on G heads of keys and values.

    Args:
        query: ``[B, H, S, D]``.
        key: ``[B, G, keys, D]``; G divides H.
        value: ``[B, G, keys, D]``.
        **options: As ``scaled_dot_product_attention`` takes them.

    Returns:
        ``[B, H, S, D]``.
    """
    if not query.is_cuda:
        return _attention(query, key, value, options)
    with sdpa_without_plans(query):
        return _attention(*folded(query, key, value, options)).reshape(query.shape)


def sdpa_without_plans(query: Tensor) -> AbstractContextManager[None]:
    """Keep PyTorch's ``scaled_dot_product_attention`` from cuDNN, which plans for every new shape.

    On Hopper cuDNN is PyTorch's first choice, and a plan takes it about a tenth of a second: for
    each token while a cache grows, for each prompt of a new length. FlashAttention and the
    memory-efficient kernels need none. Under ``torch.compile`` and on a CPU nothing is changed.

    Args:
        query: Any tensor of the call; tells the device.

    Returns:
        A context manager; within it PyTorch chooses among its other kernels.

    Example:
        >>> import torch
        >>> q = torch.randn(1, 2, 3, 8)
        >>> with sdpa_without_plans(q):
        ...     out = torch.nn.functional.scaled_dot_product_attention(q, q, q)
    """
    if not query.is_cuda or torch.compiler.is_compiling():
        return nullcontext()
    return cudnn_left_out()


@contextmanager
def cudnn_left_out() -> Iterator[None]:
    """Switch cuDNN's attention off and, as the last of all threads to leave, back to what it was.

    PyTorch's switches are the process's. The other kernels' stay as the user has them; where they
    are all off, nothing is changed.
    """
    cuda: Any = torch.backends.cuda
    others = (cuda.flash_sdp_enabled, cuda.mem_efficient_sdp_enabled, cuda.math_sdp_enabled)
    if not any(enabled() for enabled in others):
        yield
        return
    with _switch.lock:
        if _switch.inside == 0:
            _switch.before = cuda.cudnn_sdp_enabled()
            cuda.enable_cudnn_sdp(False)
        _switch.inside += 1
    try:
        yield
    finally:
        with _switch.lock:
            _switch.inside -= 1
            if _switch.inside == 0:
                cuda.enable_cudnn_sdp(_switch.before)


def folded(
    query: Tensor, key: Tensor, value: Tensor, options: dict[str, Any]
) -> tuple[Tensor, Tensor, Tensor, dict[str, Any]]:
    """Make the heads of a single query that share keys queries of one head, where a mask allows it.

    A GPU's kernels that take a mask take no shared keys: they would be copied for every head.
    """
    batch, heads, length, size = query.shape
    mask, kv_heads = options.get("attn_mask"), key.shape[1]
    for_all = mask is None or (mask.ndim == 4 and mask.shape[1] == mask.shape[2] == 1)
    if length != 1 or heads == kv_heads or not for_all or options.get("is_causal"):
        return query, key, value, options
    return query.reshape(batch, kv_heads, heads // kv_heads, size), key, value, options


def _attention(query: Tensor, key: Tensor, value: Tensor, options: dict[str, Any]) -> Tensor:
    shared = query.shape[1] // key.shape[1]
    if shared > 1 and _TAKES_GQA:
        options["enable_gqa"] = True
    elif shared > 1:
        key, value = (x.repeat_interleave(shared, dim=1) for x in (key, value))
    return F.scaled_dot_product_attention(query, key, value, **options)
