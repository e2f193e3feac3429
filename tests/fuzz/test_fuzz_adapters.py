"""A few random adapter folders, always the same; the module runs for as long as one likes."""

from __future__ import annotations

from collections.abc import Callable

import pytest

pytest.importorskip("peft")

from fuzz_adapters import DAMAGES, AdapterCase, run, run_cases


def test_random_adapters_are_equal_to_peft_or_refused_by_name() -> None:
    ends = run_cases(seed=7, cases=30)
    assert ends["loaded"] >= 5 and ends["refused"] >= 5, "the cases are of both kinds"


@pytest.mark.parametrize("damage", list(DAMAGES))
def test_a_damaged_folder_is_named(damage: str, tmp_path_factory: Callable[..., object]) -> None:
    options = {"r": 3, "lora_alpha": 6, "target_modules": ["q_proj"], "init_lora_weights": True}
    for seed in range(2):
        folder = tmp_path_factory.mktemp("adapter")  # type: ignore[attr-defined]
        assert run(AdapterCase(seed, options, damage=damage), folder)
