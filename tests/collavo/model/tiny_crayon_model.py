"""A CoLLaVO model of a few thousand parameters and a left-padded batch for it."""

from __future__ import annotations

from typing import Any

import torch
from tiny import tiny_vision
from torch import Tensor
from transformers import LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

from collavo.configuration import CollavoConfig
from collavo.model.llava import CollavoForConditionalGeneration
from collavo.model.patch import apply_to_llava

_SIZES = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "pad_token_id",
)
IMAGE, PAD, VOCABULARY, CELLS = 31, 0, 32, 4


def make_config(**options: Any) -> CollavoConfig:
    text = {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "pad_token_id": PAD,
        **options.pop("text", {}),
    }
    vision = tiny_vision()
    return CollavoConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=IMAGE,
        vision_feature_layer=-1,
        **{"crayon_rank": 4, "lora_rank": 4, "lora_alpha": 4.0, **options},
    )


def make_model(*, trained: bool = True, **options: Any) -> CollavoForConditionalGeneration:
    """Build a model; a trained one has no zero factors, so crayon and adapters have an effect."""
    torch.manual_seed(3)
    model = CollavoForConditionalGeneration(make_config(**options))
    if trained:
        for parameter in model.parameters():
            if parameter.is_floating_point():
                parameter.data.add_(torch.randn_like(parameter), alpha=0.1)
    return model.eval()


def make_llava(kind: Any = LlamaConfig) -> LlavaForConditionalGeneration:
    """Build a LLaVA of the same sizes, with any decoder."""
    config = make_config()
    text = {name: getattr(config.text_config, name) for name in _SIZES}
    torch.manual_seed(1)
    model = LlavaForConditionalGeneration(
        LlavaConfig(
            vision_config=config.vision_config,
            text_config=kind(**text),
            image_token_index=IMAGE,
            vision_feature_layer=-1,
        )
    )
    for parameter in model.parameters():
        parameter.data.add_(torch.randn_like(parameter), alpha=0.05)
    return model.eval()


def make_patched(model: Any = None, **options: Any) -> Any:
    """Give a LLaVA crayon and adapters that have an effect."""
    model = make_llava() if model is None else model
    apply_to_llava(model, **options)
    draw_added(model)
    return model


def draw_added(model: torch.nn.Module) -> None:
    """Draw crayon and adapters, which have no effect before they are trained."""
    generator = torch.Generator().manual_seed(5)
    for name, parameter in model.named_parameters():
        if "crayon" in name or "lora_" in name:
            drawn = torch.randn(parameter.shape, generator=generator) * 0.3
            parameter.data.copy_(drawn)


def make_batch() -> dict[str, Tensor]:
    """Two samples with one image each; the second is one token shorter at the left."""
    generator = torch.Generator().manual_seed(1)
    return {
        "input_ids": torch.tensor(
            [[1, IMAGE, IMAGE, IMAGE, IMAGE, 5, 6, 7], [PAD, 1, 9, IMAGE, IMAGE, IMAGE, IMAGE, 9]]
        ),
        "attention_mask": torch.tensor([[1] * 8, [0] + [1] * 7]),
        "pixel_values": torch.randn(2, 3, 8, 8, generator=generator),
        "crayon_index": torch.tensor([[0, 1, 1, -1], [2, 1, 0, 1]], dtype=torch.int32),
        "crayon_class": torch.tensor([[0, 18, -1], [0, 3, 5]], dtype=torch.int32),
        "crayon_number": torch.tensor([[0, 1, 0], [0, 1, 2]], dtype=torch.int32),
    }


def row(batch: dict[str, Tensor], index: int, *, skip: int = 0) -> dict[str, Tensor]:
    """One sample of the batch, without its first ``skip`` tokens."""
    single = {name: value[index : index + 1] for name, value in batch.items()}
    for name in ("input_ids", "attention_mask"):
        single[name] = single[name][:, skip:]
    return single
