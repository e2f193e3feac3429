"""The decoder's configuration: LLaMA's, the crayon's and the adapters'."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

import collavo._requirements  # noqa: F401  (before what it checks)

from huggingface_hub.dataclasses import strict
from torch import nn
from transformers import AutoConfig, LlamaConfig

from collavo.configuration.kinds import TEXT, WHOLE, check_model_type

CRAYON_MODES = ("attention", "projection", "none")
# Attributes of what holds adapters by their names.
_TAKEN = frozenset(dir(nn.ModuleDict()))


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

    model_type = TEXT

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
        if values.get("model_type") not in ("llama", WHOLE):
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
            ValueError: for a name that is taken or no name, a rank below one, an alpha that is not
                above 0, or a dropout that is no probability below one; nothing is changed then.
        """
        names = _names(names, "adapters")
        if taken := [name for name in names if name in self.adapters]:
            raise ValueError(f"adapters: the model has adapters of the names {taken} already")
        if len(set(names)) != len(names):
            raise ValueError(f"adapters: expected distinct names, got {list(names)}")
        _check_rank(rank)
        if names and not 0 < alpha < math.inf:
            raise ValueError(f"lora_alpha: expected a number above 0, got {alpha}")
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


def _names(names: Sequence[str], field: str) -> tuple[str, ...]:
    """Return names as a tuple; one string would be taken letter by letter."""
    if isinstance(names, str):
        raise ValueError(f"{field}: expected a sequence of names, got the string {names!r}")
    for name in names:
        if not isinstance(name, str) or not name or "." in name:
            raise ValueError(f"{field}: expected names without dots, got {name!r}")
        if name in _TAKEN:
            raise ValueError(f"{field}: {name!r} is a word of torch's own; take another name")
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

AutoConfig.register(CollavoTextConfig.model_type, CollavoTextConfig, exist_ok=True)
