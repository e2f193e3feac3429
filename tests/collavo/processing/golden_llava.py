"""Conversations that LLaVA's own code was run on, and tokenizers for them."""

from __future__ import annotations

import gzip
import json
from functools import cache
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from collavo.conversations.llava import order_images, read_llava
from collavo.processing import CollavoProcessor, chat_template, make_image_processor

FOLDER = Path(__file__).resolve().parents[2] / "data" / "golden" / "llava"
TOKENIZERS = ("spm_legacy", "spm_new", "bytes", "spm_chatml_bos_legacy")
IMAGE = -200
"""What a record has in an image's place."""


@cache
def recorded(name: str) -> Any:
    """Read one of the files, such as ``records``."""
    return json.loads(gzip.decompress((FOLDER / f"{name}.json.gz").read_bytes()))


def tokenizer(name: str, **tokens: str) -> Any:
    """Build a tokenizer of a record's name, ``<image>`` added, padding as LLaVA sets it."""
    chatml = name.startswith("spm_chatml")
    core = Tokenizer.from_str(json.dumps(recorded(f"tokenizers/{_core(name)}")))
    own = {"unk_token": "<unk>", "pad_token": "<unk>", "eos_token": "</s>", "bos_token": "<s>"}
    if name == "bytes":
        own = {"pad_token": "<|endoftext|>", "eos_token": "<|endoftext|>"}
    if chatml and "bos" not in name:
        core.post_processor = None
        del own["bos_token"]
    made = PreTrainedTokenizerFast(tokenizer_object=core, **{**own, **tokens})
    if chatml:
        made.add_tokens(["<|im_start|>", "<|im_end|>"], special_tokens=True)
    made.add_tokens(["<image>"], special_tokens=True)
    return made


def _core(name: str) -> str:
    if not name.startswith("spm_chatml"):
        return name
    return "spm_legacy" if name.endswith("legacy") else "spm_new"


def processor(name: str, template: str, **settings: Any) -> CollavoProcessor:
    """Build a processor with four tokens an image."""
    return CollavoProcessor(
        make_image_processor(8),
        tokenizer(name),
        grid=(2, 2),
        chat_template=chat_template(template),
        **settings,
    )


def conversation(record: dict[str, Any]) -> list[dict[str, Any]]:
    """Return a record's conversation as messages, read as a data set reads it.

    Raises:
        ValueError: if it is a fault there.
    """
    (entry,) = (one for one in recorded("conversations") if one["case"] == record["case"])
    images = {"image": "picture.png"} if entry["has_image"] else {}
    read = read_llava({"conversations": entry["conversations"], **images}, record["case"])
    return order_images(read["conversation"], "first")


def said(template: str, answer: str, stop: str = "</s>") -> str:
    """Return what the model is to say for an answer: with the template's blanks and stop token.

    ``stop`` is the tokenizer's own stop token.
    """
    if template == "plain":
        return f"{answer}\n"
    if template in ("mpt", "chatml_direct"):
        return f"{answer}<|im_end|>"
    if template.startswith("v0"):
        return f" {answer}\n###"
    return f" {answer}{stop}" if "v1" in template else f" {answer} {stop}"


def spoken(processor: CollavoProcessor, ids: list[int], labels: list[int]) -> list[str]:
    """Return the texts of a conversation's labelled stretches.

    A stretch is what the decoded whole has more at its end than at its start. A sentencepiece
    tokenizer puts a blank behind an image, which is not the answer's.
    """
    tokens = [processor.image_token_id if token == IMAGE else token for token in ids]
    texts, start = [], 0
    for stop in range(1, len(labels) + 1):
        if stop < len(labels) and (labels[stop] < 0) == (labels[start] < 0):
            continue
        if labels[start] >= 0:
            assert labels[start:stop] == ids[start:stop]
            before, upto = (processor.tokenizer.decode(tokens[:end]) for end in (start, stop))
            assert upto.startswith(before)
            own = upto[len(before) :]
            behind_image = tokens[start - 1] == processor.image_token_id
            texts.append(own.removeprefix(" ") if behind_image else own)
        start = stop
    return texts
