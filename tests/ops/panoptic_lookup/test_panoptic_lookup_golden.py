"""The official code's recorded results, reproduced where they are right and put right elsewhere."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from collavo_kernels import CrayonMap, panoptic_lookup

# Cases the official code handles correctly: everything recorded is reproduced exactly.
CORRECT = (
    "single_person",
    "three_ascending",
    "minus1_background",
    "repeated_class_3person_2car",
    "repeated_20_instances",
    "noncontiguous_ids_ascending_info",
    "full_image_one_segment",
    "single_pixels_in_corners",
    "disconnected_segment",
    "suffix_classes",
    "hf_postprocess_seed0",
    "hf_postprocess_seed1",
    "hf_postprocess_seed2",
)
# Quirk 1: ids not in ascending order: cells are right, boxes are those of other segments.
UNORDERED = ("noncontiguous_ids_info_order_9_2_5", "contiguous_ids_info_descending")
# Quirk 2: listed segments without a pixel: crash.
ABSENT = ("absent_segment_last", "absent_segment_middle")
# Quirk 3: an unlisted id takes the class and number of the id before it, or crashes if it is first.
UNLISTED = ("map_id_not_in_info_last", "map_id_not_in_info_middle", "map_id_not_in_info_first")
# Quirks 2 and 3 together: no crash, and the box of another segment.
ABSENT_AND_UNLISTED = ("one_absent_one_extra",)
# Quirk 4: numbers after 20, which the table of 21 vectors does not have.
OVERFLOW = ("repeated_23_instances_overflow", "repeated_22_of_which_21_same_class")
# Quirk 5: boxes divided by 35 for a map of any size.
OTHER_SIZE = ("other_size_48x64", "other_size_5x7", "other_size_70x35", "size_1x1")
# Quirk 6: a map without a segment: crash.
EMPTY = ("none_all_minus1", "none_all_zero", "none_in_map_but_info_present")
# Quirk 2: the same id twice in the list: crash.
LISTED_TWICE = ("fused_same_id_twice_in_info",)
# Quirk 7: a class that does not exist: crash.
CLASS_OUT_OF_RANGE = ("label_id_133_out_of_range",)


class Case:
    """One recorded case: the input, what was recorded, and what this operator makes of it."""

    def __init__(self, golden: Any, name: str, backend: str) -> None:
        tensors, facts = golden("panoptic")
        self.facts = facts["cases"][name]
        self.map: Tensor = tensors[f"{name}.segmentation"]
        self.classes = tensors.get(f"{name}.seg_prompt_ind")
        self.numbers = tensors.get(f"{name}.seg_num_ind")
        self.boxes = tensors.get(f"{name}.boxes_in_info_order")
        self.info = self.facts["segments_info"]
        self.backend = backend

    def lookup(self) -> CrayonMap:
        ids = torch.tensor([each["id"] for each in self.info], dtype=torch.int32)
        classes = torch.tensor([each["label_id"] for each in self.info], dtype=torch.int32)
        height, width = self.map.shape
        return panoptic_lookup(
            self.map.int()[None], [ids], [classes], grid=(height, width), backend=self.backend
        )

    def boxes_by_id(self, crayon: CrayonMap) -> dict[int, list[float]]:
        ids = crayon.row_segment_id.tolist()
        return {i: box for i, box in zip(ids, crayon.row_box.tolist(), strict=True) if i}

    def true_boxes(self) -> dict[int, list[float]]:
        """Boxes of the ids in the map as fractions in float32, from the pixels themselves."""
        height, width = self.map.shape
        size = torch.tensor([width, height, width, height], dtype=torch.float32)
        pixels = {}
        for each in self.map.unique().tolist():
            y, x = torch.where(self.map == each)
            if each > 0:
                pixels[each] = [int(x.min()), int(y.min()), int(x.max()) + 1, int(y.max()) + 1]
        recorded = self.facts.get("true_pixel_boxes_by_id")
        assert recorded is None or {int(i): box for i, box in recorded.items()} == pixels
        return {i: (torch.tensor(box).float() / size).tolist() for i, box in pixels.items()}


@pytest.fixture(params=["reference", ""], ids=["reference", "default"])
def case(golden: Any, request: pytest.FixtureRequest) -> Any:
    return lambda name: Case(golden, name, request.param)


def cells(crayon: CrayonMap, values: Tensor) -> list[int]:
    return values[crayon.row_index[0].long()].tolist()


def test_every_recorded_case_has_a_test(golden: Any) -> None:
    groups = (CORRECT, UNORDERED, ABSENT, UNLISTED, ABSENT_AND_UNLISTED, OVERFLOW, OTHER_SIZE)
    named = {name for group in groups for name in group}
    named |= {*EMPTY, *LISTED_TWICE, *CLASS_OUT_OF_RANGE}
    assert named == set(golden("panoptic")[1]["cases"])


@pytest.mark.parametrize("name", CORRECT)
def test_classes_numbers_and_boxes_are_those_recorded(case: Any, name: str) -> None:
    recorded = case(name)
    crayon = recorded.lookup()
    assert cells(crayon, crayon.row_class) == recorded.classes.flatten().tolist()
    assert cells(crayon, crayon.row_number) == recorded.numbers.flatten().tolist()
    boxes = recorded.boxes_by_id(crayon)
    listed = [boxes[each["id"]] for each in recorded.info]
    assert listed == recorded.boxes.tolist()


@pytest.mark.parametrize("name", UNORDERED)
def test_boxes_belong_to_their_ids_whatever_the_order_of_the_list(case: Any, name: str) -> None:
    recorded = case(name)
    crayon = recorded.lookup()
    assert cells(crayon, crayon.row_class) == recorded.classes.flatten().tolist()
    assert cells(crayon, crayon.row_number) == recorded.numbers.flatten().tolist()
    assert not all(recorded.facts["boxes_belong_to_own_segment"])
    assert recorded.boxes_by_id(crayon) == recorded.true_boxes()


@pytest.mark.parametrize("name", ABSENT)
def test_a_segment_without_a_pixel_keeps_its_row_and_moves_no_box(case: Any, name: str) -> None:
    recorded = case(name)
    crayon = recorded.lookup()
    absent = {each["id"] for each in recorded.info} - set(recorded.map.unique().tolist())
    assert len(absent) == 1 and crayon.num_rows == len(recorded.info) + 1
    present = {i for i in recorded.map.unique().tolist() if i > 0}
    boxes = recorded.boxes_by_id(crayon)
    for each in absent:
        row = crayon.row_segment_id.tolist().index(each)
        assert crayon.row_area[row] == 0 and boxes.pop(each) == [0.0] * 4
    assert boxes == {i: recorded.true_boxes()[i] for i in present}


@pytest.mark.parametrize("name", UNLISTED)
def test_an_unlisted_id_is_unknown(case: Any, name: str) -> None:
    recorded = case(name)
    crayon = recorded.lookup()
    listed = {each["id"]: each["label_id"] + 1 for each in recorded.info}
    expected = [listed.get(i, 0) for i in recorded.map.flatten().tolist()]
    assert cells(crayon, crayon.row_class) == expected
    assert cells(crayon, crayon.row_number) == [int(each > 0) for each in expected]
    unknown = sum(i not in listed for i in recorded.map.flatten().tolist())
    assert int(crayon.row_area[0]) == unknown
    true = recorded.true_boxes()
    assert recorded.boxes_by_id(crayon) == {i: true[i] for i in listed}


@pytest.mark.parametrize("name", ABSENT_AND_UNLISTED)
def test_an_absent_and_an_unlisted_segment_do_not_swap_boxes(case: Any, name: str) -> None:
    recorded = case(name)
    true = recorded.true_boxes()
    expected = {each["id"]: true.get(each["id"], [0.0] * 4) for each in recorded.info}
    assert recorded.boxes_by_id(recorded.lookup()) == expected


@pytest.mark.parametrize("name", OVERFLOW)
def test_an_instance_after_the_last_number_has_number_zero(case: Any, name: str) -> None:
    recorded = case(name)
    crayon = recorded.lookup()
    assert int(recorded.numbers.max()) > 20
    expected = [n if n <= 20 else 0 for n in recorded.numbers.flatten().tolist()]
    assert cells(crayon, crayon.row_number) == expected
    assert cells(crayon, crayon.row_class) == recorded.classes.flatten().tolist()
    assert recorded.boxes_by_id(crayon) == recorded.true_boxes()


@pytest.mark.parametrize("name", OTHER_SIZE)
def test_boxes_are_fractions_of_the_map_whatever_its_size(case: Any, name: str) -> None:
    recorded = case(name)
    crayon = recorded.lookup()
    assert cells(crayon, crayon.row_class) == recorded.classes.flatten().tolist()
    assert cells(crayon, crayon.row_number) == recorded.numbers.flatten().tolist()
    assert recorded.boxes_by_id(crayon) == recorded.true_boxes()
    assert float(crayon.row_box.max()) <= 1


@pytest.mark.parametrize("name", EMPTY)
def test_a_map_without_a_segment_is_unknown_everywhere(case: Any, name: str) -> None:
    recorded = case(name)
    before = recorded.map.clone()
    crayon = recorded.lookup()
    assert set(crayon.row_index.flatten().tolist()) == {0}
    assert crayon.row_area.tolist() == [recorded.map.numel(), *[0] * len(recorded.info)]
    # The official code writes zeros over the caller's -1 here.
    assert torch.equal(recorded.map, before)


@pytest.mark.parametrize("name", LISTED_TWICE)
def test_an_id_listed_twice_is_refused(case: Any, name: str) -> None:
    with pytest.raises(ValueError, match=r"segment_ids\[0\].*id 1 more than once"):
        case(name).lookup()


@pytest.mark.parametrize("name", CLASS_OUT_OF_RANGE)
def test_a_class_out_of_range_is_refused(case: Any, name: str) -> None:
    with pytest.raises(ValueError, match=r"segment_classes\[0\].*got 133 for segment id 1"):
        case(name).lookup()
