"""``adapter_config.json``: what of it is honoured, what has no effect here, and what is refused."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

CONFIG_FILE = "adapter_config.json"

_HONOURED = (
    *("peft_type", "r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora"),
    *("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern"),
    *("init_lora_weights", "bias", "lora_dropout"),
)
"""What a loaded adapter computes follows from these. Dropout acts in training alone."""

_WITHOUT_EFFECT = (
    *("task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision"),
    *("inference_mode", "runtime_config"),
    # Settings of features that are refused, or only used, where they are switched on.
    *("loftq_config", "eva_config", "corda_config", "lora_ga_config"),
    *("qalora_group_size", "megatron_core"),
)
"""Records, and settings that nobody reads while the feature they belong to is switched off."""

_REFUSED = {
    "use_dora": "DoRA",
    "lora_bias": "lora_bias",
    "fan_in_fan_out": "fan_in_fan_out",
    "alora_invocation_tokens": "aLoRA",
    "use_qalora": "QALoRA",
    "velora_config": "VeLoRA",
    "monteclora_config": "MonteCLoRA",
    "use_bdlora": "BD-LoRA",
    "arrow_config": "Arrow routing",
    "kasa_config": "KaSA",
    "layer_replication": "replicated layers",
    "modules_to_save": "whole modules beside the layers",
    "trainable_token_indices": "trained tokens",
    "target_parameters": "bare parameters",
    "megatron_config": "Megatron's layers",
    "ensure_weight_tying": "tied adapters",
}
_AROUND_THE_LAYERS = (
    *("bias", "layer_replication", "modules_to_save", "trainable_token_indices"),
    *("target_parameters", "ensure_weight_tying", "layers_to_transform", "layers_pattern"),
)
"""What PEFT does to a model beside the branches of its layers."""

_ON_WHEN_EMPTY = ("velora_config", "monteclora_config", "use_bdlora", "arrow_config", "kasa_config")
"""An empty dictionary switches these on, with their defaults."""

KEEP_THE_BASE = ("gaussian", "eva", "orthogonal", "mica")
"""Ways to draw a new adapter that leave the base alone, so a loaded one does not depend on them."""

_CHANGE_THE_BASE = {
    "pissa": "PiSSA",
    "olora": "OLoRA",
    "corda": "CorDA",
    "loftq": "LoftQ",
    "lora_ga": "LoRA-GA",
}
_PATTERN, _INDEX = r"(.*\.)?({})$", r"(?:^|.*?\.){}\.(?P<idx>\d+)\."
"""How PEFT reads a key of a pattern, and a name of the list of decoder layers."""

_MERGE = "merge it into the model with PEFT (merge_and_unload) and load that"
_CONVERT = f"save the adapter with PEFT's path_initial_model_for_weight_conversion, or {_MERGE}"
_LEAVE_OUT = "leave it out"


@dataclass(frozen=True)
class AdapterConfig:
    """The settings of a saved LoRA adapter, checked.

    Attributes:
        source: The file, as errors name it.
        rank: R where ``rank_pattern`` says no other.
        alpha: alpha where ``alpha_pattern`` says no other.
        rank_pattern: Ranks by regular expression of a layer's name.
        alpha_pattern: alphas likewise.
        rslora: Whether the scaling is ``alpha / sqrt(R)``.
        targets: A regular expression, or ends of layers' names; None if the file does not say.
        excluded: The same, of layers that have no adapter all the same.
        indices: Numbers of the decoder layers that have adapters; None for all.
        index_patterns: What the list of decoder layers may be called; empty for any name.
    """

    source: str
    rank: int
    alpha: float
    rank_pattern: Mapping[str, int]
    alpha_pattern: Mapping[str, float]
    rslora: bool
    targets: str | Sequence[str] | None
    excluded: str | Sequence[str]
    indices: Collection[int] | None
    index_patterns: Sequence[str]

    def size(self, names: Sequence[str]) -> tuple[int, float]:
        """Return a layer's rank and scaling.

        Args:
            names: What the layer is called: in the file, and in the model.

        Raises:
            ValueError: if a pattern fits one of the names and not the other.
        """
        rank = self._by_pattern("rank_pattern", self.rank_pattern, names, self.rank)
        alpha = self._by_pattern("alpha_pattern", self.alpha_pattern, names, self.alpha)
        return int(rank), alpha / (math.sqrt(rank) if self.rslora else rank)

    def covers(self, name: str) -> bool:
        """Tell whether PEFT gives a layer of this name an adapter."""
        if self.targets is None:
            return True
        if _named(self.excluded, name):
            return False
        # A full name counts whatever the decoder layer's number.
        if self.targets == "all-linear" or (
            not isinstance(self.targets, str) and name in self.targets
        ):
            return True
        return _named(self.targets, name) and (self.indices is None or self._index(name))

    def _index(self, name: str) -> bool:
        # PEFT takes the first number after a dotted word: it is the decoder layer's.
        found = None
        for pattern in self.index_patterns:
            found = re.match(_INDEX.format(pattern), name)
            if found is not None:
                break
        if not self.index_patterns:
            found = re.match(r".*?\.[^.]*\.(?P<idx>\d+)\.", name)
        return found is not None and int(found.group("idx")) in (self.indices or ())

    def _by_pattern(
        self, field: str, patterns: Mapping[str, float], names: Sequence[str], default: float
    ) -> float:
        values = [_first(patterns, name, default) for name in names]
        if len(set(values)) > 1:
            raise ValueError(
                f"{self.source}: {field}: gives {values[0]} for {names[0]}, as the file calls the "
                f"layer, and {values[1]} for {names[1]}, as the model does; rename its keys"
            )
        return values[0]


def read_config(path: Path) -> AdapterConfig:
    """Read and check an ``adapter_config.json``.

    Raises:
        OSError: if there is no such file.
        ValueError: naming the file, and the setting that is damaged or refused.
    """
    if not path.is_file():
        others = sorted(each.parent.name for each in path.parent.glob(f"*/{CONFIG_FILE}"))
        hint = f"; there are adapters in its folders {', '.join(others)}" if others else ""
        raise FileNotFoundError(f"{path}: missing from the adapter's folder{hint}")
    try:
        config = json.loads(path.read_text(encoding="utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not a JSON file ({error}); copy it anew") from error
    if not isinstance(config, dict):
        raise ValueError(
            f"{path}: expected a JSON object, got {type(config).__name__}; copy it anew"
        )
    for field in ("peft_type", "target_modules"):
        if config.get(field) is None:
            raise ValueError(f"{path}: {field}: missing; every adapter that PEFT saves has it")
    return check_config(config, str(path))


def check_config(config: Mapping[str, Any], source: str = CONFIG_FILE) -> AdapterConfig:
    """Return the settings of a LoRA adapter, or say which of them cannot be honoured.

    Args:
        config: Fields of ``adapter_config.json``; those that are missing have PEFT's defaults.
        source: What to call it in an error.

    Raises:
        ValueError: naming the setting.
    """
    check = _Fields(config, source)
    check.refuse_what_is_not_understood()
    indices = config.get("layers_to_transform")
    return AdapterConfig(
        source,
        rank=check.whole("r", config.get("r", 8), least=1),
        alpha=check.number("lora_alpha", config.get("lora_alpha", 8)),
        rank_pattern={
            key: check.whole(f"rank_pattern[{key!r}]", value, least=1)
            for key, value in check.patterns("rank_pattern").items()
        },
        alpha_pattern={
            key: check.number(f"alpha_pattern[{key!r}]", value)
            for key, value in check.patterns("alpha_pattern").items()
        },
        rslora=check.flag("use_rslora"),
        targets=None if config.get("target_modules") is None else check.names("target_modules"),
        excluded=check.names("exclude_modules"),
        indices=None if indices is None or indices == [] else check.indices(indices),
        index_patterns=check.index_patterns(),
    )


def check_branches(config: Mapping[str, Any], source: str = "LoraConfig") -> None:
    """Raise unless the adapters that PEFT makes with these settings are branches ``s B A x``.

    Args:
        config: Fields of PEFT's ``LoraConfig``.
        source: What to call it in an error.

    Raises:
        ValueError: naming the setting.
    """
    own = {key: value for key, value in config.items() if key not in _AROUND_THE_LAYERS}
    check = _Fields(own, source, _LEAVE_OUT)
    check.refuse_what_is_not_understood()
    if own.get("init_lora_weights") in ("orthogonal", "mica"):  # both read or follow a dense weight
        raise check.error(
            "init_lora_weights",
            "expected true, false, 'gaussian' or 'eva'",
            own["init_lora_weights"],
            _LEAVE_OUT,
        )


class _Fields:
    """Checks fields one by one; every error names the file, the field, and what came."""

    def __init__(self, config: Mapping[str, Any], source: str, advice: str = _MERGE) -> None:
        self.config, self.source, self.advice = config, source, advice

    def refuse_what_is_not_understood(self) -> None:
        kind = self.config.get("peft_type", "LORA")
        if kind != "LORA":
            raise self.error("peft_type", "expected 'LORA'", kind, self.advice)
        for field, value in self.config.items():
            if field in _HONOURED or field in _WITHOUT_EFFECT or _off(field, value):
                continue
            shown = f"got {_short(value)}; {self.advice}"
            if field in _REFUSED:
                raise ValueError(
                    f"{self.source}: {field} is set; adapters with {_REFUSED[field]} are not "
                    f"supported, {shown}"
                )
            raise ValueError(
                f"{self.source}: {field} is set and is not known here, so the adapter may compute "
                f"something else, {shown}, or take the field out if it changes nothing"
            )
        self._refuse_init()
        if self.config.get("bias", "none") != "none":
            raise self.error("bias", "expected 'none'", self.config["bias"], self.advice)
        dropout = self.number("lora_dropout", self.config.get("lora_dropout", 0.0))
        if not 0 <= dropout <= 1:
            raise self.error("lora_dropout", "expected 0 to 1", dropout)
        if isinstance(self.config.get("target_modules"), str) and self.config.get(
            "layers_to_transform"
        ):
            raise self.error(
                "layers_to_transform",
                "expected None beside target_modules that are a regular expression",
                self.config["layers_to_transform"],
            )

    def _refuse_init(self) -> None:
        init = self.config.get("init_lora_weights", True)
        if init is None or isinstance(init, bool) or init in KEEP_THE_BASE:
            return
        text = str(init).lower()
        known = [name for start, name in _CHANGE_THE_BASE.items() if text.startswith(start)]
        if not known:
            expected = f"expected true, false or one of {', '.join(KEEP_THE_BASE)}"
            raise self.error("init_lora_weights", expected, init, self.advice)
        raise self.error(
            "init_lora_weights",
            f"adapters with {known[0]} are not supported: it changes the base weights",
            init,
            _CONVERT if self.advice == _MERGE else self.advice,
        )

    def error(self, field: str, expected: str, value: object, advice: str = "") -> ValueError:
        end = f"; {advice}" if advice else "; copy the adapter's folder anew"
        return ValueError(f"{self.source}: {field}: {expected}, got {_short(value)}{end}")

    def whole(self, field: str, value: object, least: int) -> int:
        whole = isinstance(value, int) and not isinstance(value, bool)
        if not (whole and least <= cast(int, value) < 2**31):
            raise self.error(field, f"expected a whole number of at least {least}", value)
        return cast(int, value)

    def number(self, field: str, value: object) -> float:
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise self.error(field, "expected a number", value)
        if not abs(value) < 1e300:  # NaN compares false; JSON's integers have no end
            raise self.error(field, "expected a finite number", value)
        return float(value)

    def flag(self, field: str) -> bool:
        value = self.config.get(field)
        if value is not None and not isinstance(value, bool):
            raise self.error(field, "expected true or false", value)
        return bool(value)

    def patterns(self, field: str) -> Mapping[str, Any]:
        value = self.config.get(field) or {}
        if not isinstance(value, Mapping):
            raise self.error(field, "expected an object of layers' names", value)
        for key in value:
            self._compile(field, key, _PATTERN)
        return value

    def index_patterns(self) -> Sequence[str]:
        names = self.names("layers_pattern")
        listed = ([names] if names else []) if isinstance(names, str) else names
        for pattern in listed:
            self._compile("layers_pattern", pattern, _INDEX)
        return listed

    def names(self, field: str) -> str | Sequence[str]:
        value = self.config.get(field)
        if isinstance(value, str):
            self._compile(field, value)
            return value
        if isinstance(value, (set, frozenset)):
            value = sorted(value)
        value = [] if value is None else value
        if not isinstance(value, (list, tuple)) or not all(isinstance(n, str) for n in value):
            raise self.error(field, "expected a regular expression or a list of names", value)
        return value

    def indices(self, value: object) -> Collection[int]:
        listed = value if isinstance(value, list) else [value]
        return [self.whole("layers_to_transform", index, least=0) for index in listed]

    def _compile(self, field: str, pattern: str, use: str = "{}") -> None:
        try:
            re.compile(use.format(pattern))
        except re.error as error:
            expected = f"expected a regular expression ({error})"
            raise self.error(field, expected, pattern) from error


def _off(field: str, value: object) -> bool:
    if field in _ON_WHEN_EMPTY:
        return value is None or value is False
    return value is None or value is False or (hasattr(value, "__len__") and len(value) == 0)


def _named(names: str | Sequence[str], name: str) -> bool:
    if isinstance(names, str):
        return bool(names) and re.fullmatch(names, name) is not None
    return any(name == each or name.endswith(f".{each}") for each in names)


def _first(patterns: Mapping[str, float], name: str, default: float) -> float:
    for pattern, value in patterns.items():
        if re.match(_PATTERN.format(pattern), name):
            return value
    return patterns.get(name, default)


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
