"""A decoder with trained weights: every part computes what is stock, and the crayon learns."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import smollm2
import torch
import variants
from torch import Tensor

from collavo_kernels.testing import assert_within_budget

pytestmark = pytest.mark.skipif(smollm2.missing() is not None, reason=smollm2.missing() or "")


@pytest.fixture(scope="module")
def loaded() -> tuple[Any, Any]:
    return smollm2.load()


@pytest.fixture(scope="module")
def stock(loaded: tuple[Any, Any]) -> dict[str, Any]:
    """Logits of a passage in float32 and float64, and an answer."""
    model, tokenizer = loaded
    ids = smollm2.passage(tokenizer)[:, :96]
    low = smollm2.logits(model, ids)
    exact = smollm2.logits(smollm2.in_dtype(model, torch.float64), ids)
    answer = smollm2.answer(model, tokenizer, smollm2.QUESTIONS[0], 8)
    assert "Paris" in tokenizer.decode(answer), "the weights are trained ones"
    return {"ids": ids, "low": low, "exact": exact, "answer": answer}


@pytest.mark.parametrize(
    "make",
    [
        variants.with_registered_attention,
        variants.with_crayon_attention,
        lambda model: variants.with_linears(model, False),
    ],
    ids=["register_attention", "CrayonAttention", "DualQLoRALinear"],
)
def test_it_computes_what_stock_does(
    loaded: tuple[Any, Any], stock: dict[str, Any], make: Callable[[Any], Any]
) -> None:
    model = make(loaded[0])
    found: Tensor = smollm2.logits(model, stock["ids"])
    assert_within_budget(found, stock["low"], stock["exact"])
    plain = smollm2.perplexity(stock["low"], stock["ids"])
    assert smollm2.perplexity(found, stock["ids"]) == pytest.approx(plain, rel=1e-5)
    answer = smollm2.answer(model, loaded[1], smollm2.QUESTIONS[0], 8)
    assert answer == stock["answer"]


def test_four_bits_are_bitsandbytes_own(loaded: tuple[Any, Any], stock: dict[str, Any]) -> None:
    theirs = variants.with_bitsandbytes(loaded[0])
    ours = variants.from_bitsandbytes(theirs)
    assert variants.same_bytes(ours, theirs)
    assert variants.same_bytes(variants.with_linears(loaded[0], True), theirs)
    asked = (loaded[1], smollm2.QUESTIONS[0], 8)
    assert smollm2.answer(ours, *asked) == smollm2.answer(theirs, *asked)


def test_a_llava_around_it(loaded: tuple[Any, Any]) -> None:
    """Its decoder is the decoder; a fresh crayon changes nothing, a drawn one does."""
    import measure  # the trainer and the demo's scenes come with it

    rows = {row["what"]: row["value"] for row in measure.llava_rows(*loaded)}
    assert rows["text: LLaVA - decoder, largest logit"] < 1e-3
    assert rows["image: fresh crayon - stock, largest logit"] < 1e-3
    assert rows["image: greedy answer as stock"] is True
    assert rows["image: drawn crayon - stock, largest logit"] > 0.1


def test_crayon_prompt_tuning_lowers_the_loss(loaded: tuple[Any, Any]) -> None:
    import measure

    before, after, _ = measure.cpt_rows(*loaded)
    assert after["value"] < before["value"] - 0.05
