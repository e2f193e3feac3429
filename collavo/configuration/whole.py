"""The configuration of a whole CoLLaVO: tower, projector, crayon prompt and decoder."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, Generic, Literal, TypeVar, cast, overload

import collavo._requirements  # noqa: F401  (before what it checks)

from huggingface_hub.dataclasses import strict
from transformers import AutoConfig, LlavaConfig, PretrainedConfig

from collavo.configuration.kinds import WHOLE, check_model_type
from collavo.configuration.text import TEXT_FIELDS, CollavoTextConfig

Value = TypeVar("Value")

PROJECTOR_TYPES = ("mlp2x_gelu", "linear")


class _TextField(Generic[Value]):
    """An attribute of the composite configuration that its text configuration stores."""

    def __set_name__(self, owner: type, name: str) -> None:
        self.name = name

    @overload
    def __get__(self, instance: None, owner: type) -> _TextField[Value]: ...
    @overload
    def __get__(self, instance: CollavoConfig, owner: type) -> Value: ...
    def __get__(self, instance: CollavoConfig | None, owner: type) -> Value | _TextField[Value]:
        if instance is None:
            return self
        return cast(Value, getattr(instance.text_config, self.name))

    def __set__(self, instance: CollavoConfig, value: Value) -> None:
        setattr(instance.text_config, self.name, value)


@strict
class CollavoConfig(LlavaConfig):
    """A CoLLaVO model: CLIP tower, projector, crayon prompt and decoder.

    The decoder's own settings (:class:`CollavoTextConfig`: ``crayon_mode``, ``adapters``,
    ``quantize`` ...) may be given here too and can be read here; they are stored once, in
    ``text_config``.

    Args:
        num_crayon_classes: Classes of the segmenter (133 for COCO panoptic); one row more is
            "unknown".
        max_crayon_number: Largest instance number with a vector of its own; one row more is
            "unknown".
        crayon_embed_dim: Width of the crayon queries; None takes the vision tower's hidden size.
        projector_type: ``"mlp2x_gelu"`` is LLaVA-1.5's projector, two linear layers with a GELU
            between (``projector_hidden_act``); ``"linear"`` is LLaVA-1's, one linear layer.

    Raises:
        ValueError: if ``text_config`` is neither a LLaMA-shaped configuration nor a dictionary of
            one, or for an unknown projector.

    Example:
        >>> config = CollavoConfig(crayon_mode="projection", adapters=("image", "vl"))
        >>> config.text_config.crayon_mode, config.adapters
        ('projection', ('image', 'vl'))
    """

    model_type = WHOLE

    if TYPE_CHECKING:
        text_config: CollavoTextConfig
        vision_config: Any

    num_crayon_classes: int = 133
    max_crayon_number: int = 20
    crayon_embed_dim: int | None = None
    projector_type: Literal["mlp2x_gelu", "linear"] = "mlp2x_gelu"

    crayon_mode: ClassVar[_TextField[str]] = _TextField()
    crayon_rank: ClassVar[_TextField[int]] = _TextField()
    crayon_alpha: ClassVar[_TextField[float | None]] = _TextField()
    crayon_dropout: ClassVar[_TextField[float]] = _TextField()
    adapters: ClassVar[_TextField[tuple[str, ...]]] = _TextField()
    image_adapters: ClassVar[_TextField[tuple[str, ...]]] = _TextField()
    lora_rank: ClassVar[_TextField[int | dict[str, int]]] = _TextField()
    lora_alpha: ClassVar[_TextField[float | dict[str, float]]] = _TextField()
    lora_rank_pattern: ClassVar[_TextField[dict[str, dict[str, int]] | None]] = _TextField()
    lora_alpha_pattern: ClassVar[_TextField[dict[str, dict[str, float]] | None]] = _TextField()
    lora_dropout: ClassVar[_TextField[float]] = _TextField()
    quantize: ClassVar[_TextField[str | None]] = _TextField()
    double_quant: ClassVar[_TextField[bool]] = _TextField()
    quant_block_size: ClassVar[_TextField[int]] = _TextField()
    adapter_dtype: ClassVar[_TextField[str | None]] = _TextField()
    extra_embeddings: ClassVar[_TextField[int]] = _TextField()

    def __post_init__(self, **kwargs: Any) -> None:
        """Build the text configuration from what was given here and there."""
        if self.projector_type not in PROJECTOR_TYPES:
            raise ValueError(
                f"projector_type: expected one of {PROJECTOR_TYPES}, got {self.projector_type!r}"
            )
        given = {name: kwargs.pop(name) for name in TEXT_FIELDS if name in kwargs}
        self.text_config = _text_config(self.text_config, given)
        super().__post_init__(**kwargs)
        if self.crayon_embed_dim is None:
            self.crayon_embed_dim = self.vision_config.hidden_size

    @classmethod
    def get_config_dict(
        cls, pretrained_model_name_or_path: Any, **kwargs: Any
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """Read ``config.json``; that of another kind of model is refused, not read in part.

        Args:
            pretrained_model_name_or_path: As in transformers.
            **kwargs: As in transformers.

        Raises:
            FileNotFoundError: if there is none.
            ValueError: naming the folder and the ``model_type``.
        """
        values, rest = super().get_config_dict(pretrained_model_name_or_path, **kwargs)
        check_model_type(values, str(pretrained_model_name_or_path), cls.model_type)
        return values, rest


def _text_config(given: Any, overrides: dict[str, Any]) -> CollavoTextConfig:
    """Return a ``CollavoTextConfig`` from what stands under ``text_config``."""
    if isinstance(given, CollavoTextConfig) and not overrides:
        return given
    if given is None:
        values: dict[str, Any] = {}
    elif isinstance(given, PretrainedConfig):
        values = given.to_dict()
    elif isinstance(given, dict):
        values = dict(given)
    else:
        raise ValueError(
            f"text_config: expected a configuration or a dict, got {type(given).__name__}"
        )
    kind = values.pop("model_type", "llama")
    if kind not in ("llama", CollavoTextConfig.model_type):
        raise ValueError(
            f"text_config: expected a decoder of type 'llama' or 'collavo_text', got {kind!r}; "
            "for other decoders load the LLaVA model and call collavo.apply_to_llava"
        )
    return CollavoTextConfig(**{**values, **overrides})


AutoConfig.register(CollavoConfig.model_type, CollavoConfig, exist_ok=True)
