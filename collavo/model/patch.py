"""A loaded Hugging Face LLaVA model becomes a crayon and Dual QLoRA model, in place."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any, Literal, cast

import collavo._requirements  # noqa: F401  (before what it checks)

import torch
from torch import Tensor, nn
from transformers import LlavaForConditionalGeneration

from collavo.configuration import CollavoTextConfig
from collavo.model.crayon import CrayonGenerationMixin, CrayonModelMixin
from collavo.model.layer import (
    BRANCHES,
    MLP_BRANCHES,
    MLP_PROJECTIONS,
    CrayonLayerMixin,
    CrayonMLPMixin,
    LayerSettings,
    build_layer,
    freeze_linears,
)
from collavo_kernels.nn import CrayonPrompt

DECODERS = ("llama", "mistral", "qwen2")
# By the class that wrote their forward: layers and MLPs that compute what the mixins do.
LAYERS = ("LlamaDecoderLayer", "MistralDecoderLayer", "Qwen2DecoderLayer")
MLPS = ("LlamaMLP", "MistralMLP", "Qwen2MLP")


class LlavaHandle:
    """What ``apply_to_llava`` changed, and the way back.

    Attributes:
        model: The model.
        settings: What its decoder layers were made to be.
    """

    def __init__(self, model: LlavaForConditionalGeneration, settings: LayerSettings) -> None:
        self.model = model
        self.settings = settings
        self._classes: list[tuple[nn.Module, type]] = []
        self._modules: list[tuple[nn.Module, str, nn.Module]] = []
        self._attributes: list[tuple[nn.Module, str]] = []
        self._trainable = [(p, p.requires_grad) for p in model.parameters()]
        self._applied = True

    def undo(self) -> LlavaForConditionalGeneration:
        """Take the crayon and the adapters out again: the model is what it was, to the last bit.

        Classes, modules, their hooks and what requires a gradient come back as they were. Dense
        weights are shared while the crayon is in, so what training did to them stays.

        Returns:
            The model.

        Raises:
            ValueError: if it has been undone before.
        """
        if not self._applied:
            raise ValueError(
                "undo: the model was restored before; apply_to_llava makes a new handle"
            )
        for parent, name, module in reversed(self._modules):
            setattr(parent, name, module.train(parent.training))
            for branch in MLP_BRANCHES:
                if hasattr(parent, branch):
                    delattr(parent, branch)
        for owner, name in self._attributes:
            delattr(owner, name)
        for module, original in self._classes:
            module.__class__ = original
        for parameter, flag in self._trainable:
            parameter.requires_grad_(flag)
        self._applied = False
        return self.model

    def added_state_dict(self) -> dict[str, Tensor]:
        """Return what was added, by its name in the model: crayon prompt, branches, adapters.

        ``model.load_state_dict(..., strict=False)`` on a model with the same settings takes it.
        """
        parts = {"crayon_prompt", "lora_A", "lora_B", *BRANCHES}
        # Not from the state dict: it would bring every 4-bit weight into its saved order.
        named = cast(nn.Module, self.model).named_parameters()
        return {name: p.detach() for name, p in named if parts & set(name.split("."))}

    def _keep(self, parent: nn.Module, name: str) -> None:
        self._modules.append((parent, name, cast(nn.Module, getattr(parent, name))))

    def _reclass(self, module: nn.Module, mixin: type) -> None:
        self._classes.append((module, type(module)))
        module.__class__ = _with_mixin(cast(Any, mixin), cast(Any, type(module)))

    def _attach(self, owner: nn.Module, **values: Any) -> None:
        for name, value in values.items():
            setattr(owner, name, value)
            self._attributes.append((owner, name))


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

    Args:
        model: With a LLaMA, Mistral or Qwen2 decoder; linear layers plain, or bitsandbytes' NF4.
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
        lora_dropout: Dropout on their input, while training.
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
    _check_model(model)
    text = CollavoTextConfig(
        crayon_mode=crayon_mode,
        crayon_rank=crayon_rank,
        crayon_alpha=crayon_scaling * crayon_rank,
        adapters=cast(Any, adapters),
        image_adapters=cast(Any, image_adapters),
        lora_rank=lora_rank,
        lora_alpha=lora_alpha,
        lora_dropout=lora_dropout,
        quantize=quantize,
        double_quant=double_quant,
        adapter_dtype=None if adapter_dtype is None else str(adapter_dtype).removeprefix("torch."),
    )
    handle = LlavaHandle(model, LayerSettings.from_config(text))
    try:
        _apply_to_layers(handle)
        inner = cast(nn.Module, model.model)
        config: Any = model.config
        prompt = None
        if crayon_mode != "none":
            prompt = CrayonPrompt(
                num_crayon_classes,
                max_crayon_number,
                crayon_embed_dim or config.vision_config.hidden_size,
                config.get_text_config().hidden_size,
                zero_init=crayon_mode == "attention",
                device=model.device,
                dtype=handle.settings.adapter_dtype,
            ).train(model.training)
        handle._attach(
            inner,
            crayon_prompt=prompt,
            crayon_adapters=text.adapters,
            crayon_image_adapters=text.image_adapters,
        )
        handle._reclass(inner, CrayonModelMixin)
        handle._reclass(model, CrayonGenerationMixin)
    except Exception:
        handle.undo()
        raise
    return handle


def _apply_to_layers(handle: LlavaHandle) -> None:
    decoder: Any = cast(Any, handle.model.model).language_model
    for layer in decoder.layers:
        handle._keep(layer, "self_attn")
        for name in MLP_PROJECTIONS:
            handle._keep(layer.mlp, name)
        build_layer(layer, decoder.config, handle.settings)
        handle._reclass(layer.mlp, CrayonMLPMixin)
        handle._reclass(layer, CrayonLayerMixin)
        if handle.settings.adapters:
            freeze_linears(layer)


@cache
def _with_mixin(mixin: Any, original: Any) -> Any:
    # Name and module stay: transformers looks classes up by both.
    body: Mapping[str, Any] = {"__module__": original.__module__, "__doc__": original.__doc__}
    return type(original.__name__, (mixin, original), dict(body))


def _check_model(model: Any) -> None:
    if not isinstance(model, LlavaForConditionalGeneration):
        raise TypeError(
            f"model: expected LlavaForConditionalGeneration, got {type(model).__name__}"
        )
    if isinstance(model, CrayonGenerationMixin):
        raise ValueError("model: has the crayon already; call undo() on its handle first")
    kind = model.config.get_text_config().model_type
    if kind not in DECODERS:
        raise ValueError(f"model: expected a decoder of type {', '.join(DECODERS)}, got {kind!r}")
    decoder = cast(Any, model.model).language_model
    for layer in decoder.layers:
        _check_forward(layer, LAYERS)
        _check_forward(layer.mlp, MLPS)
    layers = [part for layer in decoder.layers for part in (layer, layer.self_attn, layer.mlp)]
    for module in (model, model.model, *layers):
        if "forward" in vars(module):
            raise ValueError(
                f"model: {type(module).__name__} has a forward of its own instance (a device map's "
                "hooks, or another patch), which the crayon would bypass; take it off first"
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
