"""A LLaVA as its own repository saves it, tiny: the decoder's folder with ``mm_`` settings."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tests.collavo.conversion.official_folder import write_folder
from tests.collavo.conversion.tiny_parts import VISION, write_language, write_tower

SETTINGS: dict[str, Any] = {
    "freeze_mm_mlp_adapter": False,
    "image_aspect_ratio": "pad",
    "image_grid_pinpoints": None,
    "max_length": 4096,
    "mm_hidden_size": VISION["hidden_size"],
    "mm_projector_lr": None,
    "mm_resampler_type": None,
    "mm_use_im_patch_token": False,
    "mm_use_im_start_end": False,
    "mm_vision_select_feature": "patch",
    "mm_vision_select_layer": -2,
    "mm_vision_tower": "openai/clip-vit-large-patch14-336",
    "pretraining_tp": 1,
    "tokenizer_model_max_length": 2048,
    "tokenizer_padding_side": "right",
    "torch_dtype": "float16",
    "transformers_version": "4.31.0",
    "tune_mm_mlp_adapter": False,
    "unfreeze_mm_vision_tower": True,
    "use_mm_proj": True,
}
TYPES = {
    "llama": ("llava_llama", "LlavaLlamaForCausalLM"),
    "mistral": ("llava_mistral", "LlavaMistralForCausalLM"),
    "qwen2": ("llava_qwen", "LlavaQwenForCausalLM"),
}


def projector(kind: str) -> dict[str, Tensor]:
    """Draw a projector by LLaVA's names."""
    torch.manual_seed(3)
    layers = {"linear": {"": 16}, "mlp2x_gelu": {"0.": 16, "2.": 64}}[kind]
    found = {}
    for name, width in layers.items():
        found[f"model.mm_projector.{name}weight"] = torch.randn(64, width).half() / 8
        found[f"model.mm_projector.{name}bias"] = torch.randn(64).half() / 8
    return found


def write_original(
    folder: Path,
    kind: str = "llama",
    *,
    projector_type: str = "mlp2x_gelu",
    tower: bool = False,
    files: str = "torch",
    shards: int = 1,
    changes: Mapping[str, Any] | None = None,
) -> dict[str, Tensor]:
    """Write a checkpoint and beside it ``clip``, its tower's folder; return its tensors."""
    parts = folder.parent / f"{folder.name}-parts"
    language = write_language(parts, kind)
    vision = write_tower(folder.parent / "clip")
    tensors = {name: value.half() for name, value in language.state_dict().items()}
    tensors |= projector(projector_type)
    if tower:
        for name, value in vision.state_dict().items():
            own = name.removeprefix("vision_model.")
            tensors[f"model.vision_tower.vision_tower.vision_model.{own}"] = value.half()
    model_type, architecture = TYPES[kind]
    config = json.loads((parts / "config.json").read_text()) | SETTINGS
    config |= {"model_type": model_type, "architectures": [architecture]}
    config |= {"mm_projector_type": projector_type, **(changes or {})}
    write_folder(folder, tensors, config, kind=files, shards=shards)
    for file in parts.glob("tokenizer*"):
        shutil.copyfile(file, folder / file.name)
    return tensors
