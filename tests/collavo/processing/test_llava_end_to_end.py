"""From a LLaVA's folder to an answer and a training step, with its own pixels and prompt."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import (
    AutoProcessor,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
)

from collavo import CollavoProcessor, apply_to_llava
from collavo.panoptic import PanopticMap
from collavo.train.collator import CrayonCollator
from tests.collavo.processing import tiny_llavas

# What a user writes who has a LLaVA of the hub; `sample` is an image with its panoptic map.
SIX_LINES = """\
model = LlavaForConditionalGeneration.from_pretrained(name, dtype=torch.bfloat16)
handle = apply_to_llava(model, adapters=("image", "vl"), quantize="nf4")
processor = CollavoProcessor.from_llava(AutoProcessor.from_pretrained(name))
prompt = processor.prompt("What is in this picture?")
inputs = processor(sample.image, prompt, sample.panoptic, return_tensors="pt")
tokens = model.generate(**inputs, max_new_tokens=24)
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LLaVA as the hub has it: a model of that class, with the processor of that class."""
    where = tmp_path_factory.mktemp("llava")
    own = tiny_llavas.llava()
    vision = CLIPVisionConfig(
        hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4,
        image_size=24, patch_size=4,
    )  # fmt: skip
    text = LlamaConfig(
        vocab_size=len(own.tokenizer), hidden_size=64, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, pad_token_id=own.tokenizer.pad_token_id,
    )  # fmt: skip
    image = own.tokenizer.convert_tokens_to_ids("<image>")
    torch.manual_seed(0)
    config = LlavaConfig(vision_config=vision, text_config=text, image_token_index=image)
    LlavaForConditionalGeneration(config).save_pretrained(where)
    own.save_pretrained(where)
    return where


def sample() -> Any:
    colours = np.random.default_rng(0).integers(0, 256, (40, 70, 3), dtype=np.uint8)
    ids = torch.zeros(40, 70, dtype=torch.int32)
    ids[10:30, 20:50] = 7
    known = PanopticMap.from_segments(ids, [7], [17])
    return SimpleNamespace(image=Image.fromarray(colours), panoptic=known)


def test_six_lines_from_a_llava_to_its_answer(folder: Path) -> None:
    """Prompt, pixels and, until something is trained, the dense model's answer are its own."""
    names = {
        "name": folder, "sample": sample(), "torch": torch, "AutoProcessor": AutoProcessor,
        "LlavaForConditionalGeneration": LlavaForConditionalGeneration,
        "CollavoProcessor": CollavoProcessor, "apply_to_llava": apply_to_llava,
    }  # fmt: skip
    exec(compile(SIX_LINES, "six lines", "exec"), names)
    assert names["tokens"].shape[1] > names["inputs"]["input_ids"].shape[1]
    names["handle"].undo()
    exec(compile(SIX_LINES.replace(', quantize="nf4"', ""), "six lines", "exec"), names)
    stock, own = (
        kind.from_pretrained(folder, **options)
        for kind, options in (
            (LlavaForConditionalGeneration, {"dtype": torch.bfloat16}),
            (AutoProcessor, {}),
        )
    )
    turn = {"type": "text", "text": "What is in this picture?"}
    conversation = [{"role": "user", "content": [{"type": "image"}, turn]}]
    prompt = own.apply_chat_template(conversation, add_generation_prompt=True)
    inputs = own(images=names["sample"].image, text=prompt, return_tensors="pt")
    assert all(torch.equal(names["inputs"][key], inputs[key]) for key in inputs)
    assert torch.equal(names["tokens"], stock.generate(**inputs, max_new_tokens=24))


def test_a_training_step_reaches_the_rows_that_the_picture_shows(folder: Path) -> None:
    """The loss is of the answers alone, and gradients come to the classes of the two rows."""
    model = LlavaForConditionalGeneration.from_pretrained(folder)
    apply_to_llava(model)
    processor = CollavoProcessor.from_llava(AutoProcessor.from_pretrained(folder))
    shown = sample()
    answer = {"role": "assistant", "content": "yes"}
    conversation = [{"role": "user", "content": "Is there a horse"}, answer]
    record = {"conversation": conversation, "image": shown.image, "panoptic": shown.panoptic}
    batch = CrayonCollator(processor)([record, record])
    assert batch["crayon_index"].shape == (2, 36)
    assert int((batch["labels"][0] >= 0).sum()) == 2, "the answer and its stop token"
    for parameter in model.model.crayon_prompt.parameters():  # a fresh one's last layer is zero
        torch.nn.init.normal_(parameter, std=0.1)
    model(**batch).loss.backward()
    classes = model.model.crayon_prompt.class_embedding.weight.grad
    assert classes.abs().sum(1).nonzero()[:, 0].tolist() == [0, 18]
