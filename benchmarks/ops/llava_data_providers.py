"""Who turns conversations into token ids and labels, and a JPEG into pixels.

``transformers`` is its own way: for text the chat template with the placeholder as often as the
image has tokens, one call of the tokenizer, and the mask of the template's ``generation`` blocks;
for images LLaVA's processor as it comes.
"""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from PIL import Image
from tokenizers import (
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import LlavaImageProcessorPil, PreTrainedTokenizerFast

from benchmarks.ops.llava_data_cases import QUESTIONS
from benchmarks.registry import Call, Row
from collavo import CollavoProcessor
from collavo.panoptic import read_image
from collavo.processing import chat_template, make_image_processor

TEMPLATE = chat_template("vicuna_v1")
CELLS = 576


def conversation() -> list[dict[str, Any]]:
    """Return four questions about an image, with answers."""
    turns: list[dict[str, Any]] = []
    for question, answer in QUESTIONS.items():
        asked = [{"type": "text", "text": question}]
        content: Any = question if turns else [{"type": "image"}, *asked]
        turns += [{"role": "user", "content": content}, {"role": "assistant", "content": answer}]
    return turns


def tokenizer() -> Any:
    """Train a small tokenizer of LLaMA's kind; it makes more tokens of a text than a large one."""
    core = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True))
    marks = [normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")]
    core.normalizer = normalizers.Sequence(marks)
    core.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.Fuse()])
    core.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never")  # no words as one token
    special = ["<unk>", "<s>", "</s>", "<image>"]
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=special, show_progress=False)
    core.train_from_iterator([TEMPLATE, *QUESTIONS, *QUESTIONS.values()], trainer)
    core.pre_tokenizer = None
    core.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 1)]
    )
    tokens = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>", "pad_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=core, **tokens)


def _ours(turns: Any) -> Callable[[], object]:
    processor = _processor()
    return lambda: processor.measure(turns, [(427, 640)])


def _ours_batch(turns: Any) -> Callable[[], object]:
    """Also tensors, and the crayon of an image without a map."""
    processor, picture = _processor(), Image.new("RGB", (640, 427))
    return lambda: processor.training_batch([turns], [[picture]], pixels=False)


def _transformers(turns: Any) -> Callable[[], object]:
    words = tokenizer()
    template = TEMPLATE.replace("'<image>'", f"'{'<image>' * CELLS}'")
    options = {"return_dict": True, "return_assistant_tokens_mask": True}
    return lambda: words.apply_chat_template(turns, chat_template=template, **options)


def _processor() -> CollavoProcessor:
    images = make_image_processor(336, mode="pad")
    return CollavoProcessor(images, tokenizer(), grid=(24, 24), chat_template=TEMPLATE)


TEXTS: dict[str, Callable[[Any], Callable[[], object]]] = {
    "ours": _ours,
    "ours-batch": _ours_batch,
    "transformers": _transformers,
}
IMAGES: dict[str, Callable[[], Any]] = {
    "ours": lambda: make_image_processor(336, mode="pad"),
    "transformers": lambda: LlavaImageProcessorPil(
        do_pad=True,
        size={"shortest_edge": 336},
        crop_size={"height": 336, "width": 336},
    ),
}
PROVIDERS: dict[str, Callable[..., Any]] = {**TEXTS, **IMAGES}


def photograph(width: int, height: int) -> bytes:
    """Return a JPEG of soft noise, which decodes in about the time of a photograph."""
    small = np.random.default_rng(0).integers(0, 256, (height // 8, width // 8, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(small).resize((width, height)).save(file, "JPEG", quality=90)
    return file.getvalue()


def prepare(row: Row, device: torch.device) -> Call:
    """Return a row's call."""
    if row.mode == "text":
        turns = conversation()
        config = {"characters": sum(map(len, [*QUESTIONS, *QUESTIONS.values()]))}
        return Call(TEXTS[row.provider](turns), dtype=torch.int64, config=config)
    width, height = map(int, row.case.split("/")[0].split("x"))
    images, data = IMAGES[row.provider](), photograph(width, height)

    def pixels() -> object:
        picture = read_image(Image.open(io.BytesIO(data)))
        return images(images=[picture], return_tensors="pt")["pixel_values"]

    return Call(pixels, dtype=torch.float32, config={"jpeg_bytes": len(data)})
