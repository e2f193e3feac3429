"""LLaVA and CoLLaVO models on ``attn_implementation="crayon"``."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from test_apply_to_llava import DECODERS, generate, make_batch, make_llava, plain
from tiny_decoders import counted, static_prefills_run_fused
from torch import Tensor

from collavo import apply_to_llava

pytestmark = pytest.mark.usefixtures("one_thread")

OPTIONS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "beams": {"num_beams": 3},
    "static": {"cache_implementation": "static", "disable_compile": True},
}


def crayon_llava(kind: str) -> Any:
    model = make_llava(kind)
    model.set_attn_implementation("crayon")
    return model


def right_padded(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """The second sample's padding token moved from its left end to its right end."""
    moved = {name: value.clone() for name, value in batch.items()}
    for name in ("input_ids", "attention_mask"):
        moved[name][1] = moved[name][1].roll(-1)
    return moved


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("kind", list(DECODERS))
def test_a_llava_prefill(kind: str, side: str) -> None:
    """Decoder and tower: the tower's attention is bidirectional, has no mask and no padding."""
    batch = plain(make_batch()) if side == "left" else right_padded(plain(make_batch()))
    valid = batch["attention_mask"].bool()
    with counted() as calls, torch.no_grad():
        found = crayon_llava(kind)(**batch).logits
        expected = make_llava(kind)(**batch).logits
    tower = [call for call in calls if not call["causal"]]
    assert tower and all(call["key_range"] is None for call in tower)
    assert len(calls) - len(tower) == 2
    torch.testing.assert_close(found[valid], expected[valid], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", list(OPTIONS))
@pytest.mark.parametrize("kind", list(DECODERS))
def test_llava_generates_the_same(kind: str, name: str) -> None:
    found, expected = (
        generate(model, plain(make_batch()), **OPTIONS[name])
        for model in (crayon_llava(kind), make_llava(kind))
    )
    assert torch.equal(found, expected)


@pytest.mark.parametrize("kind", list(DECODERS))
def test_llava_trains_the_same(kind: str) -> None:
    """Tower, projector and decoder, with gradient checkpointing as well."""
    batch, found = plain(make_batch()), []
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    for model in (make_llava(kind), crayon_llava(kind), crayon_llava(kind)):
        model.train()
        if found[1:]:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        model(**batch, labels=labels).loss.backward()
        found.append([p.grad for p in model.parameters() if p.grad is not None])
    for own, once, twice in zip(*found, strict=True):
        assert torch.equal(once, twice)
        torch.testing.assert_close(once, own, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("mode", ["attention", "projection"])
@pytest.mark.parametrize("kind", list(DECODERS))
def test_a_crayon_model_on_both_implementations(kind: str, mode: Any) -> None:
    """``apply_to_llava`` runs its own prefill on either; what it leaves to transformers agrees."""
    batch, results = make_batch(), []
    for model in (make_llava(kind), crayon_llava(kind)):
        apply_to_llava(model, crayon_mode=mode, crayon_rank=4)
        torch.manual_seed(0)
        for parameter in model.crayon_parameters():
            parameter.data.normal_(0.0, 0.3)
        holed = {**batch, "attention_mask": batch["attention_mask"].clone()}
        holed["attention_mask"][0, 6] = 0
        with torch.no_grad(), counted() as calls:
            out = model(**batch).logits[batch["attention_mask"].bool()]
            fused = [call for call in calls if call["causal"]]
            assert len(fused) == 2 and all("crayon_q" in call for call in fused)
            calls.clear()
            slow = model(**holed).logits[holed["attention_mask"].bool()]
            assert not [call for call in calls if call["causal"]]
        results.append((out, slow, generate(model, batch), generate(model, batch, num_beams=2)))
    for found, expected in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", list(DECODERS))
def test_a_crayon_model_over_sliding_caches(kind: str) -> None:
    """Prefill beyond the window (4), then decoding: cached, static and uncached agree."""
    model, batch = crayon_llava(kind), make_batch()
    apply_to_llava(model)
    for parameter in model.crayon_parameters():
        parameter.data.normal_(0.0, 0.3)
    results = []
    for options in ({"use_cache": False}, {}, OPTIONS["static"]):
        with counted() as calls:
            results.append(generate(model, batch, max_new_tokens=6, **options))
        # Of the decoder's: both layers' prefill at least.
        fused = options is not OPTIONS["static"] or static_prefills_run_fused()
        assert (len([call for call in calls if "crayon_q" in call]) >= 2) == fused, options
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])
