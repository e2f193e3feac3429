"""The lengths whose order was recorded from LLaVA's grouping, in ours."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from collavo.train.grouping import GroupedSchedule

FILE = Path(__file__).parents[2] / "data" / "golden" / "llava" / "geometry.json"
CASES = json.loads(FILE.read_text(encoding="utf-8"))["group_by_modality_length"]


def kinds_of(case: dict[str, Any]) -> list[set[bool]]:
    """Return which kinds each step of the recorded order has: lengths of text are negative."""
    size = case["batch_size"] * case["world_size"]
    order, lengths = case["indices"], case["lengths"]
    steps = [order[start : start + size] for start in range(0, len(order), size)]
    return [{lengths[index] > 0 for index in step} for step in steps]


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{len(case['lengths'])}")
def test_no_step_is_of_two_kinds(case: dict[str, Any]) -> None:
    """LLaVA mixes up to two steps of an epoch, where neither kind fills one."""
    assert sum(len(kinds) > 1 for kinds in kinds_of(case)) == case["mixed_megabatches"]
    kinds = {
        "image": [length for length in case["lengths"] if length > 0],
        "text": [-length for length in case["lengths"] if length < 0],
    }
    sizes = {kind: len(own) for kind, own in kinds.items()}
    lengths = [length for own in kinds.values() for length in own]
    batch = case["batch_size"] * case["world_size"]
    schedule = GroupedSchedule(sizes, batch, seed=case["torch_manual_seed"], lengths=lengths)
    steps = [schedule.samples(step) for step in range(schedule.steps_per_epoch)]
    assert sorted(index for step in steps for index in step) == list(range(len(lengths)))
    assert all(len({index < sizes["image"] for index in step}) == 1 for step in steps)
    assert all(
        [lengths[index] for index in step] == sorted((lengths[i] for i in step), reverse=True)
        for step in steps
    )
