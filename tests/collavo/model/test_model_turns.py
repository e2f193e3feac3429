"""Later turns, chunks, drafts and unusual masks, with the crayon in the model."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from test_model_generation import GREEDY, MODES
from tiny_crayon_model import IMAGE, make_batch, make_model, row
from torch import Tensor
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM, StaticCache

from collavo_kernels.nn import CrayonInputs

IMPLEMENTATIONS = ("sdpa", "crayon", "eager")


def conversation(answer: Tensor) -> dict[str, Tensor]:
    """The first sample, an answer to it, and a turn with the second sample's image."""
    batch = make_batch()
    one, two = row(batch, 0), row(batch, 1, skip=1)
    index = torch.where(two["crayon_index"] >= 0, two["crayon_index"] + 3, -1)
    tokens = torch.cat([answer, two["input_ids"]], 1)
    return {
        "input_ids": tokens,
        "attention_mask": torch.ones_like(tokens),
        "pixel_values": batch["pixel_values"],
        "crayon_index": torch.cat([one["crayon_index"], index], 1).int(),
        "crayon_class": torch.cat([one["crayon_class"], two["crayon_class"]], 1),
        "crayon_number": torch.cat([one["crayon_number"], two["crayon_number"]], 1),
    }


@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("given", ["the new image", "every image"])
@pytest.mark.parametrize("mode", MODES)
def test_generate_with_an_image_in_the_second_turn(mode: str, given: str, static: bool) -> None:
    """Its rows join a prefill on a filled cache; images in the cache may come again."""
    model, first = make_model(crayon_mode=mode), row(make_batch(), 0)
    text, options = model.config.text_config, {**GREEDY, "disable_compile": True}
    cache: Any = StaticCache(config=text, max_cache_len=32) if static else DynamicCache(config=text)
    answer = model.generate(**first, **options, past_key_values=cache)
    whole = conversation(answer)
    turn = dict(whole)
    if given == "the new image":
        two = row(make_batch(), 1, skip=1)
        turn |= {name: two[name] for name in two if name.startswith(("pixel", "crayon"))}
    options |= {"return_dict_in_generate": True, "output_logits": True}
    found = model.generate(**turn, **options, past_key_values=cache)
    expected = model.generate(**whole, **options)
    assert torch.equal(found.sequences, expected.sequences)
    # The crayon moves the logits more than it changes tokens.
    logits = [torch.stack(output.logits) for output in (found, expected)]
    torch.testing.assert_close(*logits, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("lengths", [(3, 5), (2, 3, 3)])
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("mode", MODES)
def test_chunked_prefill_through_an_image(
    mode: str, implementation: str, lengths: tuple[int, ...]
) -> None:
    """Chunks that cut the image in two: each brings the rows of its own image tokens."""
    model, batch = make_model(crayon_mode=mode), make_batch()
    whole = model(**batch).logits
    model.set_attn_implementation({"text_config": implementation})
    features = model.get_image_features(batch["pixel_values"]).pooler_output
    embeds = model.get_input_embeddings()(batch["input_ids"])
    images = batch["input_ids"] == IMAGE
    embeds[images] = torch.cat(list(features)).to(embeds.dtype)
    cache, first, parts = DynamicCache(config=model.config.text_config), 0, []
    decoder = model.model
    rows = decoder._crayon_table(
        images, *(batch[f"crayon_{n}"] for n in ("index", "class", "number"))
    )
    for length in lengths:
        at = slice(first, first + length)
        hidden = decoder.language_model(
            inputs_embeds=embeds[:, at],
            attention_mask=batch["attention_mask"][:, : at.stop],
            past_key_values=cache,
            position_ids=None,
            crayon=CrayonInputs(table=rows[0], row_index=rows[1][:, at]),
        ).last_hidden_state
        parts.append(model.lm_head(hidden))
        first = at.stop
    valid = batch["attention_mask"].bool()
    torch.testing.assert_close(torch.cat(parts, 1)[valid], whole[valid], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("padding", [0, 2])
@pytest.mark.parametrize("mode", MODES)
def test_assisted_generation_and_chunks_without_an_image(mode: str, padding: int) -> None:
    """A draft's tokens are checked all at once on a filled cache; rejected ones are taken back."""
    model = make_model(crayon_mode=mode)
    torch.manual_seed(6)
    text = model.config.text_config
    sizes = {n: getattr(text, n) for n in ("vocab_size", "hidden_size", "intermediate_size")}
    config = LlamaConfig(**sizes, num_hidden_layers=1, num_attention_heads=4, eos_token_id=None)
    draft = LlamaForCausalLM(config).eval()
    tokens = torch.tensor([[0] * padding + [1, 5, 6, 7, 9]])
    batch = {"input_ids": tokens, "attention_mask": (tokens != 0).long()}
    options = {**GREEDY, "max_new_tokens": 8, "min_new_tokens": 8}
    expected = model.generate(**batch, **options, use_cache=False)
    assert torch.equal(model.generate(**batch, **options, assistant_model=draft), expected)
    for size in (2, 3):
        assert torch.equal(model.generate(**batch, **options, prefill_chunk_size=size), expected)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("mode", MODES)
def test_a_holed_mask_equals_the_tokens_alone(mode: str, implementation: str) -> None:
    """What a hole hides must not count: another token in its place changes nothing."""
    model, batch = make_model(crayon_mode=mode), row(make_batch(), 0)
    model.set_attn_implementation({"text_config": implementation})
    batch["attention_mask"] = torch.tensor([[1, 1, 1, 1, 1, 0, 1, 1]])
    other = {**batch, "input_ids": batch["input_ids"].clone()}
    other["input_ids"][0, 5] = 12
    found, again = (model(**b).logits for b in (batch, other))
    at = batch["attention_mask"][0].bool()
    torch.testing.assert_close(found[:, at], again[:, at], atol=1e-6, rtol=1e-5)
    seen = {**batch, "attention_mask": torch.ones(1, 8)}
    assert not torch.allclose(model(**seen).logits[:, -1], found[:, -1], atol=1e-3)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("mode", MODES)
def test_packed_conversations_do_not_see_each_other(mode: str, implementation: str) -> None:
    """Two in one row, each with an image and its crayon, told by positions that start again."""
    model, batch = make_model(crayon_mode=mode), make_batch()
    one, two = row(batch, 0), row(batch, 1, skip=1)
    alone = [
        model(**{k: v for k, v in b.items() if k != "attention_mask"}).logits for b in (one, two)
    ]
    model.set_attn_implementation({"text_config": implementation})
    whole = conversation(one["input_ids"])
    whole.pop("attention_mask")
    positions = torch.tensor([[*range(8), *range(7)]])
    found = model(**whole, position_ids=positions, use_cache=False).logits
    torch.testing.assert_close(found, torch.cat(alone, 1), atol=1e-5, rtol=1e-5)
