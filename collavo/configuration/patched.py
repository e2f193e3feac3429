"""The configuration of a vision-language model that ``apply_to_llava`` changed."""

from __future__ import annotations

from typing import Any, cast

import collavo._requirements  # noqa: F401  (before what it checks)

from huggingface_hub.dataclasses import strict
from transformers import CONFIG_MAPPING, AutoConfig, PretrainedConfig
from transformers import __version__ as transformers_version

from collavo.configuration.kinds import PATCHED, check_model_type
from collavo.configuration.text import TEXT_FIELDS, CollavoTextConfig


@strict
class CollavoLlavaConfig(PretrainedConfig):
    """A vision-language model that ``apply_to_llava`` changed, as it is saved and loaded again.

    Args:
        base_config: The model's own configuration; its ``model_type`` says of which family it is.
        crayon: What ``apply_to_llava`` made of it: ``decoder`` (the fields that
            :class:`CollavoTextConfig` adds), ``base`` (block size and double quantisation of 4-bit
            weights; None where they are dense; by the layer's name where they differ),
            ``num_crayon_classes``, ``max_crayon_number`` and ``crayon_embed_dim``.

    Example:
        >>> CollavoLlavaConfig(base_config={"model_type": "llava_next"}).base().model_type
        'llava_next'
    """

    model_type = PATCHED

    base_config: dict[str, Any] | None = None
    crayon: dict[str, Any] | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return the fields; the class is that which picks the family's."""
        found: dict[str, Any] = super().to_dict()
        return found | {"architectures": ["CollavoLlavaForConditionalGeneration"]}

    def base(self) -> PretrainedConfig:
        """Return the configuration of the family's own class, with ``crayon`` as an attribute.

        Raises:
            ValueError: if the family is not one of transformers'.
        """
        values = dict(self.base_config or {})
        kind = values.pop("model_type", None)
        if kind not in CONFIG_MAPPING:
            raise ValueError(
                "base_config: expected the configuration of a vision-language model of "
                f"transformers {transformers_version}, got model_type {kind!r}; save the model "
                "anew, or install a transformers that knows it"
            )
        made: Any = CONFIG_MAPPING[kind].from_dict(values)
        made.crayon = self.crayon
        return cast(PretrainedConfig, made)

    @classmethod
    def get_config_dict(
        cls, pretrained_model_name_or_path: Any, **kwargs: Any
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """Read ``config.json``; see ``CollavoConfig.get_config_dict``.

        Args:
            pretrained_model_name_or_path: As in transformers.
            **kwargs: As in transformers.
        """
        values, rest = super().get_config_dict(pretrained_model_name_or_path, **kwargs)
        check_model_type(values, str(pretrained_model_name_or_path), cls.model_type)
        return values, rest


def decoder_settings(crayon: Any) -> CollavoTextConfig:
    """Return what the decoder's layers of a model are that ``apply_to_llava`` changed.

    Args:
        crayon: As in :class:`CollavoLlavaConfig`.

    Raises:
        ValueError: if it is not of that form.
    """
    settings = crayon.get("decoder") if isinstance(crayon, dict) else None
    if not isinstance(settings, dict) or not set(settings) <= set(TEXT_FIELDS):
        raise ValueError(
            f"crayon: expected the settings that a saved patched LLaVA has, got {crayon!r}"
        )
    return CollavoTextConfig(**settings)


AutoConfig.register(CollavoLlavaConfig.model_type, CollavoLlavaConfig, exist_ok=True)
