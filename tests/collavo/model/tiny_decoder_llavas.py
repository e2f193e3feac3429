"""A tiny LLaVA around every decoder that carries the crayon; patched, and by hooks on the stock."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import transformers as hf
from test_apply_to_llava import IMAGE, make_batch, plain
from tiny_crayon_model import tiny_vision
from torch import Tensor

from collavo import apply_to_llava
from tests.fuzz.stock_crayon import StockWithCrayon

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
SECOND = {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1}
# Windows shorter than the batch; what each decoder is special for stands out.
TEXTS: dict[str, Callable[[], Any]] = {
    "Llama": lambda: hf.LlamaConfig(**SIZES, attention_bias=True, mlp_bias=True),
    "Mistral": lambda: hf.MistralConfig(**SIZES, sliding_window=4),
    "Qwen2": lambda: hf.Qwen2Config(**SIZES, **SECOND),
    "Qwen3": lambda: hf.Qwen3Config(**SIZES, **SECOND, head_dim=32),
    "Phi3": lambda: hf.Phi3Config(**SIZES, sliding_window=4),
    "Granite": lambda: hf.GraniteConfig(
        **SIZES,
        attention_multiplier=0.3,
        residual_multiplier=0.4,
        embedding_multiplier=2.0,
        logits_scaling=3.0,
    ),
    "Olmo2": lambda: hf.Olmo2Config(**SIZES),
    "SmolLM3": lambda: hf.SmolLM3Config(**SIZES, **SECOND, no_rope_layers=[1, 0]),
}
MODES = ("attention", "projection", "none")
ADAPTERS: dict[str, Any] = {
    "adapters": ("image", "vl"),
    "image_adapters": ("image",),
    "lora_rank": 4,
    "lora_alpha": 8.0,
}


def make_llava(kind: str) -> Any:
    config = hf.LlavaConfig(
        vision_config=tiny_vision(),
        text_config=TEXTS[kind](),
        image_token_index=IMAGE,
        vision_feature_layer=-1,
    )
    torch.manual_seed(4)
    model = hf.LlavaForConditionalGeneration(config).eval()
    for name, parameter in model.named_parameters():
        if "norm" not in name:
            parameter.data.add_(torch.randn_like(parameter), alpha=0.1)
        elif parameter.dim() == 1:  # a norm that is more than a scale of one
            parameter.data.mul_(1 + 0.3 * torch.randn_like(parameter))
    return model


def patched(kind: str, mode: Any, **options: Any) -> Any:
    """A patched model, everything that was added drawn."""
    model = make_llava(kind)
    apply_to_llava(model, crayon_mode=mode, crayon_rank=4, **options)
    torch.manual_seed(5)
    for name, parameter in model.named_parameters():
        if "crayon" in name or "lora" in name:
            parameter.data.normal_(0.0, 0.2)
    return model


def hooked(kind: str, model: Any, dtype: torch.dtype = torch.float32) -> StockWithCrayon:
    """The stock model with what was added to a patched one, by hooks, a vector per token."""
    adapted = model.model.crayon_adapters
    images = model.model.crayon_image_adapters
    stock = StockWithCrayon(make_llava(kind), model, adapted, images, scaling=2.0)
    stock.crayon = {k: v for k, v in make_batch().items() if k.startswith("crayon")}
    stock.to(dtype)
    return stock


def inputs(dtype: torch.dtype) -> dict[str, Tensor]:
    batch = plain(make_batch())
    return batch | {"pixel_values": batch["pixel_values"].to(dtype)}
