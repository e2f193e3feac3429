"""A few random official folders, always the same; the module runs for as long as one likes."""

from __future__ import annotations

import random
from collections import Counter

import pytest

from tests.fuzz.fuzz_conversions import FILE_DAMAGES, TENSOR_DAMAGES, check, draw


def test_random_folders_come_back_or_are_refused() -> None:
    ends = Counter(check(draw(random.Random(f"7/{case}"))) for case in range(24))
    assert ends["there and back"] >= 4 and ends["refused"] >= 8, "the cases are of both kinds"


@pytest.mark.parametrize("damage", [*TENSOR_DAMAGES, *FILE_DAMAGES])
def test_every_damage_is_refused(damage: str) -> None:
    cases = (draw(random.Random(f"8/{case}")) for case in range(1000))
    assert check(next(case for case in cases if case.damage == damage)) == "refused"
