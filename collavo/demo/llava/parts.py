"""The two parts that a LLaVA is built of, tiny: a language model that can read, a tower that sees.

They stand in for Vicuna and CLIP. Neither has met the other: the language model has read scenes
that are written down as one word a patch, and never a picture; the tower has learnt to name what
its patches show with a head that is thrown away, and never a word.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, pre_tokenizers, processors
from tokenizers.models import BPE
from tokenizers.trainers import BpeTrainer
from torch import nn
from transformers import (
    CLIPVisionConfig,
    CLIPVisionModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from collavo.demo.scenes import SIZE

PARTS = Path(__file__).parent / "pretrained"
LANGUAGE, VISION = "language", "vision"
"""Folders of the two parts that come with the package, in ``PARTS``."""
PATCH = 8
GRID = SIZE // PATCH
HIDDEN = 128
_START, _STOP, _UNKNOWN = "<s>", "</s>", "<unk>"


def make_tokenizer(texts: Iterable[str]) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer with LLaMA's special tokens: any text can be written in it.

    Args:
        texts: Whose words become tokens.
    """
    tokenizer = Tokenizer(BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    specials = [_UNKNOWN, _START, _STOP]
    trainer = BpeTrainer(
        vocab_size=1024,
        special_tokens=specials,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{_START} $A", special_tokens=[(_START, specials.index(_START))]
    )
    made: PreTrainedTokenizerFast = PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=tokenizer, bos_token=_START, eos_token=_STOP, unk_token=_UNKNOWN
    )
    return made


def make_language_model(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """Make the untrained language model; torch's global seed decides its weights.

    Args:
        tokenizer: Gives the vocabulary.
    """
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=HIDDEN,
        intermediate_size=320,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=512,
        # Slow rotations: a question and its place in the image are far apart in the sequence.
        rope_parameters={"rope_type": "default", "rope_theta": 1e6},
        # At this width the usual 0.02 would leave every layer nearly silent.
        initializer_range=1.0 / math.sqrt(HIDDEN),
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    model = LlamaForCausalLM(config)
    nn.init.normal_(model.model.embed_tokens.weight, std=0.1)
    _start_attention(model)
    return model


@torch.no_grad()
def _start_attention(model: LlamaForCausalLM) -> None:
    """Start keys as queries: tokens look at tokens that are like them, as in trained models.

    Source: Trockman and Kolter, Mimetic Initialization of Self-Attention Layers (2023).
    """
    for layer in model.model.layers:
        layer.self_attn.k_proj.weight.copy_(layer.self_attn.q_proj.weight)


def make_tower() -> CLIPVisionModel:
    """Make the untrained tower; torch's global seed decides its weights.

    A LLaVA reads the layer before the last, so it has one layer more than it needs.
    """
    return CLIPVisionModel(
        CLIPVisionConfig(
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=3,
            num_attention_heads=4,
            image_size=SIZE,
            patch_size=PATCH,
        )
    )
