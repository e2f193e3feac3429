"""Linear layers of somebody else's decoder, replaced by ``DualQLoRALinear``."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any, cast

from torch import nn
from torch.nn.utils.parametrize import is_parametrized

from collavo_kernels.nn.crayon_branch import CrayonBranch
from collavo_kernels.nn.crayon_linears import BoundLinearMixin
from collavo_kernels.nn.foreign.decoder import find_decoder
from collavo_kernels.nn.linear import DualQLoRALinear, has_hooks, has_own_forward


def swap_linears(
    model: nn.Module, pattern: str | None = None, **options: Any
) -> dict[str, nn.Module]:
    """Replace linear layers of a model's decoder by ``DualQLoRALinear``, under their names.

    ``nn.Linear`` is quantised (``quantized=False`` shares its weight), bitsandbytes' ``Linear4bit``
    gives its bytes. Vision tower, projector and ``lm_head`` stay as they are: the decoder is what
    lies next to the embedding of token ids. Nothing changes unless all of them can be replaced.
    A second call finds nothing left to do.

    Args:
        model: Any with ``get_input_embeddings()``, or a wrapper around it.
        pattern: A regular expression, searched in the layers' names within the model
            (``"model.layers.0.self_attn.q_proj"``); None = all linear layers of the decoder's
            layers.
        options: As ``DualQLoRALinear.from_linear`` takes them (adapters, rank, quantized, ...);
            ``quantized`` and the NF4 settings say nothing to a layer in 4 bits.

    Returns:
        The layers that were replaced, by name: ``model.set_submodule(name, layer)`` puts one back.
        Whoever does not keep them frees their weights.

    Raises:
        TypeError: if the model is no module, or an option is not known.
        ValueError: if no layer has such a name, or one has hooks, a forward of its own, a
            parametrization or PEFT's adapters around it; it is named.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> model = LlamaForCausalLM(LlamaConfig(hidden_size=64, intermediate_size=64,
        ...     num_hidden_layers=1, num_attention_heads=4, vocab_size=16))
        >>> list(swap_linears(model, r"[qv]_proj$", rank=4))
        ['model.layers.0.self_attn.q_proj', 'model.layers.0.self_attn.v_proj']
    """
    decoder = find_decoder(model)
    linears = {
        f"{prefix}.{name}": module
        for prefix, layer in decoder.layers.items()
        for name, module in _linears(layer)
    }
    chosen = {n: m for n, m in linears.items() if pattern is None or re.search(pattern, n)}
    if not chosen:
        raise ValueError(
            f"pattern: expected one that is found in a linear layer's name, like "
            f"{next(iter(linears), 'none: the decoder has no linear layer')}, got {pattern!r}"
        )
    replaced = {n: m for n, m in chosen.items() if not isinstance(m, DualQLoRALinear)}
    for name, linear in replaced.items():
        _check(name, linear)
    made = {name: _made(linear, options) for name, linear in replaced.items()}
    for name, layer in made.items():
        parent, _, attribute = name.rpartition(".")
        setattr(model.get_submodule(parent), attribute, layer)
    return replaced


def _linears(module: nn.Module, prefix: str = "") -> Iterator[tuple[str, nn.Module]]:
    for name, inner in module.named_children():
        if isinstance(inner, nn.Linear | DualQLoRALinear):
            yield prefix + name, inner
        elif not isinstance(inner, CrayonBranch):
            yield from _linears(inner, f"{prefix}{name}.")


def _check(name: str, linear: nn.Module) -> None:
    if has_hooks(linear) or has_own_forward(linear):
        raise ValueError(
            f"{name}: has hooks or a forward of its own, which would be lost; take them off first "
            "(device maps and offload are put on afterwards)"
        )
    if {"base_layer", "lora_A", "lora_B"} & set(name.split(".")):
        raise ValueError(
            f"{name}: PEFT's adapters are around it; swap before get_peft_model, or unload() them "
            "and load them into the new layers with load_peft_adapter"
        )
    if is_parametrized(linear):
        raise ValueError(
            f"{name}: its weight is made by a parametrization, which would no longer be trained; "
            "torch.nn.utils.parametrize.remove_parametrizations keeps what it makes"
        )
    own = [base for base in type(linear).__mro__ if "forward" in vars(base)]
    own = [base for base in own if base is not BoundLinearMixin]
    if own[0] is not nn.Linear and not _is_4_bit(linear):
        raise ValueError(
            f"{name}: expected nn.Linear or bitsandbytes' Linear4bit, got "
            f"{own[0].__module__}.{own[0].__name__}; leave it out (pattern=...)"
        )


def _is_4_bit(linear: nn.Module) -> bool:
    return hasattr(getattr(linear, "weight", None), "quant_state")


def _made(linear: nn.Module, options: dict[str, Any]) -> DualQLoRALinear:
    if not _is_4_bit(linear):
        made = DualQLoRALinear.from_linear(cast(nn.Linear, linear), **options)
    else:
        of_dense = ("quantized", "block_size", "double_quant")
        kept = {name: value for name, value in options.items() if name not in of_dense}
        made = DualQLoRALinear.from_bitsandbytes(linear, **kept)
    return made.train(linear.training)
