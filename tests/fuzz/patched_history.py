"""A tiny LLaVA model that is patched, what it must compute, and random batches for it."""

from __future__ import annotations

import copy
import random
from dataclasses import dataclass, field
from typing import Any

import peft
import torch
from torch import Tensor
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    MistralConfig,
    Qwen2Config,
)

from collavo import apply_to_llava
from tests.fuzz.stock_crayon import StockWithCrayon

IMAGE, CELLS = 31, 4
SIZES: dict[str, Any] = {
    "vocab_size": 32,
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
}
DECODERS = (LlamaConfig, MistralConfig, Qwen2Config)
SCALING = 2.0


def make_stock(kind: int, seed: int) -> Any:
    """Return a stock model of one of the three families, biases and norms drawn too."""
    vision = CLIPVisionConfig(
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        image_size=8,
        patch_size=4,
    )
    torch.manual_seed(seed)
    config = LlavaConfig(
        vision_config=vision,
        text_config=DECODERS[kind](**SIZES),
        image_token_index=IMAGE,
        vision_feature_layer=-1,
    )
    model = LlavaForConditionalGeneration(config).eval()
    for parameter in model.parameters():
        parameter.data.add_(torch.randn_like(parameter), alpha=0.1)
    return model


def make_batch(rng: random.Random, samples: int) -> dict[str, Tensor]:
    """Return a left-padded batch with one or two images a sample, and its crayon."""
    generator = torch.Generator().manual_seed(rng.randrange(2**31))
    images = [rng.choice((1, 1, 2)) for _ in range(samples)]
    rows = []
    for count in images:
        row = [1]
        for _ in range(count):
            row += [IMAGE] * CELLS + [rng.randrange(3, 30) for _ in range(rng.randrange(1, 4))]
        rows.append(row)
    length, places = max(map(len, rows)), max(images) * CELLS
    index = torch.randint(-1, 3, (samples, places), generator=generator, dtype=torch.int32)
    for sample, count in enumerate(images):
        index[sample, count * CELLS :] = -1
    numbers = torch.randint(0, 4, (samples, 3), generator=generator, dtype=torch.int32)
    classes = torch.randint(0, 9, (samples, 3), generator=generator, dtype=torch.int32)
    return {
        "input_ids": torch.tensor([[0] * (length - len(row)) + row for row in rows]),
        "attention_mask": torch.tensor(
            [[0] * (length - len(row)) + [1] * len(row) for row in rows]
        ),
        "pixel_values": torch.randn(sum(images), 3, 8, 8, generator=generator),
        "crayon_index": index,
        "crayon_class": classes,
        "crayon_number": numbers,
    }


@dataclass
class History:
    """A patched model, what it must compute, and what was done to it.

    ``stock`` is what is patched and must come back: ``bare``, or that with PEFT's adapters.
    """

    rng: random.Random
    bare: Any
    options: dict[str, Any]
    stock: Any = None
    model: Any = None
    handle: Any = None
    oracle: Any = None
    hooked: bool = False
    dtype: torch.dtype = torch.float32
    done: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.stock = self.bare
        if self.rng.random() < 0.3:
            lora = peft.LoraConfig(
                r=2, lora_alpha=2 * SCALING, target_modules=r".*language_model.*\.(q|up)_proj"
            )
            self.stock = peft.inject_adapter_in_model(lora, copy.deepcopy(self.bare))
            self.stock.eval()

    def models(self) -> tuple[Any, ...]:
        """Return every model, the patched one first."""
        own = (self.model, self.oracle.model, self.stock)
        return own if self.bare is self.stock else (*own, self.bare)

    def patch(self) -> None:
        """Patch a copy of the stock model, or the model that was restored, with drawn weights."""
        self.model = copy.deepcopy(self.stock) if self.model is None else self.model
        self.handle = apply_to_llava(self.model, **self.options)
        for name, parameter in self.model.named_parameters():
            if "crayon" in name or "lora_" in name:
                parameter.data.normal_(0.0, 0.2)
        names = (self.model.model.crayon_adapters, self.options["image_adapters"])
        self.oracle = StockWithCrayon(copy.deepcopy(self.bare), self.model, *names, SCALING)
        self.hooked = False


def inputs_of(s: History, batch: dict[str, Tensor], crayon: bool) -> dict[str, Tensor]:
    """Return the inputs in the model's dtype, and tell the oracle of their crayon."""
    s.oracle.crayon = {n: v for n, v in batch.items() if n.startswith("crayon") and crayon}
    given = {n: v for n, v in batch.items() if crayon or not n.startswith("crayon")}
    return given | {"pixel_values": given["pixel_values"].to(s.dtype)}


def embeds_of(s: History, inputs: dict[str, Any], merged: bool = False) -> dict[str, Any]:
    """Return embeddings in place of ids, images merged in or not."""
    model = s.oracle.model
    given = dict(inputs)
    ids = given.pop("input_ids")
    with torch.no_grad():
        embeds = model.get_input_embeddings()(ids).clone()
        if merged:
            pixels = given.pop("pixel_values")
            embeds[ids == IMAGE] = torch.cat(list(model.get_image_features(pixels).pooler_output))
    return given | {"inputs_embeds": embeds}
