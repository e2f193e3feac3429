"""The Triton kernels of panoptic_lookup on the CPU: every case, bit for bit the reference."""

from __future__ import annotations

import sys
import time
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "panoptic_lookup"))

from collavo_kernels.ops.panoptic_lookup import reference
from collavo_kernels.ops.panoptic_lookup.inputs import LookupResult
from collavo_kernels.ops.panoptic_lookup.triton import launch
from collavo_kernels.testing import offset_view, poisoned_empty
from collavo_kernels.testing.cases.panoptic_lookup import CASES, Case, colours, noise


def assert_same(actual: LookupResult, expected: LookupResult) -> None:
    for name, ours, theirs in zip(LookupResult._fields, actual, expected, strict=True):
        assert ours.dtype == theirs.dtype, name
        assert torch.equal(ours, theirs), name


# Hundreds of rows in every cell take the interpreter minutes; a GPU runs that case too.
NAMES = [name for name in CASES if name != "colliding-ids"]
# Where a cell's middle lies depends on the sizes alone, so some of the cases show it.
NEAREST = ("cells-overlap", "map-smaller-than-grid")


@pytest.mark.parametrize(
    ("name", "reduce"), [*((n, "majority") for n in NAMES), *((n, "nearest") for n in NEAREST)]
)
def test_every_case_gives_the_reference_bits(name: str, reduce: str) -> None:
    inputs = CASES[name].inputs(reduce)
    with poisoned_empty():
        assert_same(launch.forward(inputs), reference.forward(inputs))


# One map in colours beside the ids: the kernel asks each image which it has.
@pytest.mark.parametrize("name", ["colours", "ties", "list-out-of-order"])
def test_colours_give_the_same(name: str) -> None:
    inputs = CASES[name].inputs("majority", coloured=True)
    expected = reference.forward(CASES[name].inputs("majority"))
    assert_same(launch.forward(inputs), expected)
    mixed = (*inputs.maps[:1], *CASES[name].inputs("majority").maps[1:])
    assert_same(launch.forward(inputs._replace(maps=mixed)), expected)


def test_ids_that_are_not_listed_take_no_turn_each() -> None:
    """Thousands of them in one cell, around three that are: a turn each would take minutes."""
    ids = list(range(2, 6002))
    case = Case("unlisted", lambda: [noise(80, 80, ids)], [[(300, 1), (301, 0), (5999, 0)]], (1, 1))
    inputs = case.inputs("majority")
    start = time.perf_counter()
    assert_same(launch.forward(inputs), reference.forward(inputs))
    assert time.perf_counter() - start < 60


def test_a_cell_of_more_pixels_than_a_program_takes_at_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    ids = [0, 1, 2, 3]
    pairs = [[(i, 0) for i in ids[1:]]]
    case = Case("two rounds per row", lambda: [noise(40, 30, ids)], pairs, (1, 2))
    monkeypatch.setattr(launch, "LARGEST_BLOCK", 128)
    inputs = case.inputs("majority")
    assert_same(launch.forward(inputs), reference.forward(inputs))


def test_more_rows_than_a_program_writes_at_once() -> None:
    pairs = [[(2 * i + 1, i % 5) for i in range(launch.ROWS)]]
    case = Case("two blocks of rows", lambda: [noise(6, 6, [1, 3, 8])], pairs, (2, 2))
    inputs = case.inputs("majority")
    assert_same(launch.forward(inputs), reference.forward(inputs))


def test_views_are_read_where_they_lie() -> None:
    maps = torch.randint(-1, 4, (2, 9, 11), dtype=torch.int32)
    pairs = [[(1, 0), (2, 0)], [(3, 1)]]
    case = Case("odd strides", lambda: list(maps), pairs, (3, 4))
    inputs = case.inputs("majority")
    expected = reference.forward(inputs)
    wide = torch.zeros(2, 12, 20, dtype=torch.int32)
    wide[:, 2:11, 5:16] = maps
    coloured = torch.zeros(2, 12, 20, 3, dtype=torch.uint8)
    coloured[:, 2:11, 5:16] = colours(maps.clamp_min(0))
    for view in (offset_view(maps), wide[:, 2:11, 5:16], coloured[:, 2:11, 5:16]):
        assert_same(launch.forward(inputs._replace(maps=(view,))), expected)
