"""LoRA adapters in PEFT's saved format: its keys, its patterns, and what is refused."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors.torch import load_file, save_file
from torch import Tensor, nn

if TYPE_CHECKING:
    from collavo_kernels.nn.linear.module import DualQLoRALinear

_PREFIX = "base_model.model."
_WEIGHTS, _CONFIG = "adapter_model.safetensors", "adapter_config.json"
_REFUSED = {
    "use_dora": "DoRA",
    "lora_bias": "lora_bias",
    "fan_in_fan_out": "fan_in_fan_out",
}


def factor_keys(module_name: str) -> tuple[str, str]:
    """Return the keys under which PEFT saves a layer's A and B."""
    stem = f"{_PREFIX}{module_name}." if module_name else ""
    return f"{stem}lora_A.weight", f"{stem}lora_B.weight"


def read_factors(
    state: Mapping[str, Tensor], config: Mapping[str, Any], module_name: str
) -> tuple[Tensor, Tensor, float]:
    """Return a layer's A ``[R, K]``, B ``[N, R]`` and scaling from a saved adapter.

    Raises:
        ValueError: if an entry is missing, its rank is not the configured one, or the adapter uses
            something that this package does not do; it is named.
    """
    for key, name in _REFUSED.items():
        if config.get(key):
            raise ValueError(f"{_CONFIG}: {key} is set; adapters with {name} are not supported")
    a, b = (_find(state, key) for key in factor_keys(module_name))
    rank = int(_by_pattern(config, "rank_pattern", module_name, config.get("r", a.shape[0])))
    alpha = float(_by_pattern(config, "alpha_pattern", module_name, config.get("lora_alpha", rank)))
    if a.dim() != 2 or b.dim() != 2 or a.shape[0] != rank or b.shape[1] != rank:
        raise ValueError(
            f"{module_name or 'adapter'}: expected rank {rank} as {_CONFIG} says, "
            f"got lora_A {list(a.shape)} and lora_B {list(b.shape)}"
        )
    return a, b, alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)


def load_peft_adapter(model: nn.Module, folder: str | Path, slot: str) -> list[str]:
    """Load an adapter that PEFT saved into one slot of every ``DualQLoRALinear`` it covers.

    Args:
        model: Its module names are those of the model that the adapter was trained on.
        folder: Holds ``adapter_model.safetensors`` and ``adapter_config.json``.
        slot: The name of the adapter to fill.

    Returns:
        The names of the layers that were filled.

    Raises:
        OSError: if a file is missing.
        ValueError: if the adapter covers a layer that the model lacks, or cannot be expressed.
    """
    path = Path(folder)
    config = json.loads((path / _CONFIG).read_text())
    state = load_file(path / _WEIGHTS)
    layers = _layers(model)
    wanted = {name for name in layers if factor_keys(name)[0] in state}
    known = {key for name in wanted for key in factor_keys(name)}
    surplus = sorted(set(state) - known)
    if surplus:
        raise ValueError(
            f"{path / _WEIGHTS}: {len(surplus)} entries belong to no DualQLoRALinear of the model, "
            f"the first is {surplus[0]}"
        )
    for name in sorted(wanted):
        layers[name].load_peft_adapter(state, slot, config=config, module_name=name)
    return sorted(wanted)


def save_peft_adapter(
    model: nn.Module, folder: str | Path, slot: str, base_model: str = ""
) -> None:
    """Save one slot of every ``DualQLoRALinear`` of a model so that PEFT loads it.

    Args:
        model: The model.
        folder: Made if needed; gets ``adapter_model.safetensors`` and ``adapter_config.json``.
        slot: The name of the adapter to save.
        base_model: Recorded as ``base_model_name_or_path``.

    Raises:
        ValueError: if no layer of the model has such an adapter.
    """
    layers = {n: each for n, each in _layers(model).items() if slot in each.adapter_names}
    if not layers:
        raise ValueError(f"slot: no layer of the model has an adapter {slot!r}")
    state: dict[str, Tensor] = {}
    ranks: dict[str, int] = {}
    alphas: dict[str, float] = {}
    for name, layer in layers.items():
        entries = layer.peft_state_dict(slot, name)
        state |= {key: value.contiguous() for key, value in entries.items()}
        ranks[name] = layer.adapter(slot).a.shape[0]
        alphas[name] = layer.scaling[slot] * ranks[name]
    first = next(iter(layers))
    config = {
        "peft_type": "LORA",
        "task_type": None,
        "base_model_name_or_path": base_model or None,
        "r": ranks[first],
        "lora_alpha": alphas[first],
        "rank_pattern": {n: r for n, r in ranks.items() if r != ranks[first]},
        "alpha_pattern": {n: a for n, a in alphas.items() if a != alphas[first]},
        "target_modules": sorted(layers),
        "lora_dropout": layers[first].dropout,
        "bias": "none",
        "inference_mode": True,
    }
    path = Path(folder)
    path.mkdir(parents=True, exist_ok=True)
    save_file(state, path / _WEIGHTS, metadata={"format": "pt"})
    (path / _CONFIG).write_text(json.dumps(config, indent=2) + "\n")


def _layers(model: nn.Module) -> dict[str, DualQLoRALinear]:
    from collavo_kernels.nn.linear.module import DualQLoRALinear

    return {n: m for n, m in model.named_modules() if isinstance(m, DualQLoRALinear)}


def _find(state: Mapping[str, Tensor], key: str) -> Tensor:
    if key not in state:
        raise ValueError(f"{key}: missing from the adapter's state dict")
    return state[key]


def _by_pattern(config: Mapping[str, Any], field: str, module_name: str, default: Any) -> Any:
    for pattern, value in (config.get(field) or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", module_name):
            return value
    return default
