"""Crayon and adapters of a patched model as wholes: their settings, their parameters, new ones."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Self, cast

import collavo._requirements  # noqa: F401  (before what it checks)

import torch
from torch import nn

from collavo.configuration import CollavoTextConfig
from collavo.model.described import describe_llava
from collavo.model.families import decoder_of
from collavo.model.layer import (
    BRANCHES,
    LayerSettings,
    adapt_layer,
    decoder_linears,
    name_in_decoder,
)
from collavo.model.pretrained import SavedWhole
from collavo_kernels.nn import has_own_forward


class AdaptersMixin(SavedWhole):
    """Put before a vision-language model class whose decoder has crayon and adapters."""

    def saved_config(self) -> Any:
        """Return the configuration to save; that of a patched LLaVA says what was done to it."""
        settings = getattr(self, "crayon_settings", None)
        return self.config if settings is None else describe_llava(self, settings)

    def decoder_settings(self) -> CollavoTextConfig:
        """Return what the decoder's layers are."""
        return cast(CollavoTextConfig, cast(Any, self).crayon_settings)

    def add_dual_qlora(
        self,
        adapters: Sequence[str] = ("image", "vl"),
        *,
        rank: int = 64,
        alpha: float = 64.0,
        dropout: float = 0.0,
        quantize: bool = True,
        double_quant: bool = True,
        dtype: torch.dtype | None = None,
    ) -> Self:
        """Freeze the decoder's linear layers, quantise them, and give them LoRA adapters, in place.

        The adapters' B starts at zero, so up to the rounding of NF4 the model computes what it did.
        Settings follow, so ``save_pretrained`` and ``from_pretrained`` give the same bits back.

        Args:
            adapters: Names; CoLLaVO's Dual QLoRA has ``"image"`` and ``"vl"``.
            rank: R.
            alpha: The scaling is ``alpha / rank``.
            dropout: Dropout on the adapters' input, while training.
            quantize: Whether to keep the frozen weights in 4 bits; layers that are in 4 bits
                already stay so.
            double_quant: Whether to quantise their scales too.
            dtype: dtype of the adapters; None keeps that of the settings (float32 by default).

        Returns:
            The model itself.

        Raises:
            ValueError: if an adapter of one of the names exists, a setting is no possible one, or
                layers to change are offloaded; the model is then as it was.

        Source: arXiv 2402.11248, section 4 (NF4, double quantisation, R = alpha = 64).
        """
        settings, inner = self.decoder_settings(), cast(Any, self).model
        layers = cast(nn.ModuleList, decoder_of(inner).layers)
        if adapters or (quantize and settings.quantize is None):
            _refuse_offloaded(layers)
        settings.add_adapters(adapters, rank, alpha, dropout)
        inner.crayon_adapters = tuple(settings.adapters)
        if quantize and settings.quantize is None:
            settings.quantize, settings.double_quant = "nf4", double_quant
        if dtype is not None:
            settings.adapter_dtype = str(dtype).removeprefix("torch.")
        for layer in layers:
            adapt_layer(layer, LayerSettings.from_config(settings))
        return self

    def crayon_parameters(self) -> Iterator[nn.Parameter]:
        """Yield what CPT trains: queries, crayon MLP and, in projection mode, every A and B."""
        for name, parameter in cast(nn.Module, self).named_parameters():
            if any(part == "crayon_prompt" or part in BRANCHES for part in name.split(".")):
                yield parameter

    def adapter_parameters(self, name: str) -> Iterator[nn.Parameter]:
        """Yield the parameters of one adapter, over all layers.

        Args:
            name: The adapter's name, e.g. ``"image"``.

        Raises:
            ValueError: if the model has no adapter of that name.
        """
        known = cast(Any, self).model.crayon_adapters
        if name not in known:
            raise ValueError(
                f"name: expected one of the model's adapters {list(known)}, got {name!r}"
            )
        for key, parameter in cast(nn.Module, self).named_parameters():
            *_, factor, own, _ = ("", "", *key.split("."))
            if factor in ("lora_A", "lora_B") and own == name:
                yield parameter


def _refuse_offloaded(layers: Any) -> None:
    """Raise if linear layers of a decoder are offloaded: their hooks keep what they had."""
    for layer in layers:
        for parent, name in decoder_linears(layer):
            linear = getattr(parent, name)
            if linear.weight.is_meta and has_own_forward(linear):
                raise ValueError(
                    f"add_dual_qlora: {name_in_decoder(layer, name)} is offloaded and cannot be "
                    "changed; load the model without a device map, change and save it, and "
                    "load that with the map"
                )
