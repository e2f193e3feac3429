"""Recipes of the papers: what a run of a stage takes where nothing else is said."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

Settings = Mapping[str, Any]

TUNING: Settings = MappingProxyType(
    {
        "lr_scheduler_type": "cosine",
        "warmup_steps": 0.03,
        "weight_decay": 0.0,
        "bf16": True,
        "max_length": 2048,
    }
)
"""What LLaVA's stages have in common: AdamW, cosine to 0, warm-up for 3 % of the steps."""

_224 = {"projector_type": "linear", "image_size": 224, "image_mode": "crop"}
_336 = {"projector_type": "mlp2x_gelu", "image_size": 336, "image_mode": "crop"}
_PADDED = {**_336, "image_mode": "pad"}
_ALIGN = {"num_train_epochs": 1.0, "template": "plain", **TUNING}
_ALIGN_1 = {**_ALIGN, **_224, "learning_rate": 2e-3, "global_batch": 128}
_ALIGN_15 = {**_ALIGN, **_336, "learning_rate": 1e-3, "global_batch": 256}

PRESETS: dict[str, dict[str, Settings]] = {
    "llava-1": {
        "align": _ALIGN_1,
        "instruct": {
            **TUNING,
            **_224,
            "learning_rate": 2e-5,
            "global_batch": 32,
            "num_train_epochs": 3.0,
            "template": "llava_v0",
        },
    },
    "llava-1.5": {
        "align": _ALIGN_15,
        "instruct": {
            **TUNING,
            **_PADDED,
            "learning_rate": 2e-5,
            "global_batch": 128,
            "num_train_epochs": 1.0,
            "template": "vicuna_v1",
        },
    },
    "llava-1.5-lora": {
        "align": _ALIGN_15,
        "instruct": {
            **TUNING,
            **_PADDED,
            "learning_rate": 2e-4,
            "projector_learning_rate": 2e-5,
            "global_batch": 128,
            "num_train_epochs": 1.0,
            "template": "vicuna_v1",
            "adapters": ("instruct",),
            "lora_rank": 128,
            "lora_alpha": 256.0,
            "lora_dropout": 0.05,
        },
    },
    "scienceqa": {
        "align": _ALIGN_1,
        "instruct": {
            **TUNING,
            **_224,
            "learning_rate": 2e-5,
            "global_batch": 128,
            "num_train_epochs": 12.0,
            "template": "v1",
        },
    },
}
"""By name and stage: LLaVA (arXiv 2304.08485, 4.2, 5.2, appendix C), LLaVA-1.5 (arXiv 2310.03744).

``scienceqa`` begins with LLaVA-1's alignment. A setting is an argument of the trainer or of
``collavo train``, or, as ``projector_type``, ``image_size`` and ``image_mode``, how the model's
folder is built.
"""


def preset_settings(preset: str | None, stage: str) -> Settings:
    """Return what a preset says about a stage; of no preset, nothing.

    Args:
        preset: A name of ``PRESETS``, or None.
        stage: A name of ``STAGES``.

    Raises:
        ValueError: naming the presets that there are, or the stages that this one has.

    Example:
        >>> preset_settings("llava-1.5", "align")["learning_rate"]
        0.001
    """
    if preset is None:
        return {}
    if preset not in PRESETS:
        known = ", ".join(map(repr, PRESETS))
        raise ValueError(f"preset: expected one of {known}, got {preset!r}")
    if stage not in PRESETS[preset]:
        stages = " or ".join(map(repr, PRESETS[preset]))
        raise ValueError(f"preset: {preset!r} is for the stages {stages}, got stage {stage!r}")
    return PRESETS[preset][stage]
