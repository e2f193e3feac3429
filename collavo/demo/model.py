"""The demo's tiny model: CLIP tower, projector and LLaMA decoder of under a million weights."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from transformers import CLIPVisionConfig, PreTrainedTokenizerFast

from collavo.configuration import CollavoConfig
from collavo.demo.language import CHAT_TEMPLATE, IMAGE, coordinate_of
from collavo.demo.scenes import SIZE
from collavo.model.llava import CollavoForConditionalGeneration
from collavo.processing import CollavoProcessor, make_image_processor

PATCH = 8
GRID = SIZE // PATCH
HIDDEN = 128
SLOT = HIDDEN // 4
"""Embedding dimensions that start as the waves of one coordinate: x first, then y."""
_SCALE = 0.1
_WAVE_SCALE = 0.2


def waves(position: Tensor) -> Tensor:
    """Write coordinates as sines and cosines.

    Args:
        position: float ``[...]`` in 0..1.

    Returns:
        float32 ``[..., SLOT]``.
    """
    frequencies = math.pi * 2.0 ** torch.linspace(-0.5, 2.5, SLOT // 2)
    angles = position[..., None] * frequencies
    return torch.cat([angles.sin(), angles.cos()], dim=-1) * _WAVE_SCALE


def patch_waves() -> Tensor:
    """Return the waves of every patch's centre, float32 ``[GRID * GRID, 2 * SLOT]``."""
    centres = (torch.arange(GRID) + 0.5) / GRID
    rows, columns = torch.meshgrid(centres, centres, indexing="ij")
    return torch.cat([waves(columns.flatten()), waves(rows.flatten())], dim=-1)


def build_config(tokenizer: PreTrainedTokenizerFast) -> CollavoConfig:
    """Return the configuration of the tiny model.

    Args:
        tokenizer: Gives the vocabulary and its special tokens.
    """
    vision = CLIPVisionConfig(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        image_size=SIZE,
        patch_size=PATCH,
    )
    text = {
        "vocab_size": len(tokenizer),
        "hidden_size": HIDDEN,
        "intermediate_size": 320,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "max_position_embeddings": 512,
        # At this width the usual 0.02 would leave every layer nearly silent.
        "initializer_range": 1.0 / math.sqrt(HIDDEN),
        # Slow rotations: a box and its place in the image are far apart in the sequence.
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
        "tie_word_embeddings": True,
        "pad_token_id": tokenizer.pad_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "bos_token_id": None,
    }
    options: dict[str, Any] = {
        "vision_config": vision,
        "text_config": text,
        "image_token_index": tokenizer.convert_tokens_to_ids(IMAGE),
        "image_seq_length": GRID * GRID,
        "vision_feature_layer": -1,
        "crayon_mode": "attention",
        "crayon_embed_dim": HIDDEN,
        "tie_word_embeddings": True,
    }
    return CollavoConfig(**options)


def build_model(tokenizer: PreTrainedTokenizerFast) -> CollavoForConditionalGeneration:
    """Make the untrained model; torch's global seed decides its weights.

    Args:
        tokenizer: The demo's tokenizer.
    """
    model = CollavoForConditionalGeneration(build_config(tokenizer))
    _start_embeddings(model, tokenizer)
    _start_attention(model)
    _start_crayon(model)
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    return model


@torch.no_grad()
def _start_embeddings(
    model: CollavoForConditionalGeneration, tokenizer: PreTrainedTokenizerFast
) -> None:
    """Draw the word embeddings; coordinates start as waves, in the x slot or in the y slot."""
    embedding: Any = model.get_input_embeddings()
    weight: Tensor = embedding.weight
    weight.normal_(0.0, _SCALE)
    kinds = torch.randn(4, HIDDEN) * _SCALE
    kinds[:, : 2 * SLOT] = 0.0
    for token, index in tokenizer.get_vocab().items():
        coordinate = coordinate_of(token)
        if coordinate is not None:
            kind, value = coordinate
            weight[index] = kinds[kind]
            start = SLOT * (kind % 2)
            weight[index, start : start + SLOT] = waves(torch.tensor(value))


@torch.no_grad()
def _start_attention(model: CollavoForConditionalGeneration) -> None:
    """Start keys as queries: tokens look at tokens that are like them, as in trained models.

    Source: Trockman and Kolter, Mimetic Initialization of Self-Attention Layers (2023).
    """
    decoder: Any = model.model.language_model
    for layer in decoder.layers:
        layer.self_attn.k_proj.weight.copy_(layer.self_attn.q_proj.weight)


@torch.no_grad()
def _start_crayon(model: CollavoForConditionalGeneration) -> None:
    """Draw the queries so wide that the MLP's first layer tells them apart from the first step."""
    prompt = model.model.crayon_prompt
    if prompt is not None:
        nn.init.normal_(prompt.class_embedding.weight, std=0.5)
        nn.init.normal_(prompt.number_embedding.weight, std=0.5)


def build_processor(tokenizer: PreTrainedTokenizerFast) -> CollavoProcessor:
    """Make the processor: the whole image, one crayon cell per patch, no object text.

    Args:
        tokenizer: The demo's tokenizer.
    """
    return CollavoProcessor(
        make_image_processor(SIZE),
        tokenizer,
        grid=(GRID, GRID),
        chat_template=CHAT_TEMPLATE,
        object_text=False,
    )
