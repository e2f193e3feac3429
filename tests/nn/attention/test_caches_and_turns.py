"""Decoders on this package's attention with filled caches: every answer is transformers' own."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
from tiny_decoders import (
    KINDS,
    SIZES,
    WAYS,
    WINDOW,
    assert_as_transformers,
    counted,
    ours,
    static_prefills_run_fused,
    stock,
    transformers_own,
)
from torch import Tensor
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM, StaticCache

pytestmark = pytest.mark.usefixtures("one_thread")

TOKENS = torch.arange(1, 21).view(2, 10)
LEFT = torch.tensor([[1] * 10, [0] * 3 + [1] * 7])
GREEDY: dict[str, Any] = {"do_sample": False, "max_new_tokens": 6, "min_new_tokens": 6}
every_way = pytest.mark.parametrize("way", WAYS)
every_kind = pytest.mark.parametrize("kind", list(KINDS))


def make_cache(model: Any, static: bool) -> Any:
    if static:
        return StaticCache(config=model.config, max_cache_len=12)
    return DynamicCache(config=model.config)


def in_parts(model: Any, lengths: tuple[int, ...], padded: bool, static: bool) -> Tensor:
    """Run a model on one part of the tokens after the other, over one cache."""
    kept, first, parts = make_cache(model, static), 0, []
    for length in lengths:
        end = first + length
        mask = LEFT[:, :end] if padded else None
        # Positions count real tokens, as generate() has it.
        places = (mask.cumsum(1) - 1).clamp_min(0)[:, first:end] if mask is not None else None
        part = TOKENS[:, first:end]
        out = model(part, attention_mask=mask, position_ids=places, past_key_values=kept)
        parts.append(out.logits)
        first = end
    return torch.cat(parts, 1)


@torch.no_grad()
@pytest.mark.parametrize(
    "lengths",
    [
        (3, 1, 1, 1, 1, 1, 1, 1),  # a prefill below the window, decoding through its end
        (8, 1, 1),  # a prefill beyond the window, decoding with a full sliding cache
        (5, 1, 4),  # a second turn
        (4, 6),  # chunked prefill; the first chunk fills the window exactly
        (3, 2, 5),
    ],
)
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("static", [False, True])
@every_way
@every_kind
def test_parts_over_a_cache(
    kind: str, way: str, static: bool, padded: bool, lengths: tuple[int, ...]
) -> None:
    with counted() as calls:
        found = in_parts(ours(kind, way), lengths, padded, static)
    # Only the first part finds the cache empty, and it runs fused wherever the mask tells.
    assert len(calls) <= 2
    if static and not static_prefills_run_fused():
        assert not calls
    elif way != "drop-in" or (kind == "llama" and not padded):
        assert len(calls) == 2
    own = transformers_own(kind, in_parts, lengths, padded, static)
    assert_as_transformers(found, own, LEFT if padded else None)


OPTIONS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "beams": {"num_beams": 3},
    "static": {"cache_implementation": "static", "disable_compile": True},
    "chunks of 4": {"prefill_chunk_size": 4},
    "chunks of 7": {"prefill_chunk_size": 7},
    "no cache": {"use_cache": False},
}


def new_tokens(model: Any, name: str, padded: bool) -> Tensor:
    tokens = TOKENS.masked_fill(LEFT == 0, 0) if padded else TOKENS
    mask = LEFT if padded else torch.ones_like(TOKENS)
    return model.generate(tokens, attention_mask=mask, **{**GREEDY, **OPTIONS[name]})


@cache
def own_tokens(kind: str, name: str, padded: bool) -> Tensor:
    return new_tokens(stock(kind), name, padded)


@pytest.mark.parametrize("name", list(OPTIONS))
@pytest.mark.parametrize("padded", [False, True])
@every_way
@every_kind
def test_generate(kind: str, way: str, padded: bool, name: str) -> None:
    with counted() as calls:
        found = new_tokens(ours(kind, way), name, padded)
    assert torch.equal(found, own_tokens(kind, name, padded))
    fused = name != "static" or static_prefills_run_fused()
    assert bool(calls) == fused or way == "drop-in"


@pytest.mark.parametrize("padding", [0, 3])
@every_way
@every_kind
def test_assisted_generation(kind: str, way: str, padding: int) -> None:
    """The draft's tokens are checked all at once: S > 1 with a cache, some of it taken back."""
    torch.manual_seed(5)
    draft = LlamaForCausalLM(LlamaConfig(**{**SIZES, "num_hidden_layers": 1})).eval()
    found = []
    for model in (ours(kind, way), stock(kind)):
        cached: list[int] = []
        first = model.model.layers[0].self_attn
        first.register_forward_pre_hook(
            lambda _, __, kwargs, cached=cached: cached.append(kwargs["hidden_states"].shape[1]),
            with_kwargs=True,
        )
        tokens = TOKENS[:1].clone()
        tokens[:, :padding] = 0
        out = model.generate(
            tokens, attention_mask=(tokens != 0).long(), assistant_model=draft, **GREEDY
        )
        found.append(out)
        assert any(length > 1 for length in cached[1:])
    assert torch.equal(*found)
    plain = stock(kind).generate(tokens, attention_mask=(tokens != 0).long(), **GREEDY)
    assert torch.equal(found[0], plain)


