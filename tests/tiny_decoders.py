"""Tiny decoders of transformers, and the ways in which this package's attention gets into them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    StaticCache,
)
from transformers.masking_utils import create_causal_mask

from collavo_kernels.nn import CrayonAttention, register_attention
from collavo_kernels.nn.attention import module as module_file
from collavo_kernels.nn.attention import transformers as interface_file
from collavo_kernels.testing import assert_within_budget

register_attention()

WINDOW = 4
SIZES: dict[str, Any] = {
    "vocab_size": 32,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
    "eos_token_id": None,
}
# Vicuna is LLaMA. Mistral slides in every layer, this Qwen2 in its second one only.
KINDS: dict[str, Callable[[], Any]] = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SIZES)),
    "mistral": lambda: MistralForCausalLM(MistralConfig(**SIZES, sliding_window=WINDOW)),
    "qwen2": lambda: Qwen2ForCausalLM(
        Qwen2Config(**SIZES, use_sliding_window=True, sliding_window=WINDOW, max_window_layers=1)
    ),
}
# "drop-in" has transformers' masks for SDPA around it, "drop-in, crayon" those of this package.
WAYS = ("crayon", "drop-in", "drop-in, crayon")


def stock(kind: str, implementation: str = "sdpa") -> Any:
    """A decoder as transformers makes it; weights large enough that no two logits are alike."""
    torch.manual_seed(7)
    model = KINDS[kind]()
    for parameter in model.parameters():
        parameter.data.add_(torch.randn_like(parameter), alpha=0.1)
    model.set_attn_implementation(implementation)
    return model.eval()


def ours(kind: str, way: str) -> Any:
    """The same decoder with this package's attention in it."""
    return with_our_attention(stock(kind), way)


def with_our_attention(model: Any, way: str) -> Any:
    if "drop-in" in way:
        for layer in model.model.layers:
            layer.self_attn = CrayonAttention.from_attention(layer.self_attn)
    if "crayon" in way:
        model.set_attn_implementation("crayon")
    return model


@contextmanager
def counted() -> Iterator[list[dict[str, Any]]]:
    """Collect the keyword arguments of every call of the operator."""
    calls: list[dict[str, Any]] = []
    run = module_file.crayon_attention

    def counting(*args: Any, **kwargs: Any) -> Any:
        calls.append(kwargs)
        return run(*args, **kwargs)

    with (
        mock.patch.object(module_file, "crayon_attention", counting),
        mock.patch.object(interface_file, "crayon_attention", counting),
    ):
        yield calls


@cache
def static_prefills_run_fused() -> bool:
    """Whether transformers tells that the prefill of a static cache has a plain mask.

    From 5.14 it does; before, no function of masks can know, and SDPA serves that prefill.
    """
    config = LlamaConfig(**SIZES, attn_implementation="sdpa")
    kept = StaticCache(config=config, max_cache_len=8)
    return create_causal_mask(config, torch.zeros(1, 4, 32), None, past_key_values=kept) is None


@cache
def transformers_own(kind: str, run: Callable[..., Tensor], *options: Any) -> tuple[Tensor, Tensor]:
    """Return a result in float64, and that of eager or SDPA in float32: the worse of the two.

    The truth is float64 with SDPA (eager with left padding is NaN there).

    Args:
        kind: The decoder's kind.
        run: What to do with a model, and with the options, to get the result.
        *options: Handed to ``run``.
    """
    with torch.no_grad():
        exact = run(stock(kind).double(), *options)
        own = [run(stock(kind, name), *options) for name in ("sdpa", "eager")]
    return exact, max(own, key=lambda x: float((x.double() - exact).nan_to_num().abs().max()))


def assert_as_transformers(
    found: Tensor, own: tuple[Tensor, Tensor], where: Tensor | None = None
) -> None:
    """Assert that a result errs at most twice as much as transformers' own.

    Args:
        found: The result.
        own: What ``transformers_own`` returned.
        where: Which tokens to compare; None = all.
    """
    exact, honest = own
    at = torch.ones(found.shape[:2], dtype=torch.bool) if where is None else where.bool()
    assert_within_budget(found[at], honest[at], exact[at])
