"""A few random damages of model folders, always the same; the module runs as long as one likes."""

from __future__ import annotations

from fuzz_model_folders import DAMAGES, run_cases


def test_a_damaged_folder_gives_the_model_or_an_error() -> None:
    ends = run_cases(seed=3, cases=60)
    found = {end.split(":")[0] for end in ends}
    assert found == set(DAMAGES), "every damage was tried"
    assert sum(count for end, count in ends.items() if end.endswith("refused")) > 20
