"""The operator in PyTorch: schema, fake, compile, export; and what it says of bad input."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounter

from collavo_kernels import CrayonMap, panoptic_lookup
from collavo_kernels.testing.cases.panoptic_lookup import CASES, Case, ints

FIELDS = (
    "row_index",
    "row_class",
    "row_number",
    "row_image",
    "row_segment_id",
    "row_box",
    "row_area",
)


def flat_arguments(case: Case, reduce: str) -> tuple[Any, ...]:
    maps = [each[None] for each in case.maps()]
    ids, classes = case.ids(), case.classes()
    return (
        maps,
        torch.cat(ids),
        torch.cat(classes),
        [len(each) for each in ids],
        *case.grid,
        case.num_classes,
        case.max_number,
        reduce,
    )


def assert_equal_maps(actual: CrayonMap, expected: CrayonMap) -> None:
    for name in FIELDS:
        assert torch.equal(getattr(actual, name), getattr(expected, name)), name


@pytest.mark.parametrize("backend", ["reference", ""])
@pytest.mark.parametrize("name", ["mixed-sizes", "no-segments", "cells-overlap"])
def test_opcheck(name: str, backend: str) -> None:
    arguments = flat_arguments(CASES[name], "majority")
    options = {"backend": backend}
    torch.library.opcheck(torch.ops.collavo.panoptic_lookup.default, arguments, options)


def test_compiles_in_one_graph_for_any_number_of_segments() -> None:
    torch._dynamo.reset()
    frames = CompileCounter()

    @torch.compile(fullgraph=True, dynamic=True, backend=frames)
    def placed(maps: Tensor, ids: list[Tensor], classes: list[Tensor]) -> tuple[CrayonMap, Tensor]:
        crayon = panoptic_lookup(maps, ids, classes, grid=(3, 4))
        positions = torch.arange(12).expand(maps.shape[0], 12)
        return crayon, crayon.pad(17).scatter(positions, 14)

    for segments in (3, 5, 7):  # not 2: torch takes equal sizes for the same size
        maps = torch.randint(0, 6, (2, 9, 10), dtype=torch.int32)
        ids = [torch.arange(1, 1 + segments, dtype=torch.int32) for _ in maps]
        classes = [ints([4] * segments) for _ in maps]
        crayon, scattered = placed(maps, ids, classes)
        expected = panoptic_lookup(maps, ids, classes, grid=(3, 4))
        assert_equal_maps(crayon, expected)
        assert torch.equal(scattered[:, :12], expected.row_index)
    assert frames.frame_count == 1


def test_inductor_runs_it() -> None:
    torch._dynamo.reset()
    case = CASES["mixed-sizes"]

    @torch.compile(fullgraph=True)
    def area(maps: list[Tensor], ids: list[Tensor], classes: list[Tensor]) -> Tensor:
        return panoptic_lookup(maps, ids, classes, grid=case.grid).row_area * 2

    expected = panoptic_lookup(case.maps(), case.ids(), case.classes(), grid=case.grid)
    assert torch.equal(area(case.maps(), case.ids(), case.classes()), expected.row_area * 2)


def test_bad_values_raise_from_compiled_code_too() -> None:
    torch._dynamo.reset()
    lookup = torch.compile(panoptic_lookup, fullgraph=True, backend="aot_eager")
    maps = torch.zeros(1, 4, 4, dtype=torch.int32)
    with pytest.raises(ValueError, match="got 200 for segment id 3"):
        lookup(maps, [ints([3])], [ints([200])], grid=(2, 2))


def test_exports_with_a_crayon_map_as_output_and_input() -> None:
    class Lookup(torch.nn.Module):
        def forward(self, maps: Tensor, ids: list[Tensor], classes: list[Tensor]) -> CrayonMap:
            return panoptic_lookup(maps, ids, classes, grid=(3, 3))

    class Boxes(torch.nn.Module):
        def forward(self, crayon: CrayonMap) -> Tensor:
            return crayon.row_box * 2

    maps = torch.randint(0, 4, (2, 8, 8), dtype=torch.int32)
    arguments = (maps, [ints([1, 2]), ints([3])], [ints([0, 0]), ints([7])])
    expected = panoptic_lookup(*arguments, grid=(3, 3))
    exported = torch.export.export(Lookup(), arguments)
    assert_equal_maps(exported.module()(*arguments), expected)
    boxes = torch.export.export(Boxes(), (expected,))
    assert torch.equal(boxes.module()(expected), expected.row_box * 2)


GOOD: dict[str, Any] = {
    "segment_maps": torch.zeros(2, 4, 4, dtype=torch.int32),
    "segment_ids": [ints([1, 2]), ints([5])],
    "segment_classes": [ints([0, 1]), ints([2])],
    "grid": (2, 2),
}

BAD_VALUES = {
    "class too high": (
        {"segment_classes": [ints([0, 1]), ints([133])]},
        r"segment_classes\[1\]: expected classes from -1 .* to 132, got 133 for segment id 5",
    ),
    "class below -1": (
        {"segment_classes": [ints([-2, 1]), ints([0])]},
        r"segment_classes\[0\].*got -2 for segment id 1",
    ),
    "class of the most negative value": (
        {"segment_classes": [ints([0, -(2**31)]), ints([0])]},
        r"segment_classes\[0\].*segment id 2",
    ),
    "id zero": ({"segment_ids": [ints([1, 0]), ints([5])]}, r"segment_ids\[0\].*above 0, got 0"),
    "id negative": ({"segment_ids": [ints([1, 2]), ints([-5])]}, r"segment_ids\[1\].*got -5"),
    "id twice": (
        {"segment_ids": [ints([7, 7]), ints([5])]},
        r"segment_ids\[0\].*id 7 more than once",
    ),
    "one list too few": ({"segment_ids": [ints([1, 2])]}, r"segment_ids: .*\(2\), got 1 entries"),
    "one tensor for all": (
        {"segment_classes": ints([0, 1, 2])},
        r"segment_classes: expected a list of one tensor per image",
    ),
    "fewer classes than ids": (
        {"segment_classes": [ints([0]), ints([2])]},
        r"segment_classes\[0\]: expected shape \[2\]",
    ),
    "two-dimensional ids": (
        {"segment_ids": [ints([1, 2]).reshape(1, 2), ints([5])]},
        r"segment_ids\[0\]: expected shape \[S\]",
    ),
    "lists on another device": (
        {"segment_ids": [ints([1, 2]).to("meta"), ints([5])]},
        r"segment_ids\[0\]: expected a tensor on cpu.*without waiting",
    ),
    "flat map": ({"segment_maps": torch.zeros(4, 4, dtype=torch.int32)}, r"shape \[B, H, W\]"),
    "map without a pixel": (
        {"segment_maps": torch.zeros(2, 0, 4, dtype=torch.int32)},
        r"segment_maps: expected a height of 1 to 32767 pixels.*map of zeros",
    ),
    "listed map without a pixel": (
        {"segment_maps": [ints([]).reshape(3, 0), torch.zeros(2, 2, dtype=torch.int32)]},
        r"segment_maps\[0\]: expected a width",
    ),
    "map too wide": (
        {"segment_maps": torch.zeros(2, 1, 40000, dtype=torch.int32)},
        r"segment_maps: expected a width of 1 to 32767",
    ),
    "listed maps with a batch axis": (
        {"segment_maps": [torch.zeros(1, 4, 4, dtype=torch.int32)] * 2},
        r"segment_maps\[0\]: expected shape \[H, W\]",
    ),
    "maps on two devices": (
        {
            "segment_maps": [
                torch.zeros(4, 4, dtype=torch.int32),
                torch.zeros(4, 4, dtype=torch.int32, device="meta"),
            ]
        },
        r"segment_maps\[1\]: expected a tensor on cpu",
    ),
    "grid of three": ({"grid": (2, 2, 2)}, r"grid: expected \(grid_h, grid_w\)"),
    "grid of zero": ({"grid": (0, 2)}, r"grid\[0\]: expected at least 1"),
    "unknown reduction": ({"reduce": "mean"}, r"reduce: expected one of majority, nearest"),
    "negative last number": ({"max_number": -1}, r"max_number: expected at least 0"),
    "unknown backend": ({"backend": "fast"}, r"backend: expected one of"),
    "backend of another device": ({"backend": "triton"}, r"backend: 'triton' cannot serve"),
    "backend that does not exist": (
        {"backend": "cuda"},
        r"backend: expected one of cpu, triton, reference",
    ),
}


@pytest.mark.parametrize(("change", "message"), BAD_VALUES.values(), ids=BAD_VALUES.keys())
def test_bad_values_are_named(change: dict[str, Any], message: str) -> None:
    panoptic_lookup(**GOOD)
    with pytest.raises(ValueError, match=message):
        panoptic_lookup(**{**GOOD, **change})


BAD_TYPES = {
    "float map": ({"segment_maps": torch.zeros(2, 4, 4)}, r"segment_maps: expected dtype int32"),
    "long map": (
        {"segment_maps": [torch.zeros(4, 4, dtype=torch.int64)] * 2},
        r"segment_maps\[0\]: expected dtype int32 or uint8, got int64",
    ),
    "long ids": (
        {"segment_ids": [torch.tensor([1, 2]), ints([5])]},
        r"segment_ids\[0\]: expected dtype int32, got int64",
    ),
    "ids as numbers": (
        {"segment_ids": [[1, 2], [5]]},
        r"segment_ids\[0\]: expected a tensor, got list",
    ),
    "map as numbers": ({"segment_maps": [[[0]], [[0]]]}, r"segment_maps\[0\]: expected a tensor"),
}


@pytest.mark.parametrize(("change", "message"), BAD_TYPES.values(), ids=BAD_TYPES.keys())
def test_bad_types_are_named(change: dict[str, Any], message: str) -> None:
    with pytest.raises(TypeError, match=message):
        panoptic_lookup(**{**GOOD, **change})


def test_a_direct_call_of_the_operator_is_checked_too() -> None:
    """Native code must never see sizes that the public function did not check."""
    maps, none = torch.zeros(2, 4, 4, dtype=torch.int32), ints([])
    op = torch.ops.collavo.panoptic_lookup
    with pytest.raises(ValueError, match=r"segment_counts: expected one per image \(2\), got 1"):
        op([maps], none, none, [0], 2, 2, 133, 20, "majority")
    with pytest.raises(ValueError, match=r"segment_ids: expected shape \[7\]"):
        op([maps], none, none, [3, 4], 2, 2, 133, 20, "majority")
    with pytest.raises(ValueError, match=r"segment_counts\[1\]: expected at least 0, got -3"):
        op([maps], none, none, [3, -3], 2, 2, 133, 20, "majority")
    with pytest.raises(TypeError, match=r"segment_maps\[0\]: expected dtype int32"):
        op([maps.long()], none, none, [0, 0], 2, 2, 133, 20, "majority")
