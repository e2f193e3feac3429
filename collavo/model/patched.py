"""A model that ``apply_to_llava`` changed, loaded from the folder that it was saved in."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from os import PathLike
from typing import Any, cast

import collavo._requirements  # noqa: F401  (before what it checks)

import transformers
from transformers import (
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    AutoModelForImageTextToText,
    LlavaForConditionalGeneration,
    PreTrainedModel,
)

from collavo.configuration import CollavoLlavaConfig, CollavoTextConfig, decoder_settings
from collavo.model.adapters import AdaptersMixin
from collavo.model.added import SETTINGS, check_base, load_tensors, read_added
from collavo.model.described import set_bases
from collavo.model.families import check_family, decoder_of
from collavo.model.files import fields_read
from collavo.model.handle import LlavaHandle
from collavo.model.layer import LayerSettings, adapt_layer
from collavo.model.patch import apply_to_llava
from collavo.model.pretrained import LoadedWhole

_PREFIX = "Collavo"


class LoadedPatched(LoadedWhole):
    """Put before a vision-language model class: builds it with crayon and adapters.

    Args:
        config: A ``CollavoLlavaConfig``, or what its ``base()`` returns.

    Raises:
        ValueError: if ``config.crayon`` is of another form.
    """

    config_class = CollavoLlavaConfig

    def __init__(self, config: Any) -> None:
        if isinstance(config, CollavoLlavaConfig):
            config = config.base()
        # The model's configuration is the family's own, as that of the model that was saved.
        crayon: Any = config.__dict__.pop("crayon", None)
        settings = decoder_settings(crayon)
        cast(Any, super()).__init__(config)
        _apply(self, settings, crayon)

    @classmethod
    def resolve(cls, config: Any) -> tuple[Any, Any]:
        """Return the class that a saved model is loaded as, and its configuration.

        Args:
            config: A ``CollavoLlavaConfig``.

        Raises:
            ValueError: if it is of no family that transformers knows.
        """
        base = config.base()
        if type(base) not in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING:
            raise ValueError(
                "base_config: expected the configuration of a vision-language model, got "
                f"model_type {base.model_type!r}"
            )
        return patched_class(MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING[type(base)]), base

    @classmethod
    def _from_config(cls, config: Any, **kwargs: Any) -> Any:
        if isinstance(config, CollavoLlavaConfig):
            kind, config = cls.resolve(config)
            return kind._from_config(config, **kwargs)
        return cast(Any, super())._from_config(config, **kwargs)


class CollavoLlavaForConditionalGeneration(  # type: ignore[misc, no-untyped-call]
    LoadedPatched, LlavaForConditionalGeneration
):
    """A LLaVA with the crayon and the adapters that its configuration describes.

    ``collavo.load_pretrained`` gives one for the folder of a patched LLaVA-1.5, and for other
    families a class of the same kind before theirs; so does ``from_pretrained`` of this one.

    Args:
        config: As a patched LLaVA's ``save_pretrained`` writes it.

    Raises:
        ValueError: if ``config.crayon`` is of another form.
    """


def load_added(model: PreTrainedModel, folder: str | PathLike[str]) -> LlavaHandle:
    """Give a model what ``save_added`` saved: crayon, branches and adapters, bit for bit.

    Settings are the file's; the model's weights stay as they are, dense or in 4 bits.

    Args:
        model: The vision-language model that they were trained with, not patched.
        folder: With ``collavo_added.safetensors`` and ``collavo_added.json``.

    Returns:
        The handle, as of ``apply_to_llava``.

    Raises:
        FileNotFoundError: naming the file that is missing.
        TypeError: if it is no vision-language model.
        ValueError: naming what does not fit: a file that is damaged, another model, or one that
            ``apply_to_llava`` refuses. The model is then as it was.

    Example:
        >>> load_added(model=None, folder="no-such-folder")
        Traceback (most recent call last):
            ...
        FileNotFoundError: no-such-folder/collavo_added.json: missing; save_added writes it
    """
    facts, tensors = read_added(folder)
    with fields_read(SETTINGS):
        settings = decoder_settings(facts["crayon"])
        LayerSettings.from_config(settings)
    check_family(model)
    if isinstance(model, AdaptersMixin):
        raise ValueError("model: has the crayon already; call load_added of its handle")
    check_base(model, facts)
    with fields_read(SETTINGS):
        handle = _apply(model, settings, facts["crayon"])
    try:
        load_tensors(model, facts, tensors)
    except Exception:
        handle.restore()
        raise
    return handle


def _apply(model: Any, settings: CollavoTextConfig, crayon: Mapping[str, Any]) -> LlavaHandle:
    """Patch a model as it is described; the values of what is added are yet to come."""
    sizes = ("num_crayon_classes", "max_crayon_number", "crayon_embed_dim")
    handle = apply_to_llava(
        model,
        crayon_mode=settings.crayon_mode,
        crayon_rank=settings.crayon_rank,
        crayon_scaling=settings.crayon_scaling,
        adapter_dtype=LayerSettings.from_config(settings).adapter_dtype,
        **{name: crayon[name] for name in sizes if name in crayon},
    )
    inner, decoder = model.model, cast(Any, decoder_of(model.model))
    set_bases(decoder, crayon.get("base"))
    if settings.adapters:
        for layer in decoder.layers:
            adapt_layer(layer, LayerSettings.from_config(settings))
    inner.crayon_adapters = tuple(settings.adapters)
    inner.crayon_image_adapters = tuple(settings.image_adapters)
    model.crayon_settings = settings
    return handle


@cache
def patched_class(base: Any) -> Any:
    """Return ``LoadedPatched`` before a family's class, made once.

    Args:
        base: A vision-language model class of transformers.
    """
    if base is LlavaForConditionalGeneration:
        return CollavoLlavaForConditionalGeneration
    body = {"__module__": __name__, "__doc__": CollavoLlavaForConditionalGeneration.__doc__}
    return type(_PREFIX + base.__name__, (LoadedPatched, base), body)


def __getattr__(name: str) -> Any:
    """Return the class of a family by its name: by that it pickles."""
    base = getattr(transformers, name.removeprefix(_PREFIX), None)
    if not name.startswith(_PREFIX) or base not in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING.values():
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return patched_class(base)


AutoModelForImageTextToText.register(
    CollavoLlavaConfig, CollavoLlavaForConditionalGeneration, exist_ok=True
)
