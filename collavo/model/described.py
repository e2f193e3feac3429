"""A model's settings as it is now, for the configuration that is saved beside its weights."""

from __future__ import annotations

from collections.abc import Mapping
from functools import reduce
from typing import Any, cast

import collavo._requirements  # noqa: F401  (before what it checks)

import torch
from torch import nn

from collavo.configuration import TEXT_FIELDS, CollavoLlavaConfig, CollavoTextConfig
from collavo.model.families import decoder_of
from collavo.model.inventory import part_of
from collavo.model.layer import adapter_sizes, decoder_linears, name_in_decoder
from collavo.model.linear import CollavoLinear


def update_settings(settings: CollavoTextConfig, model: nn.Module, decoder: nn.Module) -> None:
    """Bring settings to what crayon and adapters are: their dtype, every layer's rank and alpha.

    A cast may have changed the one and ``load_peft_adapter`` the others.

    Args:
        settings: Is changed.
        model: The model, for crayon and adapters.
        decoder: Its decoder.
    """
    dtypes = {p.dtype for name, p in model.named_parameters() if part_of(name) is not None}
    if dtypes:
        widest = reduce(torch.promote_types, dtypes)
        settings.adapter_dtype = str(widest).removeprefix("torch.")
    settings.set_adapter_sizes(adapter_sizes(decoder))


def describe_llava(model: Any, settings: CollavoTextConfig) -> CollavoLlavaConfig:
    """Return the configuration with which a patched LLaVA is loaded again.

    Args:
        model: That ``apply_to_llava`` changed.
        settings: What its decoder layers were made to be.

    Raises:
        ValueError: if a module outside the decoder is quantised in a way that cannot be read back.
    """
    _check_rest(model)
    decoder = decoder_of(model.model)
    _check_linears(decoder)
    update_settings(settings, model, decoder)
    prompt = model.model.crayon_prompt
    sizes: dict[str, Any] = {}
    if prompt is not None:
        classes, width = prompt.class_embedding.weight.shape
        numbers = prompt.number_embedding.weight.shape[0]
        sizes = {
            "num_crayon_classes": classes - 1,
            "max_crayon_number": numbers - 1,
            "crayon_embed_dim": width,
        }
    own = {name: getattr(settings, name) for name in TEXT_FIELDS if name != "extra_embeddings"}
    values = model.config.to_dict()
    values.pop("quantization_config", None)
    values["dtype"] = str(model.resting_dtype()).removeprefix("torch.")
    crayon = {"decoder": own, "base": _collapsed(_bases(decoder)), **sizes}
    return CollavoLlavaConfig(base_config=values, crayon=crayon)


def set_bases(decoder: nn.Module, base: Any) -> None:
    """Bring the decoder's linear layers to the 4 bits that they were saved in.

    Args:
        decoder: Its linear layers are dense.
        base: As ``describe_llava`` wrote it.

    Raises:
        ValueError: if it is not of that form.
    """
    for layer in cast(nn.ModuleList, decoder.layers):
        for parent, name in decoder_linears(layer):
            full_name = name_in_decoder(layer, name)
            own = base.get(full_name) if isinstance(base, Mapping) else base
            if own is None:
                continue
            if not isinstance(own, list | tuple) or len(own) != 2:
                raise ValueError(
                    f"crayon: base: expected block size and double quantisation, got {own!r}"
                )
            cast(CollavoLinear, getattr(parent, name)).quantize(int(own[0]), bool(own[1]))


def _bases(decoder: nn.Module) -> dict[str, list[Any] | None]:
    found: dict[str, list[Any] | None] = {}
    for layer in cast(nn.ModuleList, decoder.layers):
        for parent, name in decoder_linears(layer):
            full_name = name_in_decoder(layer, name)
            linear = cast(CollavoLinear, getattr(parent, name))
            facts = [linear.block_size, linear.double_quant]
            found[full_name] = facts if linear.quantized else None
    return found


def _collapsed(values: dict[str, Any]) -> Any:
    """Return the one value that all have, or all of them by name."""
    first = next(iter(values.values()))
    return first if all(value == first for value in values.values()) else values


def _check_linears(decoder: nn.Module) -> None:
    """Raise for layers that something was put around, such as PEFT's."""
    for layer in cast(nn.ModuleList, decoder.layers):
        for parent, name in decoder_linears(layer):
            linear = getattr(parent, name)
            if not isinstance(linear, CollavoLinear):
                raise ValueError(
                    f"{name_in_decoder(layer, name)}: expected a CollavoLinear, got "
                    f"{type(linear).__module__}.{type(linear).__qualname__} around it, which a "
                    "model's folder has no place for; take it off first (PEFT: save the PeftModel, "
                    "which keeps its adapters, and call unload())"
                )


def _check_rest(model: nn.Module) -> None:
    """Raise for bitsandbytes' layers beside the decoder whose weights could not be read back."""
    for name, module in model.named_modules():
        weight = getattr(module, "weight", None)
        if not type(module).__module__.startswith("bitsandbytes.") or weight is None:
            continue
        state = getattr(weight, "quant_state", None)
        kind = getattr(state, "quant_type", str(weight.dtype))
        if getattr(state, "packing_format_for_cpu", False):
            kind = "bytes that bitsandbytes repacked for its CPU kernel at a forward"
        if kind != "nf4":
            raise ValueError(
                f"{name}: expected dense weights or bitsandbytes' NF4, got {type(module).__name__} "
                f"in {kind}, which could not be loaded again; load the LLaVA with it in "
                "llm_int8_skip_modules"
            )
