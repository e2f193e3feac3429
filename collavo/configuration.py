"""Configurations of the CoLLaVO model: LLaVA's, the crayon's and the adapters'."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Generic, Literal, TypeVar, cast, overload

import collavo._requirements  # noqa: F401  (before what it checks)

from huggingface_hub.dataclasses import strict
from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    LlamaConfig,
    LlavaConfig,
    PretrainedConfig,
)
from transformers import __version__ as transformers_version

from collavo._relatives import way_of

Value = TypeVar("Value")

HUB_OPTIONS = ("cache_dir", "force_download", "local_files_only", "token", "revision", "subfolder")
CRAYON_MODES = ("attention", "projection", "none")


@strict
class CollavoTextConfig(LlamaConfig):
    r"""The decoder of a CoLLaVO model: LLaMA's configuration, the crayon and the adapters.

    Args:
        crayon_mode: ``"attention"`` adds the crayon to the input of the q, k and v projections of
            every layer (the paper), ``"projection"`` adds :math:`s B_{seg} A_{seg} c` to the
            outputs of the q/k/v, output, gate and up projections (the released checkpoint),
            ``"none"`` adds nothing.
        crayon_rank: R of ``A_seg`` and ``B_seg``; projection mode only.
        crayon_alpha: The branch's scaling is ``crayon_alpha / crayon_rank``; None means a scaling
            of one.
        crayon_dropout: Dropout on the crayon rows in projection mode, while training.
        adapters: Names of the LoRA adapters on every linear layer of the decoder, e.g. ``("image",
            "vl")``.
        image_adapters: Those of ``adapters`` that act on image tokens only (the released
            checkpoint's PLoRA).
        lora_rank: R of the adapters; a dictionary by name where they differ.
        lora_alpha: An adapter's scaling is ``lora_alpha / lora_rank``; a dictionary by name where
            they differ.
        lora_rank_pattern: Ranks of single layers where they are others, by adapter and by the
            layer's name in the decoder (``{"vl": {"layers.0.self_attn.q_proj": 8}}``).
        lora_alpha_pattern: alphas likewise.
        lora_dropout: Dropout on an adapter's input, while training.
        quantize: ``"nf4"`` keeps the decoder's linear layers in 4 bits, None keeps them dense.
        double_quant: Whether the 4-bit scales are quantised too.
        quant_block_size: Weights per 4-bit block.
        adapter_dtype: dtype of adapters and crayon; None is float32 (float64 in a float64 model),
            as PEFT trains them beside a bfloat16 model.
        extra_embeddings: Embedding rows beyond ``vocab_size`` (the output head has none): an image
            token that can be read and never be generated.

    Raises:
        ValueError: for an unknown mode or quantisation, a rank below one, a dropout that is no
            probability below one, a name that stands twice, or an image adapter that is not among
            the adapters.

    Example:
        >>> CollavoTextConfig(hidden_size=64, num_attention_heads=4).crayon_mode
        'attention'
    """

    model_type = "collavo_text"

    crayon_mode: Literal["attention", "projection", "none"] = "attention"
    crayon_rank: int = 256
    crayon_alpha: float | int | None = None
    crayon_dropout: float | int = 0.0
    adapters: tuple[str, ...] | list[str] = ()
    image_adapters: tuple[str, ...] | list[str] = ()
    lora_rank: int | dict[str, int] = 64
    lora_alpha: float | int | dict[str, float | int] = 64.0
    lora_rank_pattern: dict[str, dict[str, int]] | None = None
    lora_alpha_pattern: dict[str, dict[str, float | int]] | None = None
    lora_dropout: float | int = 0.0
    quantize: Literal["nf4"] | None = None
    double_quant: bool = True
    quant_block_size: int = 64
    adapter_dtype: str | None = None
    extra_embeddings: int = 0

    def __post_init__(self, **kwargs: Any) -> None:
        """Normalise and check what this class adds."""
        self.adapters = _names(self.adapters, "adapters")
        self.image_adapters = _names(self.image_adapters, "image_adapters")
        super().__post_init__(**kwargs)
        self._check_adapters()

    def _check_adapters(self) -> None:
        if self.crayon_mode not in CRAYON_MODES:
            raise ValueError(
                f"crayon_mode: expected one of {CRAYON_MODES}, got {self.crayon_mode!r}"
            )
        if self.quantize not in (None, "nf4"):
            raise ValueError(f"quantize: expected None or 'nf4', got {self.quantize!r}")
        if len(set(self.adapters)) != len(self.adapters):
            raise ValueError(f"adapters: expected distinct names, got {list(self.adapters)}")
        if unknown := [name for name in self.image_adapters if name not in self.adapters]:
            raise ValueError(
                f"image_adapters: {unknown} are not among adapters {list(self.adapters)}"
            )
        for name in ("crayon_rank", "quant_block_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: expected at least 1, got {getattr(self, name)}")
        for name in ("crayon_dropout", "lora_dropout"):
            _check_dropout(name, getattr(self, name))
        for name in self.adapters:
            _check_rank(_of(self.lora_rank, name, "lora_rank"))
            _of(self.lora_alpha, name, "lora_alpha")

        for field in ("lora_rank_pattern", "lora_alpha_pattern"):
            patterns = getattr(self, field) or {}
            if unknown := [name for name in patterns if name not in self.adapters]:
                raise ValueError(f"{field}: {unknown} are not among adapters {list(self.adapters)}")
            for value in (v for layers in patterns.values() for v in layers.values()):
                if field == "lora_rank_pattern":
                    _check_rank(value)

    def adapter_size(self, name: str) -> tuple[int, float]:
        """Return rank and alpha of one adapter, as most of its layers have them."""
        rank = _of(self.lora_rank, name, "lora_rank")
        return int(rank), float(_of(self.lora_alpha, name, "lora_alpha"))

    def layer_sizes(self, name: str) -> dict[str, tuple[int, float]]:
        """Return rank and alpha of one adapter in the layers that have others, by their names."""
        rank, alpha = self.adapter_size(name)
        ranks = (self.lora_rank_pattern or {}).get(name, {})
        alphas = (self.lora_alpha_pattern or {}).get(name, {})
        layers = [*ranks, *(layer for layer in alphas if layer not in ranks)]
        return {n: (int(ranks.get(n, rank)), float(alphas.get(n, alpha))) for n in layers}

    def set_adapter_sizes(self, sizes: Mapping[str, Mapping[str, tuple[int, float]]]) -> None:
        """Record what every layer's adapters are: what most layers have, and what differs.

        Args:
            sizes: Rank and alpha by adapter and by the layer's name in the decoder.
        """
        usual = {name: _usual(layers.values()) for name, layers in sizes.items()}
        self._set_usual(usual)
        different: list[dict[str, dict[str, Any]]] = []
        for place in (0, 1):
            patterns = {
                name: {n: size[place] for n, size in layers.items() if size[place] != known[place]}
                for (name, layers), known in zip(sizes.items(), usual.values(), strict=True)
            }
            different.append({name: found for name, found in patterns.items() if found})
        self.lora_rank_pattern, self.lora_alpha_pattern = (each or None for each in different)

    def _set_usual(self, sizes: Mapping[str, tuple[int, float]]) -> None:
        if len(set(sizes.values())) == 1:
            self.lora_rank, self.lora_alpha = next(iter(sizes.values()))
        elif sizes:
            self.lora_rank = {name: size[0] for name, size in sizes.items()}
            self.lora_alpha = {name: size[1] for name, size in sizes.items()}

    @classmethod
    def get_config_dict(
        cls, pretrained_model_name_or_path: Any, **kwargs: Any
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """Read ``config.json``: a decoder's, a LLaMA's, or that of a whole CoLLaVO with one inside.

        Args:
            pretrained_model_name_or_path: As in transformers.
            **kwargs: As in transformers.

        Raises:
            FileNotFoundError: if there is none.
            ValueError: naming the folder and the ``model_type``.
        """
        values, rest = super().get_config_dict(pretrained_model_name_or_path, **kwargs)
        if values.get("model_type") not in ("llama", CollavoConfig.model_type):
            check_model_type(values, str(pretrained_model_name_or_path), cls.model_type)
        return values, rest

    def add_adapters(self, names: Sequence[str], rank: int, alpha: float, dropout: float) -> None:
        """Append adapters of one rank and alpha to those that are there; all get the dropout.

        Args:
            names: Their names.
            rank: R.
            alpha: Their scaling is ``alpha / rank``.
            dropout: Dropout on an adapter's input, while training.

        Raises:
            ValueError: for a name that is taken or no name, a rank below one, or a dropout that is
                no probability below one; nothing is changed then.
        """
        names = _names(names, "adapters")
        if taken := [name for name in names if name in self.adapters]:
            raise ValueError(f"adapters: the model has adapters of the names {taken} already")
        if len(set(names)) != len(names):
            raise ValueError(f"adapters: expected distinct names, got {list(names)}")
        _check_rank(rank)
        _check_dropout("lora_dropout", dropout)
        self.lora_dropout = dropout
        sizes = {name: self.adapter_size(name) for name in self.adapters}
        sizes |= dict.fromkeys(names, (rank, float(alpha)))
        self.adapters = tuple(sizes)
        self._set_usual(sizes)

    @property
    def crayon_scaling(self) -> float:
        """The factor of the crayon branch in projection mode."""
        return 1.0 if self.crayon_alpha is None else self.crayon_alpha / self.crayon_rank


def _usual(sizes: Iterable[tuple[int, float]]) -> tuple[int, float]:
    """Return the rank that most layers have, and the alpha."""
    ranks, alphas = (Counter(values) for values in zip(*sizes, strict=True))
    return ranks.most_common(1)[0][0], float(alphas.most_common(1)[0][0])


def check_model_type(values: Mapping[str, Any], where: str, expected: str) -> None:
    """Raise unless a configuration is of a kind of model, and name the way for its relatives.

    Args:
        values: ``config.json`` as a dictionary.
        where: What to call it.
        expected: The ``model_type`` that it has to have.

    Raises:
        FileNotFoundError: if it is empty: transformers reads a file that is not there as that.
        ValueError: naming the ``model_type``.
    """
    if not values:
        raise FileNotFoundError(f"{where}: has no config.json")
    kind = values.get("model_type")
    if kind == expected:
        return
    way = way_of(values) or "give a folder that save_pretrained of this package wrote"
    if kind == CollavoLlavaConfig.model_type:
        way = "this is a LLaVA that apply_to_llava changed: load it with collavo.load_pretrained"
    raise ValueError(f"{where}: expected model_type {expected!r}, got {kind!r}; {way}")


def refuse_relative(name: Any, expected: str, options: Mapping[str, Any]) -> None:
    """Raise if a folder or hub id holds a LLaVA or the official CoLLaVO, and name the way.

    Args:
        name: The folder or hub id; one without ``config.json`` passes.
        expected: What is to be read from it.
        options: transformers' download options, by name; others are not read.

    Raises:
        ValueError: naming the ``model_type``.
    """
    known = {key: options[key] for key in HUB_OPTIONS if key in options}
    try:
        values, _ = PretrainedConfig.get_config_dict(name, **known)
    except OSError:
        return
    if (way := way_of(values)) is not None:
        raise ValueError(
            f"{name}: expected the folder of a {expected}, got model_type "
            f"{values.get('model_type')!r}; {way}"
        )


def _names(names: Sequence[str], field: str) -> tuple[str, ...]:
    """Return names as a tuple; one string would be taken letter by letter."""
    if isinstance(names, str):
        raise ValueError(f"{field}: expected a sequence of names, got the string {names!r}")
    for name in names:
        if not isinstance(name, str) or not name or "." in name:
            raise ValueError(f"{field}: expected names without dots, got {name!r}")
    return tuple(names)


def _check_rank(rank: float) -> None:
    if rank < 1:
        raise ValueError(f"lora_rank: expected at least 1, got {rank}")


def _check_dropout(name: str, value: float) -> None:
    if not 0 <= value < 1:
        raise ValueError(f"{name}: expected 0 to below 1, got {value}")


def _of(value: float | Mapping[str, float], name: str, field: str) -> float:
    if not isinstance(value, Mapping):
        return value
    if name not in value:
        raise ValueError(f"{field}: expected an entry for adapter {name!r}, got {dict(value)}")
    return value[name]


TEXT_FIELDS = tuple(
    name for name in CollavoTextConfig.__annotations__ if name not in LlamaConfig.__annotations__
)


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

    Raises:
        ValueError: if ``text_config`` is neither a LLaMA-shaped configuration nor a dictionary of
            one.

    Example:
        >>> config = CollavoConfig(crayon_mode="projection", adapters=("image", "vl"))
        >>> config.text_config.crayon_mode, config.adapters
        ('projection', ('image', 'vl'))
    """

    model_type = "collavo"

    if TYPE_CHECKING:
        text_config: CollavoTextConfig
        vision_config: Any

    num_crayon_classes: int = 133
    max_crayon_number: int = 20
    crayon_embed_dim: int | None = None

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

    model_type = "collavo_llava"

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
AutoConfig.register(CollavoTextConfig.model_type, CollavoTextConfig, exist_ok=True)
AutoConfig.register(CollavoConfig.model_type, CollavoConfig, exist_ok=True)
