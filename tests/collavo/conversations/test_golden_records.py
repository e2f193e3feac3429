"""Conversations that LLaVA's own code was run on, from their file to ids and labels."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from drawn_records import pictures, write

from collavo.conversations import ConversationDataset
from tests.collavo.processing.golden_llava import IMAGE, processor, recorded

# What the original answers by an assertion, and two placeholders for one image.
FAULTS = {
    "two_humans": "expected the assistant's turn, since questions and answers alternate",
    "two_images_one_turn": "expected 2 images in 'image', one for each <image>, got 1",
}


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = pictures(tmp_path_factory.mktemp("golden"), "a.png")
    records = [
        {
            "id": one["case"],
            **({"image": "a.png"} if one["has_image"] else {}),
            "conversations": one["conversations"],
        }
        for one in recorded("conversations")
    ]
    return write(folder / "conversations.json", records)


def expanded(record: dict[str, Any]) -> tuple[list[int], list[int]]:
    pairs = zip(record["input_ids"], record["labels"], strict=True)
    ids, labels = zip(*[p for p in pairs for _ in range(4 if p[0] == IMAGE else 1)], strict=True)
    return list(ids), list(labels)


def pairs() -> list[tuple[str, str]]:
    """Templates and tokenizers that a record is right with."""
    right = [one for one in recorded("records") if one["verdict"] == "kept"]
    return sorted({(one["template"], one["tokenizer"]) for one in right})


@pytest.mark.parametrize(("template", "tokenizer"), pairs())
def test_a_file_becomes_what_the_original_makes_of_it(
    path: Path, template: str, tokenizer: str
) -> None:
    """Every record that it keeps whole, bit for bit; two of the others are named as faults."""
    made = processor(tokenizer, template)
    skipped: list[Any] = []
    data = ConversationDataset.from_llava_json(
        path, images=path.parent, processor=made, on_skip=skipped.append
    )
    faults = {one.name.split("'")[1]: one.reason for one in skipped}
    assert template == "plain" or faults.keys() == FAULTS.keys()
    assert all(sentence in faults[case] for case, sentence in FAULTS.items())
    index = {data.file_name(i).split("'")[1]: i for i in range(len(data))}
    compared = 0
    for one in recorded("records"):
        ids, labels = expanded(one) if "input_ids" in one else ([], [])
        same = (one["template"], one["tokenizer"]) == (template, tokenizer)
        if not same or one["verdict"] != "kept" or len(ids) >= one["model_max_length"]:
            continue
        record = data[index[one["case"]]]
        batch = made.training_batch(
            [record["conversation"]], [record["image"]], pixels=False, return_tensors=None
        )
        tokens = [
            IMAGE if token == made.image_token_id else token for token in batch["input_ids"][0]
        ]
        assert (tokens, batch["labels"][0]) == (ids, labels), one["case"]
        assert data.lengths is not None and data.lengths[index[one["case"]]] == len(ids)
        compared += 1
    # With this one the original keeps none but what it has cut.
    assert compared or (template, tokenizer) == ("chatml_direct", "spm_chatml_bos_legacy")
