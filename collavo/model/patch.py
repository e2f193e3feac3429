"""A loaded Hugging Face LLaVA model becomes a crayon and Dual QLoRA model, in place."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Sequence
from typing import Any, Literal, cast

import collavo._requirements  # noqa: F401  (before what it checks)

import torch
from torch import nn
from transformers import LlavaForConditionalGeneration

from collavo.configuration import CollavoTextConfig
from collavo.model.crayon import CrayonGenerationMixin, CrayonModelMixin
from collavo.model.handle import HOOKS_OFF, LlavaHandle, replaced_linears, with_mixin
from collavo.model.layer import (
    MLP_PROJECTIONS,
    CollavoAttention,
    CrayonLayerMixin,
    CrayonMLPMixin,
    LayerSettings,
    build_layer,
    freeze_linears,
)
from collavo.model.peft_layers import (
    PatchedPeftMixin,
    PatchedTunerMixin,
    active_adapters,
    inner_model,
    is_peft_layer,
)
from collavo_kernels.nn import CrayonPrompt, has_own_forward

DECODERS = ("llama", "mistral", "qwen2")
# By the class that wrote their forward: layers and MLPs that compute what the mixins do.
LAYERS = ("LlamaDecoderLayer", "MistralDecoderLayer", "Qwen2DecoderLayer")
MLPS = ("LlamaMLP", "MistralMLP", "Qwen2MLP")
# Where a module keeps what runs around its forward and backward.
HOOKS = (
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_backward_hooks",
    "_backward_pre_hooks",
)


def apply_to_llava(
    model: LlavaForConditionalGeneration,
    *,
    crayon_mode: Literal["attention", "projection", "none"] = "attention",
    num_crayon_classes: int = 133,
    max_crayon_number: int = 20,
    crayon_embed_dim: int | None = None,
    crayon_rank: int = 256,
    crayon_scaling: float = 1.0,
    adapters: Sequence[str] = (),
    image_adapters: Sequence[str] = (),
    lora_rank: int = 64,
    lora_alpha: float = 64.0,
    lora_dropout: float = 0.0,
    quantize: Literal["nf4"] | None = None,
    double_quant: bool = True,
    adapter_dtype: torch.dtype | None = None,
) -> LlavaHandle:
    """Give a loaded LLaVA model the Crayon Prompt and, where asked for, Dual QLoRA, in place.

    Only this instance changes: nothing of transformers is patched. The model then takes
    ``crayon_index``, ``crayon_class`` and ``crayon_number`` in ``forward`` and ``generate``, and
    has ``crayon_parameters()`` and ``adapter_parameters(name)``. A fresh crayon and fresh adapters
    have no effect until they are trained. The handle keeps the linear layers that were there for
    ``undo``: dense ones where weights are quantised, and bitsandbytes' codes, which the new layers
    share until CPU kernels bring their own into panels. Drop it if you will not undo.

    Where PEFT has adapters on the decoder, those that are active become adapters of the same names,
    with copies of their weights; undone, PEFT's own are back. Until then a ``PeftModel`` around
    them refuses to save, load, merge, add or switch adapters.

    Args:
        model: With a LLaMA, Mistral or Qwen2 decoder; linear layers plain, or bitsandbytes' NF4,
            each with or without PEFT's LoRA around it. A ``PeftModel``: the model inside is meant.
        crayon_mode: As in ``CollavoTextConfig``.
        num_crayon_classes: Classes of the segmenter.
        max_crayon_number: Largest instance number with a vector of its own.
        crayon_embed_dim: Width of the crayon queries; None takes the vision tower's hidden size.
        crayon_rank: R of the branches in projection mode.
        crayon_scaling: s of the branches in projection mode.
        adapters: Names of LoRA adapters on the decoder's linear layers, e.g. ``("image", "vl")``.
        image_adapters: Those of them that act on image tokens only.
        lora_rank: R of the adapters.
        lora_alpha: Their scaling is ``lora_alpha / lora_rank``.
        lora_dropout: Dropout on their input, while training; that of PEFT's is not taken over.
        quantize: ``"nf4"`` quantises the decoder's linear layers; None leaves them as they are.
        double_quant: Whether to quantise the scales too.
        adapter_dtype: dtype of crayon and adapters; None is float32.

    Returns:
        A handle whose ``undo()`` restores the model.

    Raises:
        TypeError: if ``model`` is no ``LlavaForConditionalGeneration``.
        ValueError: if it has the crayon already, another decoder, or hooks and wrappers that this
            change would bypass; or for settings that ``CollavoTextConfig`` refuses.
    """
    wrapper, model = model, inner_model(model)
    _check_model(model)
    decoder = cast(Any, model.model).language_model
    brought = active_adapters(decoder)
    tuned = any(map(is_peft_layer, decoder.modules()))
    if brought and not isinstance(adapters, str):
        adapters = (*adapters, *brought)
    sizes = dict.fromkeys(adapters, (lora_rank, lora_alpha)) | brought
    text = CollavoTextConfig(
        crayon_mode=crayon_mode,
        crayon_rank=crayon_rank,
        crayon_alpha=crayon_scaling * crayon_rank,
        adapters=cast(Any, adapters),
        image_adapters=cast(Any, image_adapters),
        lora_rank={name: size[0] for name, size in sizes.items()},
        lora_alpha={name: size[1] for name, size in sizes.items()},
        lora_dropout=lora_dropout,
        quantize=quantize,
        double_quant=double_quant,
        adapter_dtype=None if adapter_dtype is None else str(adapter_dtype).removeprefix("torch."),
    )
    handle = LlavaHandle(model, LayerSettings.from_config(text))
    try:
        _apply_to_layers(handle)
        inner = cast(nn.Module, model.model)
        handle.attach(
            inner,
            crayon_prompt=_make_prompt(
                handle, num_crayon_classes, max_crayon_number, crayon_embed_dim
            ),
            crayon_adapters=text.adapters,
            crayon_image_adapters=text.image_adapters,
        )
        handle.attach(cast(nn.Module, model), crayon_settings=text)
        handle.reclass(inner, CrayonModelMixin)
        handle.reclass(model, CrayonGenerationMixin)
        _set_peft_aside(handle, wrapper if tuned else model, trains=bool(adapters))
    except Exception:
        handle.restore()
        raise
    return handle


def _set_peft_aside(handle: LlavaHandle, wrapper: Any, *, trains: bool) -> None:
    """Keep PEFT from saving and changing what is no longer its own, until ``undo``."""
    model: Any = handle.model
    if trains and getattr(model, "is_quantized", False):
        # transformers trains a 4-bit model through PEFT's adapters alone, which it looks for.
        handle.override(model, "is_quantized", False)
    if getattr(model, "_hf_peft_config_loaded", False):
        # By this flag transformers saves PEFT's adapters alone, never the crayon.
        handle.override(model, "_hf_peft_config_loaded", False)
    if wrapper is not model:
        warnings.warn(
            "model: the adapters of this PeftModel are apply_to_llava's now, and it would save "
            "none: train and save get_base_model() in its place",
            stacklevel=3,
        )
        handle.reclass(wrapper, PatchedPeftMixin)
        handle.reclass(wrapper.base_model, PatchedTunerMixin)


def _make_prompt(
    handle: LlavaHandle, num_classes: int, max_number: int, embed_dim: int | None
) -> CrayonPrompt | None:
    if handle.settings.crayon_mode == "none":
        return None
    model, config = handle.model, cast(Any, handle.model.config)
    return CrayonPrompt(
        num_classes,
        max_number,
        embed_dim or config.vision_config.hidden_size,
        config.get_text_config().hidden_size,
        zero_init=handle.settings.crayon_mode == "attention",
        device=model.device,
        dtype=handle.settings.adapter_dtype,
    ).train(model.training)


def _apply_to_layers(handle: LlavaHandle) -> None:
    decoder: Any = cast(Any, handle.model.model).language_model
    for layer in decoder.layers:
        attention = layer.self_attn
        handle.keep(layer, layer, "self_attn")
        for name in MLP_PROJECTIONS:
            handle.keep(layer, layer.mlp, name)
        build_layer(layer, decoder.config, handle.settings)
        _take_over(attention, layer.self_attn)
        handle.reclass(layer.mlp, CrayonMLPMixin)
        handle.reclass(layer, CrayonLayerMixin)
        if handle.settings.adapters:
            freeze_linears(layer)
    handle.replaced()


def _take_over(attention: nn.Module, made: nn.Module) -> None:
    """Let the new attention be of the old one's class and have its hooks, later ones too.

    transformers' own are among them: those that record ``output_attentions``, by class.
    """
    made.__class__ = with_mixin(cast(Any, CollavoAttention), cast(Any, type(attention)))
    for name in (*HOOKS, "_is_full_backward_hook"):
        setattr(made, name, getattr(attention, name))


def _check_model(model: Any) -> None:
    if not isinstance(model, LlavaForConditionalGeneration):
        raise TypeError(
            f"model: expected LlavaForConditionalGeneration, got {type(model).__name__}; "
            "LlavaForConditionalGeneration.from_pretrained loads one"
        )
    if isinstance(model, CrayonGenerationMixin):
        raise ValueError(
            "model: has the crayon already; call undo() on its handle, or load the LLaVA anew"
        )
    kind = model.config.get_text_config().model_type
    if kind not in DECODERS:
        raise ValueError(f"model: expected a decoder of type {', '.join(DECODERS)}, got {kind!r}")
    decoder = cast(Any, model.model).language_model
    changed = [model, cast(nn.Module, model.model)]
    for layer in decoder.layers:
        _check_forward(layer, LAYERS)
        _check_forward(layer.mlp, MLPS)
        changed += [layer, layer.self_attn, layer.mlp]
        for name, linear in replaced_linears(layer):
            _check_linear(name, linear)
            changed.append(linear)
    for module in changed:
        if has_own_forward(module):
            raise ValueError(
                f"model: {type(module).__name__} has a forward of its own instance (a device map's "
                "hooks, or another patch), which the crayon would bypass; take it off first "
                f"({HOOKS_OFF}), and put device maps and offload on after apply_to_llava"
            )
        # Accelerate's hooks, taken off, leave the class's own method as an attribute.
        module.__dict__.pop("forward", None)


def _check_linear(name: str, linear: nn.Module) -> None:
    """Raise where a linear layer does more than its class says."""
    if any(getattr(linear, hooks) for hooks in HOOKS):
        raise ValueError(
            f"{name}: expected a linear layer without hooks, which the layer that takes its place "
            "would not run; remove them, or put them on the attention, the MLP or the decoder layer"
        )


def _check_forward(module: nn.Module, known: tuple[str, ...]) -> None:
    """Raise unless a module's forward is one that the mixins write anew."""
    # transformers and FSDP wrap the forward of every subclass; what counts is who wrote it.
    forward = inspect.unwrap(type(module).forward)
    owner = f"{forward.__module__}.{forward.__qualname__}"
    name = forward.__qualname__.removesuffix(".forward")
    if name not in known or not forward.__module__.startswith("transformers."):
        raise ValueError(
            f"model: expected the forward of transformers' {', '.join(known)}, got {owner}, which "
            "the crayon would replace; load the model without the package that patches it"
        )
