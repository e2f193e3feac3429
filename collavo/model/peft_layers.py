"""PEFT's LoRA layers in a model that is given the crayon: their adapters become slots."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NoReturn

import collavo._requirements  # noqa: F401  (before what it checks)

import torch
from torch import nn

from collavo_kernels.nn import DualQLoRALinear


def _refusal(method: str) -> Callable[..., NoReturn]:
    """Return a method that says what to do instead."""

    def refuse(*_: Any, **__: Any) -> NoReturn:
        raise ValueError(
            f"{method}: the PeftModel has no adapters to act on while the decoder's are "
            "apply_to_llava's; save with get_base_model().save_pretrained(folder), or one adapter "
            "with save_peft_adapter(get_base_model(), folder, name) of collavo_kernels.nn, or call "
            "undo() on the handle first, which brings PEFT's own back as they were"
        )

    return refuse


class PatchedTunerMixin:
    """Put before PEFT's tuner of a patched model: what would change adapters is refused.

    PEFT looks for its layers in the model, and while that is patched the decoder has none: it would
    do nothing, or save an empty adapter, in silence.
    """

    set_adapter = _refusal("set_adapter")
    delete_adapter = _refusal("delete_adapter")
    add_weighted_adapter = _refusal("add_weighted_adapter")
    enable_adapter_layers = _refusal("enable_adapter_layers")
    disable_adapter_layers = _refusal("disable_adapter_layers")
    merge_adapter = _refusal("merge_adapter")
    unmerge_adapter = _refusal("unmerge_adapter")
    merge_and_unload = _refusal("merge_and_unload")
    unload = _refusal("unload")


class PatchedPeftMixin(PatchedTunerMixin):
    """Put before the ``PeftModel`` around a patched model: its own methods are refused too."""

    save_pretrained = _refusal("save_pretrained")
    load_adapter = _refusal("load_adapter")
    add_adapter = _refusal("add_adapter")
    disable_adapter = _refusal("disable_adapter")


def inner_model(model: Any) -> Any:
    """Return the model inside a ``PeftModel``, or the model itself.

    Args:
        model: Any model.
    """
    wraps = type(model).__module__.startswith("peft.") and hasattr(model, "get_base_model")
    return model.get_base_model() if wraps else model


def is_peft_layer(module: nn.Module) -> bool:
    """Tell whether PEFT put a module with LoRA adapters into the place of a linear layer.

    Args:
        module: Any module.
    """
    # By name: PEFT need not be installed, and then there are none.
    return type(module).__module__.startswith("peft.tuners.lora") and hasattr(module, "base_layer")


def active_adapters(model: nn.Module) -> dict[str, tuple[int, float]]:
    """Return rank and alpha of the adapters that act in a model's PEFT layers, by their names.

    Args:
        model: The decoder.

    Raises:
        ValueError: naming the layer whose adapters compute more than LoRA's branch, or are merged
            or switched off.
    """
    sizes: dict[str, tuple[int, float]] = {}
    for name, module in model.named_modules():
        if is_peft_layer(module):
            for adapter, a, _, scaling in _branches(module, name):
                sizes.setdefault(adapter, (a.shape[0], scaling * a.shape[0]))
    return sizes


def copy_adapters(layer: nn.Module, made: DualQLoRALinear) -> None:
    """Fill a layer's slots with the adapters that act in the PEFT layer whose place it takes.

    Args:
        layer: PEFT's.
        made: Has an adapter of each one's name; rank and scaling become those of PEFT's.
    """
    for adapter, a, b, scaling in _branches(layer, ""):
        own = made.adapter(adapter).a
        factors = [value.detach().to(own.device, own.dtype, copy=True) for value in (a, b)]
        made.set_adapter(adapter, factors[0], factors[1], scaling)


def _branches(layer: Any, name: str) -> Iterator[tuple[str, torch.Tensor, torch.Tensor, float]]:
    active = [each for each in layer.active_adapters if each in layer.lora_A]
    if not active:
        return
    if layer.merged:
        raise ValueError(
            f"model: {name}: PEFT has merged {layer.merged_adapters} into its weight; call "
            "unmerge_adapter() on the PeftModel first"
        )
    if layer.disable_adapters:
        raise ValueError(
            f"model: {name}: PEFT has {active} switched off; switch them on, or take them off with "
            "unload(), first"
        )
    for each in active:
        variant = getattr(layer, "lora_variant", {}).get(each) or layer.use_dora.get(each)
        if variant or layer.lora_B[each].bias is not None:
            kind = type(variant).__name__ if variant else "lora_bias"
            raise ValueError(
                f"model: {name}: adapter {each!r} is not LoRA's branch alone ({kind}); merge it "
                "with merge_and_unload() first"
            )
        yield each, layer.lora_A[each].weight, layer.lora_B[each].weight, layer.scaling[each]
