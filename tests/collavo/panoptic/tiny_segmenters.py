"""Tiny random panoptic models of every family, saved as a user's folder would be."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import tiny
import torch
import transformers
from PIL import Image

FAMILIES = ("mask2former", "maskformer", "oneformer")


def config(family: str, **changes: Any) -> Any:
    """Return a config whose model has some 10,000s of weights."""
    stages = ["stage1", "stage2", "stage3", "stage4"]
    backbone = transformers.SwinConfig(
        embed_dim=8, depths=[1] * 4, num_heads=[1] * 4, window_size=2, image_size=64,
        out_features=stages,
    )  # fmt: skip
    common: dict[str, Any] = {"backbone_config": backbone, "num_labels": 133, **changes}
    if family == "maskformer":
        decoder = transformers.DetrConfig(
            d_model=32, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2,
            decoder_attention_heads=2, encoder_ffn_dim=16, decoder_ffn_dim=16, num_queries=5,
        )  # fmt: skip
        return transformers.MaskFormerConfig(
            decoder_config=decoder, fpn_feature_size=32, mask_feature_size=32, **common
        )
    small: dict[str, Any] = {
        "hidden_dim": 32, "encoder_layers": 1, "decoder_layers": 2, "num_attention_heads": 2,
        "dim_feedforward": 16, "encoder_feedforward_dim": 16, "num_queries": 5,
    }  # fmt: skip
    if family == "mask2former":
        return transformers.Mask2FormerConfig(
            feature_size=32, mask_feature_size=32, **small, **common
        )
    return transformers.OneFormerConfig(
        conv_dim=32, mask_dim=32, task_seq_len=8, text_encoder_width=64, text_encoder_n_ctx=4,
        text_encoder_num_layers=1, text_encoder_context_length=8, text_encoder_vocab_size=50,
        **small, **common,
    )  # fmt: skip


def names(family: str) -> tuple[str, str, str]:
    """Return the names of a family's model class, module and image processor class."""
    name = {"mask2former": "Mask2Former", "maskformer": "MaskFormer"}.get(family, "OneFormer")
    kind = "Instance" if family == "maskformer" else "Universal"
    module = f"transformers.models.{family}.image_processing_pil_{family}"
    return f"{name}For{kind}Segmentation", module, f"{name}ImageProcessorPil"


def image_processor(family: str, **kwargs: Any) -> Any:
    """Return an image processor that keeps the shape of an image, as MaskFormer's do."""
    _, module, name = names(family)
    kwargs.setdefault("size", {"shortest_edge": 96, "longest_edge": 256})
    return getattr(importlib.import_module(module), name)(**kwargs)


def save(family: str, folder: Path, **changes: Any) -> str:
    """Save a model with large random weights (it is sure of something) and its processor."""
    torch.manual_seed(0)
    model = getattr(transformers, names(family)[0])(config(family, **changes))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    image_processor(family).save_pretrained(folder)
    if family == "oneformer":
        tiny.tiny_tokenizer(["the task is panoptic"]).save_pretrained(folder)
        # As in the hub's folders; the file itself is on the hub and must not be asked for.
        path = Path(folder) / "preprocessor_config.json"
        content = json.loads(path.read_text())
        path.write_text(json.dumps({**content, "class_info_file": "coco_panoptic.json"}))
    return str(folder)


def picture(width: int, height: int, seed: int = 0) -> Image.Image:
    """Return an image of coarse random blocks."""
    colours = np.random.default_rng(seed).integers(0, 256, (4, 5, 3), dtype=np.uint8)
    return Image.fromarray(colours).resize((width, height), Image.Resampling.NEAREST)
