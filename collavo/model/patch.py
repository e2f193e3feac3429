"""A loaded LLaVA, or one of its kind, becomes a crayon and Dual QLoRA model, in place."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any, Literal, cast

import collavo._requirements  # noqa: F401  (before what it checks)

import torch
from torch import nn
from transformers import PreTrainedModel

from collavo.configuration import CollavoTextConfig
from collavo.model.crayon import CrayonGenerationMixin, CrayonModelMixin
from collavo.model.decoders import DecoderPaths, decoder_paths
from collavo.model.families import check_family, check_places, decoder_of, vision_width
from collavo.model.handle import LlavaHandle, replaced_linears
from collavo.model.layer import (
    HOOKS_OFF,
    MLP_PROJECTIONS,
    CollavoAttention,
    CrayonLayerMixin,
    CrayonMLPMixin,
    LayerSettings,
    build_attention,
    build_layer,
    decoder_linears,
    freeze_linears,
)
from collavo.model.linear_level import BoundLayerMixin, BranchedMixin, build_linears
from collavo.model.peft_layers import (
    PatchedPeftMixin,
    PatchedTunerMixin,
    active_adapters,
    inner_model,
    is_peft_layer,
)
from collavo_kernels.nn import (
    MODULE_HOOKS,
    BoundLinearMixin,
    CrayonPrompt,
    has_hooks,
    has_own_forward,
    with_mixin,
)


def apply_to_llava(
    model: PreTrainedModel,
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
        model: A vision-language model of transformers: LLaVA 1.5, NeXT, OneVision, VipLLaVA,
            Video-LLaVA, Mistral3, InternVL, GOT-OCR2, Ovis2, Janus, Idefics3, SmolVLM or another
            with an image token for each place of an image; its decoder LLaMA, Mistral, Qwen2,
            Qwen3, Phi-3, Granite, OLMo2 or SmolLM3; linear layers plain, or bitsandbytes' NF4,
            each with or without PEFT's LoRA around it. A ``PeftModel``: the model inside is meant.
        crayon_mode: As in ``CollavoTextConfig``.
        num_crayon_classes: Classes of the segmenter.
        max_crayon_number: Largest instance number with a vector of its own.
        crayon_embed_dim: Width of the crayon queries; None takes the vision tower's hidden size,
            the decoder's where the tower's configuration names none.
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
        TypeError: if ``model`` is no vision-language model, naming what it lacks.
        ValueError: if it has the crayon already, another decoder, a resampler that leaves its image
            tokens no place in the image (``crayon_mode="none"`` works), or hooks and wrappers that
            this change would bypass; or for settings that ``CollavoTextConfig`` refuses.
    """
    wrapper, model = model, inner_model(model)
    paths = _check_model(model, crayon_mode)
    decoder: Any = decoder_of(model.model)
    brought = active_adapters(decoder)
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
    tuned = any(map(is_peft_layer, decoder.modules()))
    try:
        _apply_to_layers(handle, paths)
        prompt = _make_prompt(handle, num_crayon_classes, max_crayon_number, crayon_embed_dim)
        _apply_to_model(handle, text, prompt, fused=paths.attention == "fused")
        _set_peft_aside(handle, wrapper if tuned else model, trains=bool(adapters))
    except Exception:
        handle.restore()
        raise
    return handle


def _apply_to_model(
    handle: LlavaHandle, settings: CollavoTextConfig, prompt: CrayonPrompt | None, *, fused: bool
) -> None:
    """Let the model take a crayon, and say what was made of it."""
    model = cast(nn.Module, handle.model)
    inner = cast(nn.Module, model.model)
    handle.attach(
        inner,
        crayon_prompt=prompt,
        crayon_adapters=settings.adapters,
        crayon_image_adapters=settings.image_adapters,
        crayon_fused=fused,
    )
    handle.attach(model, crayon_settings=settings)
    handle.reclass(inner, CrayonModelMixin)
    handle.reclass(model, CrayonGenerationMixin)


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
        embed_dim or vision_width(config),
        config.get_text_config().hidden_size,
        zero_init=handle.settings.crayon_mode == "attention",
        device=model.device,
        dtype=handle.settings.adapter_dtype,
    ).train(model.training)


def _apply_to_layers(handle: LlavaHandle, paths: DecoderPaths) -> None:
    decoder: Any = decoder_of(handle.model.model)
    for layer in decoder.layers:
        if paths.layer == "fused":
            _apply_fused(handle, layer, decoder.config)
        else:
            _apply_bound(handle, layer, decoder.config, paths)
        if handle.settings.adapters:
            freeze_linears(layer)
    handle.replaced()


def _apply_fused(handle: LlavaHandle, layer: Any, config: Any) -> None:
    attention = layer.self_attn
    handle.keep(layer, layer, "self_attn")
    for name in MLP_PROJECTIONS:
        handle.keep(layer, layer.mlp, name)
    build_layer(layer, config, handle.settings)
    _take_over(attention, layer.self_attn)
    handle.reclass(layer.mlp, CrayonMLPMixin)
    handle.reclass(layer, CrayonLayerMixin)


def _apply_bound(handle: LlavaHandle, layer: Any, config: Any, paths: DecoderPaths) -> None:
    """Leave a layer its own forward: the crayon is bound for what it calls."""
    bound = [layer.mlp]
    if paths.attention == "linear":
        bound.append(layer.self_attn)
    else:
        attention = layer.self_attn
        handle.keep(layer, layer, "self_attn")
        build_attention(layer, handle.settings)
        _take_over(attention, layer.self_attn)
    for parent, name in decoder_linears(layer):
        if parent in bound:
            handle.keep(layer, parent, name)
    for part in bound:
        build_linears(part, layer, config, handle.settings)
        if handle.settings.crayon_mode == "projection":
            handle.reclass(part, BranchedMixin)
    handle.reclass(layer, BoundLayerMixin)


def _take_over(attention: nn.Module, made: nn.Module) -> None:
    """Let the new attention be of the old one's class and have its hooks, later ones too.

    transformers' own are among them: those that record ``output_attentions``, by class.
    """
    made.__class__ = with_mixin(cast(Any, CollavoAttention), cast(Any, type(attention)))
    for name in (*MODULE_HOOKS, "_is_full_backward_hook"):
        setattr(made, name, getattr(attention, name))


def _check_model(model: Any, crayon_mode: str) -> DecoderPaths:
    """Raise unless a model can be patched; return where the crayon joins in its decoder."""
    check_family(model)
    if crayon_mode != "none":
        check_places(model)
    if isinstance(model, CrayonGenerationMixin):
        raise ValueError(
            "model: has the crayon already; call undo() on its handle, or load the LLaVA anew"
        )
    decoder: Any = decoder_of(model.model)
    paths = decoder_paths(decoder)
    changed = [model, cast(nn.Module, model.model)]
    for layer in decoder.layers:
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
    return paths


def _check_linear(name: str, linear: nn.Module) -> None:
    """Raise where a linear layer does more than its class says."""
    if isinstance(linear, BoundLinearMixin):
        raise ValueError(
            f"{name}: carries a crayon already (crayon_context, add_crayon_to_linears); load the "
            "model anew, or give its layers that are a CrayonLinearMixin to "
            "remove_crayon_from_linears of collavo_kernels.nn"
        )
    if has_hooks(linear):
        raise ValueError(
            f"{name}: expected a linear layer without hooks, which the layer that takes its place "
            "would not run; remove them, or put them on the attention, the MLP or the decoder layer"
        )