@pytest.mark.parametrize("static", [False, True])
@every_way
@every_kind
def test_a_second_turn_of_a_conversation(kind: str, way: str, static: bool) -> None:
    """generate() twice over one cache equals the whole conversation at once, in transformers."""
    first = TOKENS[:1, :5]
    model = ours(kind, way)
    cache: Any = DynamicCache(config=model.config)
    if static:
        cache = StaticCache(config=model.config, max_cache_len=32)
    options = {**GREEDY, "disable_compile": True}
    answer = model.generate(first, past_key_values=cache, **options)
    talk = torch.cat([answer, torch.tensor([[9, 8, 7]])], 1)
    continued = model.generate(talk, past_key_values=cache, **options)
    assert torch.equal(answer, stock(kind).generate(first, **options))
    assert torch.equal(continued, stock(kind).generate(talk, **options))


@every_way
def test_a_reset_cache_is_empty_again(way: str) -> None:
    """A static cache that was used before counts in a tensor; its old keys must not be seen."""
    model = ours("mistral", way)
    cache = StaticCache(config=model.config, max_cache_len=12)
    with torch.no_grad():
        model(TOKENS.flip(1), past_key_values=cache)
        cache.reset()
        found = model(TOKENS[:, :6], past_key_values=cache).logits
        expected = stock("mistral")(TOKENS[:, :6]).logits
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


@every_kind
def test_eagers_masks_are_read_as_well(kind: str) -> None:
    """Added scores for every call; the window is in them."""
    model = ours(kind, "drop-in")
    model.set_attn_implementation("eager")
    with torch.no_grad():
        found = in_parts(model, (3, 2, 5), True, False)
    assert_as_transformers(found, transformers_own(kind, in_parts, (3, 2, 5), True, False), LEFT)


@pytest.mark.parametrize("later", [0, 1])
@every_way
@every_kind
def test_a_mask_as_long_as_the_cache(kind: str, way: str, later: int) -> None:
    """A static cache may come with the mask of all its places, of which most are still empty."""
    whole = torch.cat([LEFT[:, :6], torch.full((2, 6), later)], 1)
    with torch.no_grad():
        found, expected = (
            model(TOKENS[:, :6], attention_mask=whole, past_key_values=make_cache(model, True))
            for model in (ours(kind, way), stock(kind))
        )
    valid = LEFT[:, :6].bool()
    torch.testing.assert_close(found.logits[valid], expected.logits[valid], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("lengths", [(3, 3, 4), (8, 1, 1), (2, 8)])
@every_kind
def test_the_module_alone_over_a_sliding_cache(
    kind: str, static: bool, lengths: tuple[int, ...]
) -> None:
    """Without a mask the module makes its own: a sliding cache has dropped the first keys."""
    model = ours(kind, "drop-in")
    x, first, parts = torch.randn(2, 10, 32), 0, []
    kept = make_cache(model, static)
    attention = model.model.layers[1].self_attn
    cos, sin = model.model.rotary_emb(x, torch.arange(10)[None])
    with torch.no_grad():
        whole, _ = attention(x, (cos, sin))
        for length in lengths:
            at = slice(first, first + length)
            out, _ = attention(x[:, at], (cos[:, at], sin[:, at]), past_key_values=kept)
            parts.append(out)
            first += length
    assert kind == "llama" or attention.sliding_window == WINDOW
    torch.testing.assert_close(torch.cat(parts, 1), whole, atol=2e-6, rtol=1e-5)
