"""The ways that this package's parts take a place in a stock decoder, and bitsandbytes' 4 bits."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import bitsandbytes as bnb
import torch
from torch import nn

from collavo_kernels.nn import CrayonAttention, DualQLoRALinear, register_attention


def linears(model: Any) -> Iterator[tuple[nn.Module, str]]:
    """Yield the linear layers of a decoder's layers as (parent, name)."""
    for layer in model.model.layers:
        for part in (layer.self_attn, layer.mlp):
            for name, module in part.named_children():
                if isinstance(module, nn.Linear):
                    yield part, name


def with_registered_attention(model: Any) -> Any:
    """Every attention through ``attn_implementation="crayon"``."""
    register_attention()
    made = copy.deepcopy(model)
    made.set_attn_implementation("crayon")
    return made


def with_crayon_attention(model: Any) -> Any:
    """``CrayonAttention`` in the place of every attention."""
    made = copy.deepcopy(model)
    for layer in made.model.layers:
        layer.self_attn = CrayonAttention.from_attention(layer.self_attn)
    return made


def _replaced(model: Any, make: Callable[[nn.Linear], nn.Module]) -> Any:
    made = copy.deepcopy(model)
    for parent, name in list(linears(made)):
        setattr(parent, name, make(getattr(parent, name)))
    return made


def with_linears(model: Any, quantized: bool) -> Any:
    """``DualQLoRALinear`` with two fresh adapters in the place of every linear layer."""
    return _replaced(
        model, lambda linear: DualQLoRALinear.from_linear(linear, rank=8, quantized=quantized)
    )


def with_bitsandbytes(model: Any) -> Any:
    """bitsandbytes' ``Linear4bit`` (NF4, double quantisation) in the place of every linear layer.

    Before its first forward: on a CPU that repacks the bytes.
    """

    def make(linear: nn.Linear) -> nn.Module:
        made = bnb.nn.Linear4bit(
            linear.in_features,
            linear.out_features,
            bias=linear.bias is not None,
            compute_dtype=linear.weight.dtype,
            compress_statistics=True,
            quant_type="nf4",
        )
        dense = linear.weight.detach().clone()
        made.weight = bnb.nn.Params4bit(
            dense, requires_grad=False, compress_statistics=True, quant_type="nf4"
        )
        return made.to("cpu")

    return _replaced(model, make)


def from_bitsandbytes(model: Any) -> Any:
    """``DualQLoRALinear`` over the bytes of bitsandbytes' layers."""
    made = copy.deepcopy(model)
    for parent, name in list(linears(made)):
        linear = getattr(parent, name)
        setattr(parent, name, DualQLoRALinear.from_bitsandbytes(linear, rank=8))
    return made


def same_bytes(ours: Any, theirs: Any) -> bool:
    """Tell whether every 4-bit weight of ours has bitsandbytes' codes and scales."""
    for (parent, name), (other, _) in zip(linears_of(ours), linears_of(theirs), strict=True):
        own, given = getattr(parent, name).state_dict(), getattr(other, name).state_dict()
        if not all(torch.equal(own[key], value) for key, value in given.items()):
            return False
    return True


def linears_of(model: Any) -> Iterator[tuple[nn.Module, str]]:
    """Yield the converted layers of a decoder as (parent, name)."""
    for layer in model.model.layers:
        for part in (layer.self_attn, layer.mlp):
            for name, module in part.named_children():
                if hasattr(module, "in_features"):
                    yield part, name
