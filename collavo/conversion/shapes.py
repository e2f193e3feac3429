"""The tensors that a configuration asks for, from a model that takes no memory."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import collavo._requirements  # noqa: F401  (before what it checks)

import torch

from collavo.configuration import CollavoConfig
from collavo.model.linear import CollavoLinear
from collavo.model.llava import CollavoForConditionalGeneration

Shapes = Mapping[str, tuple[int, ...]]


def shapes_of(config: CollavoConfig) -> dict[str, tuple[int, ...]]:
    """Return name and shape of every tensor of a dense model.

    Args:
        config: The model's; ``quantize`` has to be None.
    """
    model = on_meta(config)
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


def decoder_weights(config: CollavoConfig) -> list[str]:
    """Return the names of the weights that ``quantize`` brings to 4 bits.

    Args:
        config: The model's.
    """
    modules = on_meta(config).named_modules()
    return [f"{name}.weight" for name, module in modules if isinstance(module, CollavoLinear)]


def on_meta(config: CollavoConfig) -> Any:
    """Return a model without weights.

    Args:
        config: The model's.
    """
    with torch.device("meta"):
        return CollavoForConditionalGeneration(copy.deepcopy(config))
