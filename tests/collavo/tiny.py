"""A word-level tokenizer and a small processor that need no download."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import CLIPVisionConfig, PreTrainedTokenizerFast

from collavo.panoptic import DISPLAY_NAMES, TEMPLATES
from collavo.processing import CollavoProcessor, make_image_processor
from collavo.processing.chat_templates import SYSTEM

SPECIAL = ("<pad>", "<s>", "</s>", "<unk>", "<image>")
# A blank stays with the word after it, so that decoding gives the text back.
_WORDS = r" ?[A-Za-z]+(?:[-'][A-Za-z]+)*| ?[0-9]|\s|[^\sA-Za-z0-9]"


def tiny_tokenizer(texts: Iterable[str] = (), padding_side: str = "left") -> Any:
    """Build a word-level tokenizer of the project's own words and of ``texts``."""
    phrases = [
        SYSTEM,
        " USER: ASSISTANT: The image includes. None of detailed object information for image.",
        " Sure, it is (#1 x) [0.12, 0.34, 0.56, 0.78], 9",
        " What is in this picture? Is there a yes no",
        *TEMPLATES.values(),
        *DISPLAY_NAMES,
        *texts,
    ]
    words = {word for phrase in phrases for word in re.findall(_WORDS, phrase)}
    words = {word.strip() for word in words} | set("0123456789()[]#,.:-'")
    words = {word for bare in words if bare for word in (bare, f" {bare}")} | {" ", "\n"}
    vocabulary = {word: i for i, word in enumerate([*SPECIAL, *sorted(words)])}
    core = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Split(Regex(_WORDS), behavior="isolated")
    core.decoder = decoders.Fuse()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        padding_side=padding_side,
        clean_up_tokenization_spaces=False,
    )
    tokenizer.add_tokens(["<image>"], special_tokens=True)
    return tokenizer


def tiny_processor(
    grid: tuple[int, int] = (4, 4),
    image_size: int = 16,
    *,
    texts: Iterable[str] = (),
    padding_side: str = "left",
    mode: str = "squash",
    **kwargs: Any,
) -> CollavoProcessor:
    """Build a processor with a small grid around the tiny tokenizer."""
    return CollavoProcessor(
        make_image_processor(image_size, mode=mode),
        tiny_tokenizer(texts, padding_side),
        grid=grid,
        **kwargs,
    )


def tiny_vision(image_size: int = 8) -> CLIPVisionConfig:
    """Configure a vision tower of one small layer, with a grid cell for every 4 pixels."""
    return CLIPVisionConfig(
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        image_size=image_size,
        patch_size=4,
    )
