"""What no source has: an untrained crayon, and an untrained projector."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from collavo.conversion.plan import Output, Tensors
from collavo.model.inventory import part_of


def plan_crayon(tensors: Tensors, model: nn.Module) -> None:
    """Plan to draw the crayon, a module at a time; its adapters' like start without effect.

    Args:
        tensors: Gets the entries.
        model: The target's, on "meta".
    """
    if plan_drawn(tensors, model, lambda name: part_of(f"{name}.") is not None):
        how = "an untrained crayon, which has no effect yet, is added"
        tensors.note(f"{how}: train it with collavo train --stage cpt")


def plan_drawn(
    tensors: Tensors,
    model: nn.Module,
    wanted: Callable[[str], bool],
    dtype: torch.dtype | None = None,
) -> int:
    """Plan to draw modules as their ``reset_parameters`` does, with torch's global generator.

    Args:
        tensors: Gets an entry for each module.
        model: The target's, on "meta".
        wanted: Which modules, by name; those without ``reset_parameters`` are passed over.
        dtype: Of what is drawn; None takes each tensor's own in ``model``.

    Returns:
        How many tensors will be drawn.
    """
    drawn = 0
    owners = [
        (name, module)
        for name, module in model.named_modules()
        if wanted(name) and hasattr(module, "reset_parameters")
    ]
    taken: tuple[str, ...] = ()
    for name, module in owners:
        if name.startswith(taken or ("\0",)):
            continue  # drawn with the module that it is in
        taken = (*taken, f"{name}.")
        outputs = [
            Output(f"{name}.{key}", tuple(value.shape), dtype or value.dtype)
            for key, value in module.state_dict().items()
        ]
        tensors.make(outputs, [], partial(_drawn, module, dtype))
        drawn += len(outputs)
    return drawn


def _drawn(module: nn.Module, dtype: torch.dtype | None) -> list[Tensor]:
    made: Any = copy.deepcopy(module).to_empty(device="cpu")
    made.reset_parameters()
    return [value.detach().to(dtype or value.dtype) for value in made.state_dict().values()]
