"""LLaVA's own code and this package on the same conversations: prompts, ids and labels."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
from PIL import Image

from collavo.processing import OverlongError
from tests.collavo.processing import golden_llava
from tests.collavo.processing.golden_llava import (
    IMAGE,
    TOKENIZERS,
    conversation,
    recorded,
    said,
    spoken,
)

LLAVAS = sorted(recorded("templates")["templates"])
PAIRS = sorted({(one["template"], one["tokenizer"]) for one in recorded("records")})


# The original's text is another there: it drops a separator, moves a placeholder out of an answer,
# or reads control tokens out of words.
OTHER_TEXT = (
    "empty_answer",
    "placeholder_in_answer",
    "stop_in_answer",
    "placeholder_without_image",
)


# What no reading makes right; the sentence names the record.
FAULTS = {
    "two_humans": "questions and answers alternate",
    "two_images_one_turn": "expected 2 images",
}


@cache
def processor_of(tokenizer: str, template: str) -> Any:
    return golden_llava.processor(tokenizer, template)


def turns_as_recorded(record: dict[str, Any]) -> bool:
    """Whether it kept every turn of the conversation, and no more."""
    kinds = ("gpt_first", "human_last", "two_humans", "image_without_placeholder")
    return record["case"] not in kinds


def batch_of(processor: Any, turns: Any, **options: Any) -> tuple[list[int], list[int]]:
    """Ids and labels of one conversation, an image's id as a record has it."""
    images = sum(
        p["type"] == "image" for t in turns if isinstance(t["content"], list) for p in t["content"]
    )
    batch = processor.training_batch(
        [turns], [[Image.new("RGB", (8, 8))] * images], pixels=False, return_tensors=None, **options
    )
    own = [IMAGE if token == processor.image_token_id else token for token in batch["input_ids"][0]]
    return own, batch["labels"][0]


def expanded(record: dict[str, Any]) -> tuple[list[int], list[int]]:
    """Return what the loss sees; those of v1.1.3 were recorded as they were tokenized."""
    if "expanded_ids" in record:
        return record["expanded_ids"], record["expanded_labels"]
    pairs = list(zip(record["input_ids"], record["labels"], strict=True))
    wide = [pair for pair in pairs for _ in range(4 if pair[0] == IMAGE else 1)]
    ids, labels = zip(*wide[: record["model_max_length"]], strict=True)
    return list(ids), list(labels)


def test_every_record_that_is_right_is_reproduced_bit_for_bit() -> None:
    """224 of them, images expanded to four tokens; half answers are the only difference.

    28 were cut at 64 tokens, before their first answer ends. Here samples end with a whole answer,
    so these are refused; without a limit they begin as recorded: a cut changes nothing before it.
    """
    right = [one for one in recorded("records") if one["verdict"] == "kept"]
    assert len(right) == 224 and {one["tokenizer"] for one in right} == set(TOKENIZERS)
    refused = 0
    for one in right:
        processor = processor_of(one["tokenizer"], one["template"])
        expected, turns, most = expanded(one), conversation(one), one["model_max_length"]
        ids, labels = batch_of(processor, turns)
        if len(ids) > most:
            refused += 1
            assert len(expected[0]) == most == 64
            with pytest.raises(
                OverlongError, match=r"conversations\[0\]: nothing of its answer is"
            ):
                batch_of(processor, turns, max_length=most)
            ids, labels = ids[:most], labels[:most]
        assert (ids, labels) == expected, (one["tokenizer"], one["template"], one["case"])
    assert refused == 28


@pytest.mark.parametrize(("template", "tokenizer"), PAIRS)
def test_every_other_record_is_right_or_refused(template: str, tokenizer: str) -> None:
    """Where the original drops a sample, shifts its labels or raises: by the properties."""
    processor = processor_of(tokenizer, template)
    for one in recorded("records"):
        if (one["template"], one["tokenizer"]) != (template, tokenizer) or one["verdict"] == "kept":
            continue
        most = one["model_max_length"]
        if one["case"] in FAULTS:
            with pytest.raises(ValueError, match=rf"^{one['case']}: .*{FAULTS[one['case']]}"):
                conversation(one)
            continue
        turns = conversation(one)
        pictured = any(not isinstance(turn["content"], str) for turn in turns)
        if template == "plain" and (len(turns) > 2 or not pictured):
            with pytest.raises(ValueError, match=r"conversations\[0\]: .*plain: expected one user"):
                batch_of(processor, turns)
            continue
        ids, labels = batch_of(processor, turns)
        answers = [turn["content"] for turn in turns if turn["role"] == "assistant"]
        assert spoken(processor, ids, labels) == [said(template, text) for text in answers]
        assert ids.count(IMAGE) == 4 * pictured
        if "input_ids" in one and one["case"] not in OTHER_TEXT and turns_as_recorded(one):
            assert ids[: len(expanded(one)[0])] == expanded(one)[0], one["case"]
        if len(ids) > most:
            with pytest.raises(OverlongError):
                batch_of(processor, turns, max_length=most)


@pytest.mark.parametrize("name", LLAVAS)
def test_the_prompt_is_llavas(name: str) -> None:
    """Up to where the model answers; v0 asks as it was trained, and plain has no second turn."""
    facts = recorded("templates")
    asked = [
        {"role": role, "content": text or ""} for role, text in facts["asked"] if text is not None
    ]
    asked[0]["content"] = [{"type": "image"}, {"type": "text", "text": "Is it raining?"}]
    processor = processor_of("spm_legacy", name)
    if name == "plain":
        assert processor.prompt(asked[:1]) == "<image>"
        return
    own = processor.prompt(asked).replace("<Image><image></Image>", "<image>")
    expected = facts["templates"][name]["prompt"]
    if name.startswith("v0"):
        expected = expected.replace("###", "\n### ").replace("\n### H", "\n\n### H", 1)
    assert own == expected
