"""Objects as text and back: a strict grammar, checked on what is drawn at random."""

from __future__ import annotations

import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from collavo.panoptic import (
    DISPLAY_NAMES,
    TEMPLATES,
    Detection,
    PanopticMap,
    build_instruction,
    detections_from_crayon,
    detections_from_map,
    format_names,
    format_objects,
    object_prefix,
    parse_names,
    parse_objects,
    split_prefix,
)
from collavo_kernels import panoptic_lookup

HUNDREDTHS = st.integers(0, 100)


@st.composite
def detections(draw):
    x1, x2 = sorted((draw(HUNDREDTHS), draw(HUNDREDTHS)))
    y1, y2 = sorted((draw(HUNDREDTHS), draw(HUNDREDTHS)))
    box = (x1 / 100, y1 / 100, x2 / 100, y2 / 100)
    return Detection(draw(st.sampled_from(DISPLAY_NAMES)), draw(st.integers(0, 99)), box)


@given(st.lists(detections(), max_size=6))
@settings(max_examples=150, deadline=None)
def test_round_trip(objects):
    assert parse_objects(format_objects(objects)) == objects
    assert parse_names(format_names(objects)) == [(one.name, one.number) for one in objects]
    assert split_prefix(object_prefix(objects) + "Why? [a]. b") == (objects, "Why? [a]. b")


@given(st.text(alphabet="(#1 horse) [0.25,]d\n9", max_size=40) | st.text(max_size=20))
@settings(max_examples=300, deadline=None)
def test_what_is_accepted_is_what_would_be_written(text):
    """Strict: every accepted text is one that the formatter itself writes."""
    try:
        objects = parse_objects(text)
    except ValueError:
        return
    assert format_objects(objects) == text


@given(st.floats(0, 1), st.floats(0, 1), st.floats(0, 1), st.floats(0, 1))
@settings(max_examples=100, deadline=None)
def test_any_box_is_written_readably(a, b, c, d):
    (x1, x2), (y1, y2) = sorted((a, b)), sorted((c, d))
    (again,) = parse_objects(str(Detection("cow", 1, (x1, y1, x2, y2))))
    for value, written in zip((x1, y1, x2, y2), again.box, strict=True):
        assert abs(value - written) <= 0.005 + 1e-12


@pytest.mark.parametrize(
    "text",
    [
        "(#1 horse) [0.06, 0.38, 0.27, 0.91].",
        "(#1 horse) [0.06, 0.38, 0.27, 0.91], ",
        "(#1 horse) [0.06, 0.38, 0.27]",
        "(#1 horse) [0.06, 0.38, 0.27, 1.01]",
        "(#1 horse) [0.06, 0.38, 0.27, 0.911]",
        "(#01 horse) [0.06, 0.38, 0.27, 0.91]",
        "(#1  horse) [0.06, 0.38, 0.27, 0.91]",
        "(#1 horse) [0.30, 0.38, 0.27, 0.91]",
        "(#\u0661 horse) [0.06, 0.38, 0.27, 0.91]",
        "(#1 __import__('os')) [0.06, 0.38, 0.27, 0.91]",
        "#1 horse",
        " ",
    ],
)
def test_refused(text):
    with pytest.raises(ValueError):
        parse_objects(text)


def test_message_names_the_position():
    with pytest.raises(ValueError, match="at character 37, got 'cow'"):
        parse_objects("(#1 horse) [0.06, 0.38, 0.27, 0.91], cow")
    with pytest.raises(ValueError, match="expected 'The image includes '"):
        split_prefix("What is it?")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"name": "a, b"}, "name"),
        ({"name": ""}, "name"),
        ({"number": -1}, "number"),
        ({"box": (0.0, 0.0, 1.2, 1.0)}, "box"),
        ({"box": (float("nan"), 0.0, 1.0, 1.0)}, "box"),
    ],
)
def test_detections_that_could_not_be_read_back(change, message):
    with pytest.raises(ValueError, match=message):
        Detection(**{"name": "horse", "number": 1, "box": (0.0, 0.0, 1.0, 1.0), **change})


