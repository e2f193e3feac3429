"""When a layer's 4-bit weight goes into panels, the order that CPU kernels stream, by itself.

A layer has one packing at a time. Bitsandbytes' order is the one that moves, shards, is traced and
is saved; panels are for calls that run now, on the CPU, in a process that owns its weights.
"""

from __future__ import annotations

import threading
from typing import Any, cast

import torch
from torch import Tensor, nn

from collavo_kernels._native import native
from collavo_kernels.ops.qlora_linear import NF4Weight
from collavo_kernels.ops.qlora_linear.nf4.panels import cannot_pack

PACKING = threading.Lock()
"""Held while any layer changes its order: one copy at a time, and one packing of a layer."""


def is_plain(weight: Tensor) -> bool:
    """Tell whether a weight is an ordinary parameter: no shard, no fake, nothing put in its place.

    Args:
        weight: What a layer has as its ``weight``.
    """
    return type(weight) is nn.Parameter


def refusal(base: NF4Weight | Tensor) -> str | None:
    """Say why a base cannot change its order, or None.

    Args:
        base: A layer's base.
    """
    if not isinstance(base, NF4Weight):
        return "it is dense"
    if not is_plain(base.packed):
        return f"it is a {type(base.packed).__name__}; change its order before it is sharded"
    return None


def waits(weight: Tensor, shape: tuple[int, int], block_size: int) -> str | None:
    """Say why a forward leaves a weight in bitsandbytes' order, or None.

    Args:
        weight: A layer's codes, in bitsandbytes' order.
        shape: ``(N, K)``.
        block_size: Elements per scale.
    """
    # The first two answer for most layers that never pack, so they stay cheap.
    if weight.device.type != "cpu" or not is_plain(weight):
        return "it is not an ordinary parameter on the CPU"
    reason = cannot_pack(shape, block_size)
    if reason is None and native() is None:
        reason = "the compiled kernels are not there"
    return reason or _watched() or _managed(weight)


def _watched() -> str | None:
    traced = torch._C._is_tracing() or torch._C._len_torch_dispatch_stack() > 0
    if traced or torch._C._functorch.peek_interpreter_stack() is not None:
        return "a trace, a mode or a transform is watching"
    return None


def _managed(weight: Tensor) -> str | None:
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return "torch.distributed is initialised: FSDP and DDP manage parameters themselves"
    if cast(Any, weight).is_shared():
        return "other processes share the memory"
    return None
