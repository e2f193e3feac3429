"""Folders that hold no model of this package but become one: told by their ``config.json``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

COMMAND = "`collavo convert SOURCE TARGET`"
WAY_OF_LLAVA = (
    f"this is a LLaVA: turn it into a CoLLaVO folder with {COMMAND}, or load it with its own class "
    "and give it the crayon with collavo.apply_to_llava"
)
WAY_OF_OFFICIAL = f"this is the official CoLLaVO: turn it into a CoLLaVO folder with {COMMAND}"
WAY_OF_ORIGINAL = (
    f"this is a LLaVA in the original repository's format: turn it into a CoLLaVO folder with "
    f"{COMMAND}"
)
LLAVA_TYPES = (
    "llava",
    "llava_next",
    "llava_next_video",
    "llava_onevision",
    "vipllava",
    "video_llava",
    "mistral3",
    "internvl",
    "got_ocr2",
    "ovis2",
    "janus",
    "idefics2",
    "idefics3",
    "smolvlm",
)
"""``model_type`` of the classes of transformers that can have the crayon."""
# What the original repository writes into the decoder's own configuration.
_OF_THE_ORIGINAL = ("mm_vision_tower", "mm_projector_type", "mm_hidden_size")


def is_official(values: Mapping[str, Any]) -> bool:
    """Say whether a configuration is that of the official CoLLaVO, an InternLM2.

    Args:
        values: ``config.json`` as a dictionary.
    """
    kind, named = values.get("model_type"), values.get("architectures")
    listed = isinstance(named, list) and "CoLLaVOModel" in named
    return listed or str(kind).startswith("internlm")


def is_original_llava(values: Mapping[str, Any]) -> bool:
    """Say whether a configuration is that of a LLaVA as its own repository writes it.

    Args:
        values: ``config.json`` as a dictionary.
    """
    kind = str(values.get("model_type"))
    of_family = kind.startswith(("llava_", "tinyllava")) and kind not in LLAVA_TYPES
    return of_family or any(name in values for name in _OF_THE_ORIGINAL)


def is_llava(values: Mapping[str, Any]) -> bool:
    """Say whether a configuration is that of a LLaVA, or of its kin, in transformers' format.

    Args:
        values: ``config.json`` as a dictionary.
    """
    return values.get("model_type") in LLAVA_TYPES and not is_original_llava(values)


def way_of(values: Mapping[str, Any]) -> str | None:
    """Return what to do with a folder that becomes one of this package, None for another.

    Args:
        values: Its ``config.json`` as a dictionary.
    """
    if is_official(values):
        return WAY_OF_OFFICIAL
    if is_original_llava(values):
        return WAY_OF_ORIGINAL
    return WAY_OF_LLAVA if is_llava(values) else None