def test_numbers_and_boxes_are_the_tables_own(scene):
    """Segment order is by id; an absent segment keeps its number; unknown class is not listed."""
    ids, classes = scene
    listed = {**classes, 5: 17, 400: -1}  # 5: a horse before the others that covers nothing
    ids = torch.where(ids == 300, 400, ids)
    panoptic = PanopticMap.from_segments(ids, list(listed), list(listed.values()))
    crayon = panoptic_lookup(
        [ids] * 2, [panoptic.segment_ids] * 2, [panoptic.segment_classes] * 2, grid=(3, 4)
    )
    for image in (0, 1):
        assert [(one.number, one.name) for one in detections_from_crayon(crayon, image)] == [
            (2, "horse"), (3, "horse"), (1, "sky"), (1, "grass"),
        ]  # fmt: skip
    assert detections_from_map(panoptic) == detections_from_crayon(crayon)
    with pytest.raises(ValueError, match=r"image: expected 0\.\.1, got 2"):
        detections_from_crayon(crayon, 2)


OBJECTS = [
    Detection("horse", 1, (0.06, 0.38, 0.27, 0.91)),
    Detection("sky", 1, (0.0, 0.0, 1.0, 0.5)),
    Detection("horse", 2, (0.5, 0.4, 0.6, 0.9)),
]


def test_the_three_templates():
    """Questions and the answer's start are the paper's, letter by letter."""
    names = build_instruction(OBJECTS, "names")
    assert (
        names.question == "Provide multiple object names with their numbering index in the image."
    )
    assert names.answer == "Sure, it is #1 horse, #1 sky, #2 horse"
    boxes = build_instruction(OBJECTS, "boxes")
    assert boxes.question == (
        "Provide multiple object names with their numbering index and the objects' bounding box "
        "coordinates in this image."
    )
    assert boxes.answer == (
        "Sure, it is (#1 horse) [0.06, 0.38, 0.27, 0.91], (#1 sky) [0.00, 0.00, 1.00, 0.50], "
        "(#2 horse) [0.50, 0.40, 0.60, 0.90]"
    )
    one = build_instruction(OBJECTS, "class", select_class="horse")
    assert one.question == "Provide multiple bounding box coordinates for horse in the image."
    assert one.answer == (
        "Sure, it is (#1 horse) [0.06, 0.38, 0.27, 0.91], (#2 horse) [0.50, 0.40, 0.60, 0.90]"
    )
    assert [turn["role"] for turn in one.conversation()] == ["user", "assistant"]


def test_draws_come_from_the_given_generator():
    drawn = [build_instruction(OBJECTS, rng=random.Random(seed)) for seed in range(40)]
    assert drawn == [build_instruction(OBJECTS, rng=random.Random(seed)) for seed in range(40)]
    assert {one.template for one in drawn} == set(TEMPLATES)
    classes = {one.question.split(" ")[6] for one in drawn if one.template == "class"}
    assert classes == {"horse", "sky"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([], "names"), "detections: expected at least one"),
        ((OBJECTS, "colours"), "template: expected one of names, boxes, class"),
        ((OBJECTS,), "rng: expected a random.Random, because template"),
        ((OBJECTS, "class"), "rng: expected a random.Random, because select_class"),
    ],
)
def test_instructions_that_cannot_be_made(arguments, message):
    with pytest.raises(ValueError, match=message):
        build_instruction(*arguments)


def test_class_that_is_not_there():
    with pytest.raises(ValueError, match="select_class: expected one of horse, sky, got 'cow'"):
        build_instruction(OBJECTS, "class", select_class="cow")


def test_numbers_are_written_only_if_they_are_read_back():
    one = Detection("horse", 10**9 - 1, (0, 0, 1, 1))
    assert parse_objects(str(one)) == [one]
    with pytest.raises(ValueError, match=r"number: expected below 10\*\*9, got 1000000000"):
        Detection("horse", 10**9, (0, 0, 1, 1))
