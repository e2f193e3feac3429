"""A few of the random tokenizers, texts and files of records; their modules run for minutes."""

from __future__ import annotations

import random

import pytest

from tests.fuzz import fuzz_records, fuzz_text


@pytest.mark.parametrize("seed", range(3))
def test_labels_are_the_answer_under_any_tokenizer(seed: int) -> None:
    for number in range(100):
        fuzz_text.check(fuzz_text.draw(random.Random(f"{seed}/{number}")))


@pytest.mark.parametrize("seed", range(2))
def test_damaged_records_are_right_or_named(seed: int) -> None:
    for number in range(150):
        fuzz_records.check(fuzz_records.draw(random.Random(f"{seed}/{number}")))
