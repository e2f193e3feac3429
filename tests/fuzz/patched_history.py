"""A tiny model that is patched, what it must compute, and random batches for it."""

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
    GraniteConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    MistralConfig,
    Olmo2Config,
    Phi3Config,
    Qwen2Config,
    Qwen3Config,
    SmolLM3Config,
    SmolVLMConfig,
    SmolVLMForConditionalGeneration,
)
from transformers.models.smolvlm.configuration_smolvlm import SmolVLMVisionConfig

from collavo import apply_to_llava
from tests.fuzz.stock_crayon import StockWithCrayon

IMAGE = 31
# Image tokens of an image: a picture; a base and a crop whose lines end; pictures in a padded list.
FAMILIES = {"llava": 4, "llava_next": 4 + 2 * 3, "smolvlm": 4}
SIZES: dict[str, Any] = {
    "vocab_size": 32,
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
DECODERS = (
    LlamaConfig,
    MistralConfig,
    Qwen2Config,
    Qwen3Config,
    Phi3Config,
    GraniteConfig,
    Olmo2Config,
    SmolLM3Config,
)
SCALING = 2.0


def make_stock(family: str, kind: int, seed: int) -> Any:
    """Return a stock model with one of the decoders, biases and norms drawn too."""
    tower = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    tower |= {"num_attention_heads": 2, "image_size": 8, "patch_size": 4}
    text = DECODERS[kind](**SIZES)
    torch.manual_seed(seed)
    model: Any
    if family == "smolvlm":
        vision = SmolVLMVisionConfig(**tower | {"patch_size": 2})
        config = SmolVLMConfig(vision_config=vision, text_config=text, image_token_id=IMAGE)
        model = SmolVLMForConditionalGeneration(config).eval()
    else:
        given = {"vision_config": CLIPVisionConfig(**tower), "text_config": text}
        given |= {"image_token_index": IMAGE, "vision_feature_layer": -1}
        if family == "llava":
            model = LlavaForConditionalGeneration(LlavaConfig(**given)).eval()
        else:
            next_config = LlavaNextConfig(**given, image_grid_pinpoints=[[8, 8]])
            model = LlavaNextForConditionalGeneration(next_config).eval()
    for parameter in model.parameters():
        parameter.data.add_(torch.randn_like(parameter), alpha=0.1)
    return model


def make_images(family: str, images: list[int], generator: Any) -> dict[str, Tensor]:
    """Return the images of samples with so many each, as a family takes them."""
    if family == "smolvlm":
        pixels = torch.randn(len(images), max(images), 3, 8, 8, generator=generator)
        for sample, count in enumerate(images):
            pixels[sample, count:] = 0.0
        return {"pixel_values": pixels}
    if family == "llava_next":
        pixels = torch.randn(sum(images), 2, 3, 8, 8, generator=generator)
        return {"pixel_values": pixels, "image_sizes": torch.tensor([[8, 8]] * sum(images))}
    return {"pixel_values": torch.randn(sum(images), 3, 8, 8, generator=generator)}


def make_batch(rng: random.Random, samples: int, family: str) -> dict[str, Tensor]:
    """Return a left-padded batch with one or two images a sample, and its crayon."""
    cells = FAMILIES[family]
    generator = torch.Generator().manual_seed(rng.randrange(2**31))
    images = [rng.choice((1, 1, 2)) for _ in range(samples)]
    rows = []
    for count in images:
        row = [1]
        for _ in range(count):
            row += [IMAGE] * cells + [rng.randrange(3, 30) for _ in range(rng.randrange(1, 4))]
        rows.append(row)
    length, places = max(map(len, rows)), max(images) * cells
    index = torch.randint(-1, 3, (samples, places), generator=generator, dtype=torch.int32)
    for sample, count in enumerate(images):
        index[sample, count * cells :] = -1
    numbers = torch.randint(0, 4, (samples, 3), generator=generator, dtype=torch.int32)
    classes = torch.randint(0, 9, (samples, 3), generator=generator, dtype=torch.int32)
    return {
        "input_ids": torch.tensor([[0] * (length - len(row)) + row for row in rows]),
        "attention_mask": torch.tensor(
            [[0] * (length - len(row)) + [1] * len(row) for row in rows]
        ),
        **make_images(family, images, generator),
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
    family: str
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
                r=2,
                lora_alpha=2 * SCALING,
                target_modules=r".*(language|text)_model.*\.(q|up|qkv|gate_up)_proj",
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
            images = {n: given.pop(n) for n in ("pixel_values", "image_sizes") if n in given}
            features = model.get_image_features(**images, return_dict=True).pooler_output
            embeds[ids == IMAGE] = torch.cat(list(features))
    return given | {"inputs_embeds": embeds}
