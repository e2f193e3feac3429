"""Checks of a layer's arguments; those of its forward are the operator's, which runs them itself.

Each raises ``TypeError`` for a type or dtype and ``ValueError`` for a value, naming the argument.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from collavo_kernels._validation import REFERENCE_DTYPES, expect_tensor
from collavo_kernels.ops.qlora_linear import LoRAAdapter
from collavo_kernels.ops.qlora_linear.inputs import MAX_MASKED_ADAPTERS


def check_options(adapters: Sequence[str], rank: int, dropout: float) -> None:
    """Check what a layer with adapters is made with."""
    if isinstance(adapters, str) or len(set(adapters)) != len(adapters):
        raise ValueError(f"adapters: expected a tuple of distinct names, got {adapters!r}")
    if rank < 1:
        raise ValueError(f"rank: expected at least 1, got {rank}")
    if not 0.0 <= dropout < 1.0:
        raise ValueError(f"dropout: expected a probability in [0, 1), got {dropout}")


def check_dtypes(**dtypes: torch.dtype) -> None:
    """Check that each is floating; the keyword is the argument's name."""
    for name, dtype in dtypes.items():
        if dtype not in REFERENCE_DTYPES:
            names = ", ".join(str(each).removeprefix("torch.") for each in REFERENCE_DTYPES)
            raise TypeError(f"{name}: expected one of {names}, got {dtype}")


def check_linear(linear: nn.Module) -> None:
    """Check that a module is a dense linear layer."""
    if not isinstance(linear, nn.Linear):
        raise TypeError(f"linear: expected nn.Linear, got {type(linear).__name__}")
    expect_tensor(
        "linear.weight",
        linear.weight,
        shape=(linear.out_features, linear.in_features),
        dtypes=REFERENCE_DTYPES,
        hint="from_bitsandbytes() takes a 4-bit layer",
    )


def check_branches(
    x: Tensor, adapters: list[LoRAAdapter], mask: Tensor | None, out_features: int
) -> None:
    """Check what the fused operator checks where the branches run beside it."""
    for i, (a, b, _) in enumerate(adapters):
        expect_tensor(f"adapters[{i}].a", a, shape=("R", x.shape[-1]), device=x.device)
        expect_tensor(f"adapters[{i}].b", b, shape=(out_features, a.shape[0]), device=x.device)
    if mask is None:
        return
    expect_tensor("adapter_mask", mask, shape=x.shape[:-1], dtypes=(torch.uint8,), device=x.device)
    if len(adapters) > MAX_MASKED_ADAPTERS:
        raise ValueError(
            f"adapters: expected at most {MAX_MASKED_ADAPTERS} beside adapter_mask (a bit each), "
            f"got {len(adapters)}"
        )
