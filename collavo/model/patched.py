"""A LLaVA that ``apply_to_llava`` changed, loaded from the folder that it was saved in."""

from __future__ import annotations

from typing import Any, cast

import collavo._requirements  # noqa: F401  (before what it checks)

from transformers import AutoModelForImageTextToText, LlavaForConditionalGeneration

from collavo.configuration import CollavoLlavaConfig
from collavo.model.described import set_bases
from collavo.model.layer import LayerSettings, adapt_layer
from collavo.model.patch import apply_to_llava
from collavo.model.pretrained import LoadedWhole


class CollavoLlavaForConditionalGeneration(  # type: ignore[no-untyped-call]
    LoadedWhole, LlavaForConditionalGeneration
):
    """A LLaVA with the crayon and the adapters that its configuration describes.

    ``collavo.load_pretrained`` gives one for the folder of a patched LLaVA.

    Args:
        config: As a patched LLaVA's ``save_pretrained`` writes it.

    Raises:
        ValueError: if ``config.crayon`` is of another form.
    """

    config_class = CollavoLlavaConfig
    config: CollavoLlavaConfig

    def __init__(self, config: CollavoLlavaConfig) -> None:
        super().__init__(config)
        settings = config.decoder_settings()
        given = config.crayon or {}
        sizes = ("num_crayon_classes", "max_crayon_number", "crayon_embed_dim")
        apply_to_llava(
            cast(Any, self),
            crayon_mode=settings.crayon_mode,
            crayon_rank=settings.crayon_rank,
            crayon_scaling=settings.crayon_scaling,
            adapter_dtype=LayerSettings.from_config(settings).adapter_dtype,
            **{name: given[name] for name in sizes if name in given},
        )
        inner: Any = self.model
        set_bases(inner.language_model, given.get("base"))
        for layer in inner.language_model.layers:
            adapt_layer(layer, LayerSettings.from_config(settings))
        inner.crayon_adapters = tuple(settings.adapters)
        inner.crayon_image_adapters = tuple(settings.image_adapters)
        self.crayon_settings = settings


AutoModelForImageTextToText.register(
    CollavoLlavaConfig, CollavoLlavaForConditionalGeneration, exist_ok=True
)
