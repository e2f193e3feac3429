"""NF4 parameters of a module in state dicts: bitsandbytes' entries, sharded or not."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from collavo_kernels.ops.qlora_linear import NF4Weight
from collavo_kernels.ops.qlora_linear.nf4.interop import SCALE_KEYS


def take(entries: dict[str, Tensor], name: str) -> NF4Weight | None:
    """Take an NF4 weight's entries out of a state dict; None if it has none of them.

    Raises:
        ValueError: if the entries are incomplete or corrupt; the entry is named.
    """
    names = [name, *(f"{name}.{key}" for key in SCALE_KEYS)]
    if not any(each in entries for each in names):
        return None
    weight = NF4Weight.from_state_dict(entries, name)
    for each in names:
        entries.pop(each, None)
    return weight


def whole(parameter: nn.Parameter) -> Tensor:
    """Return a parameter's bytes; a sharded one is gathered, so all processes have to take part."""
    plain: Any = parameter.detach()
    gathered: Tensor = plain.full_tensor() if hasattr(plain, "full_tensor") else plain
    return gathered


def like(value: Tensor, parameter: nn.Parameter) -> Tensor:
    """Return a value laid out as a parameter is: sharded alike if that is sharded."""
    sharded: Any = parameter.detach()
    if not hasattr(sharded, "full_tensor"):
        return value
    from torch.distributed.tensor import distribute_tensor

    mesh, placements = sharded.device_mesh, sharded.placements
    return distribute_tensor(value.to(sharded.device), mesh, placements)
