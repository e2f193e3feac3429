"""A few random histories of a patched model, always the same; the module runs on and on."""

from __future__ import annotations

import pytest

pytest.importorskip("accelerate")

from tests.fuzz.fuzz_patched_model import ACTS, run_cases


def test_a_patched_model_does_what_the_stock_model_does() -> None:
    done = run_cases(seed=3, cases=12)
    tried = [each.__name__ for each in ACTS if done[each.__name__]]
    assert len(tried) >= 7, f"too few kinds of acts: {tried}"
