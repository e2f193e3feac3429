"""The library ``collavo`` of ``torch.library``, and what is the same for every operator in it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch

LIBRARY: Any = cast(Any, torch.library).Library("collavo", "FRAGMENT")
AUTOCAST = {"cpu": torch._C.DispatchKey.AutocastCPU, "cuda": torch._C.DispatchKey.AutocastCUDA}
ANY_AUTOCAST = torch._C.DispatchKeySet(AUTOCAST["cpu"]) | torch._C.DispatchKeySet(AUTOCAST["cuda"])


def define(
    name: str, signature: str, kernel: Callable[..., Any], fake: Callable[..., Any]
) -> torch._ops.OpOverload[..., Any]:
    """Register an operator: its kernel for all devices, its fake, and that vmap is refused.

    Args:
        name: Its name.
        signature: Its schema behind the name.
        kernel: What runs below autograd.
        fake: The same without values.
    """

    def refuse_vmap(*_: Any, **__: Any) -> Any:
        raise NotImplementedError(
            f"{name}: torch.vmap is not supported; call the operator on the whole batch"
        )

    LIBRARY.define(name + signature)
    LIBRARY.impl(name, kernel, "CompositeExplicitAutograd")
    for key in ("FuncTorchBatched", "Batched"):  # torch.vmap, is_grads_batched
        LIBRARY.impl(name, refuse_vmap, key)
    torch.library.register_fake(f"collavo::{name}", fake, lib=LIBRARY)
    return cast("torch._ops.OpOverload[..., Any]", getattr(torch.ops.collavo, name).default)
