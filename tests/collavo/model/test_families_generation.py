"""Answers of every family, as the stock model with plain hooks: beams, turns, embeddings."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from test_apply_to_llava import plain
from test_families import patched
from tiny_families import FAMILIES, IMAGE, VIDEO, make_inputs
from torch import Tensor
from transformers import DynamicCache

from collavo.model.families import encode_images
from tests.fuzz.stock_crayon import StockWithCrayon

pytestmark = pytest.mark.usefixtures("one_thread")

GREEDY: dict[str, Any] = {
    "do_sample": False,
    "max_new_tokens": 4,
    "suppress_tokens": [IMAGE, VIDEO],
    "return_dict_in_generate": True,
    "output_logits": True,
}


def answers(oracle: StockWithCrayon, batch: dict[str, Tensor], **options: Any) -> Any:
    """What the stock model answers to features that are merged in by hand.

    Its own way mixes up the images of beams: before 5.23 where a sample has several, since then
    over a cache that has some of them.
    """
    model = oracle.model
    oracle.crayon = crayon_of(batch)
    ids = batch["input_ids"]
    embeds = model.get_input_embeddings()(ids).clone()
    found = torch.zeros_like(ids, dtype=torch.bool)
    for modality, output in encode_images(model.model, batch).items():
        token = model.config.image_token_id if modality == "image" else VIDEO
        features = [x.reshape(-1, x.shape[-1]) for x in output.pooler_output]
        if int((ids == token).sum()) != sum(map(len, features)):
            pytest.skip("this transformers ends a video's lines after it was encoded")
        embeds[ids == token] = torch.cat(features)
        found |= ids == token
    oracle.merged = found
    mask = batch["attention_mask"]
    return model.generate(inputs_embeds=embeds, attention_mask=mask, **GREEDY | options)


def compare(found: Any, expected: Any) -> None:
    """Answers are equal, and the logits by which they were chosen are near."""
    length = expected.sequences.shape[1]
    assert torch.equal(found.sequences[:, -length:], expected.sequences)
    for own, other in zip(found.logits, expected.logits, strict=True):
        torch.testing.assert_close(own, other, atol=2e-5, rtol=2e-5)


def crayon_of(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value for name, value in batch.items() if name.startswith("crayon")}


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"use_cache": False, "num_beams": 2}])
@pytest.mark.parametrize("name", list(FAMILIES))
def test_answers(name: str, options: dict[str, Any]) -> None:
    """Samples of two images and one: beams keep the images of a sample together."""
    model, _, oracle = patched(name)
    for counts in ([2, 1], [1, 2]):
        batch = make_inputs(name, counts)
        with torch.no_grad():
            # From embeddings transformers does not go on without a cache.
            expected = answers(oracle, batch, num_beams=options.get("num_beams", 1))
            compare(model.generate(**batch, **GREEDY | options), expected)


@pytest.mark.parametrize("name", list(FAMILIES))
def test_answers_to_embeddings(name: str) -> None:
    """Image tokens are found by their embedding, for beams too."""
    model, _, oracle = patched(name)
    batch = make_inputs(name, [2, 1])
    with torch.no_grad():
        expected = answers(oracle, batch, num_beams=2)
        embeds = model.get_input_embeddings()(batch.pop("input_ids"))
        found = model.generate(**batch, inputs_embeds=embeds, **GREEDY, num_beams=2)
    compare(found, expected)


def later_turn(mask: Tensor, answer: Tensor, more: dict[str, Tensor]) -> dict[str, Tensor]:
    """A conversation's tokens, of which all but the last answer had that mask, and more."""
    seen = torch.ones_like(answer[:, mask.shape[1] :])
    return {
        "input_ids": torch.cat([answer, more["input_ids"]], 1),
        "attention_mask": torch.cat([mask, seen, more["attention_mask"]], 1),
    }


def whole_crayon(first: dict[str, Tensor], second: dict[str, Tensor], token: int) -> Any:
    """The crayon of both turns: a sample's entries side by side, rows of the second behind."""
    counts = [(each["input_ids"] == token).sum(1).tolist() for each in (first, second)]
    places = max(a + b for a, b in zip(*counts, strict=True))
    rows = first["crayon_class"].shape[1]
    index = torch.full((len(counts[0]), places), -1, dtype=torch.int32)
    for sample, (a, b) in enumerate(zip(*counts, strict=True)):
        index[sample, :a] = first["crayon_index"][sample, :a]
        own = second["crayon_index"][sample, :b]
        index[sample, a : a + b] = torch.where(own >= 0, own + rows, -1)
    both = {n: torch.cat([first[n], second[n]], 1) for n in ("crayon_class", "crayon_number")}
    return {"crayon_index": index, **both}


def pixels_of(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    others = {"input_ids", "attention_mask"}
    return {n: v for n, v in plain(batch).items() if n not in others}


def join_images(name: str, first: dict[str, Tensor], second: dict[str, Tensor]) -> Any:
    """The images of both turns as one conversation's processor call gives them."""
    a, b = pixels_of(first), pixels_of(second)
    if name in ("idefics3", "smolvlm"):
        return {n: torch.cat([a[n], b[n]], 1) for n in a}
    joined = {}
    for key in a:  # sample by sample: both turns have one image in each
        joined[key] = torch.stack([x for pair in zip(a[key], b[key], strict=True) for x in pair])
    return joined


@pytest.mark.parametrize("beams", [1, 2])
@pytest.mark.parametrize("given", ["new images", "all images"])
@pytest.mark.parametrize("name", list(FAMILIES))
def test_later_turns(name: str, given: str, beams: int) -> None:
    """Over a kept cache, as the whole conversation without one."""
    model, _, oracle = patched(name)
    first, second = make_inputs(name, [1, 1]), make_inputs(name, [1, 1])
    second["crayon_class"] = second["crayon_class"].flip(1)
    second |= {n: -v for n, v in second.items() if v.is_floating_point()}
    for batch in (first, second):  # of so many, that an image's tokens depend on the others
        batch.pop("batch_num_images", None)
    cache, options = DynamicCache(config=model.config.get_text_config()), {"num_beams": beams}
    with torch.no_grad():
        answer = model.generate(**first, **GREEDY, past_key_values=cache).sequences
        cache.batch_repeat_interleave(beams)
        turn = later_turn(first["attention_mask"], answer, second)
        images = join_images(name, first, second)
        whole = whole_crayon(first, second, FAMILIES[name].token)
        expected = answers(oracle, turn | images | whole, **options)
        new = pixels_of(second) | crayon_of(second)
        inputs = images | whole if given == "all images" else new
        found = model.generate(**turn, **inputs, **GREEDY | options, past_key_values=cache)
        compare(found, expected)
        if beams > 1:
            return
        # A turn of words may bring them all again.
        words = {"input_ids": torch.tensor([[5], [6]]), "attention_mask": torch.ones(2, 1).long()}
        turn = later_turn(turn["attention_mask"], found.sequences, words)
        found = model.generate(**turn, **inputs, **GREEDY, past_key_values=cache)
        compare(found, answers(oracle, turn | images | whole))


def test_images_that_are_neither_all_nor_the_new_ones() -> None:
    """Beams repeat a sample's features: those of no sample cannot be."""
    model, *_ = patched("llava")
    batch = make_inputs("llava", [2, 1])
    batch["pixel_values"] = batch["pixel_values"][:2]
    message = r"pixel_values: expected images for 12 image tokens, got 8 features"
    with pytest.raises(ValueError, match=message):
        model.generate(**batch, **GREEDY, num_beams=2)


def test_a_crayon_on_no_image_that_is_read() -> None:
    """Janus draws images by a loop of its own, which calls the decoder: no crayon gets there."""
    model, *_ = patched("janus")
    batch = make_inputs("janus", [1, 1])
    with pytest.raises(ValueError, match=r"generation_mode: expected 'text' .* got 'image'"):
        model.generate(**batch, generation_mode="image")
    assert model.generate(**batch, generation_mode="text", max_new_tokens=1).shape[0] == 2
