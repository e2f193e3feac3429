"""Visual prompts: which pixels they cover, what they leave as it was, and what is refused."""

from __future__ import annotations

from fractions import Fraction
from itertools import pairwise
from math import floor

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from collavo.panoptic import (
    BoxPrompt,
    ClickPrompt,
    MaskPrompt,
    PanopticMap,
    ScribblePrompt,
    rasterize_prompts,
)
from collavo_kernels import panoptic_lookup

SETTINGS = settings(max_examples=80, derandomize=True, deadline=None)

# Multiples of 1/64 are exact in binary, and so is all that is made of them: the slow statement
# below computes with fractions and must agree on every pixel, those on an edge included.
DYADIC = st.integers(0, 64).map(lambda n: n / 64)
LENGTHS = st.integers(0, 48).map(lambda n: n / 64)
LABELS = st.sampled_from([None, "horse", "sky-other-merged", 0, 132])
SIZES = st.tuples(st.integers(1, 24), st.integers(1, 24))


@st.composite
def boxes(draw):
    x1, y1 = (draw(st.integers(0, 63)) for _ in range(2))
    x2, y2 = draw(st.integers(x1 + 1, 64)), draw(st.integers(y1 + 1, 64))
    return BoxPrompt(x1 / 64, y1 / 64, x2 / 64, y2 / 64, draw(LABELS))


@st.composite
def masks(draw):
    h, w = draw(st.tuples(st.integers(1, 30), st.integers(1, 30)))
    dots = draw(st.lists(st.tuples(st.integers(0, h - 1), st.integers(0, w - 1)), min_size=1))
    mask = torch.zeros(h, w, dtype=torch.bool)
    for row, column in dots:
        mask[row, column] = True
    return MaskPrompt(mask if draw(st.booleans()) else mask.numpy(), draw(LABELS))


CLICKS = st.builds(ClickPrompt, DYADIC, DYADIC, LENGTHS, LABELS)
SCRIBBLES = st.builds(
    ScribblePrompt, st.lists(st.tuples(DYADIC, DYADIC), min_size=1, max_size=4), LENGTHS, LABELS
)
PROMPTS = st.one_of(CLICKS, boxes(), SCRIBBLES, masks())


def under(fraction, length):
    return min(floor(Fraction(fraction) * length), length - 1)


def near_line(x, y, start, end, reach):
    """Whether a point is within ``reach`` of a line, by projecting it, in exact fractions."""
    (ax, ay), (bx, by) = start, end
    squared = (bx - ax) ** 2 + (by - ay) ** 2
    t = ((x - ax) * (bx - ax) + (y - ay) * (by - ay)) / squared if squared else Fraction(0)
    t = min(max(t, Fraction(0)), Fraction(1))
    return (x - ax - t * (bx - ax)) ** 2 + (y - ay - t * (by - ay)) ** 2 <= reach**2


def slow_cover(prompt, height, width):
    """The pixels of one prompt, by asking each of them; nothing is shared with the package."""
    pixels = [(r, c) for r in range(height) for c in range(width)]
    half, longer = Fraction(1, 2), max(height, width)
    if isinstance(prompt, MaskPrompt):
        h, w = prompt.mask.shape
        chosen = {
            (r, c) for r, c in pixels
            if prompt.mask[floor((r + half) / height * h), floor((c + half) / width * w)]
        }  # fmt: skip
        dots = [(i, j) for i in range(h) for j in range(w) if prompt.mask[i, j]]
        fine = {(under((i + half) / h, height), under((j + half) / w, width)) for i, j in dots}
        return chosen or fine
    if isinstance(prompt, BoxPrompt):

        def side(low, high, length):
            centres = range(length)
            inside = {c for c in centres if low <= Fraction(2 * c + 1, 2 * length) < high}
            return inside or {under((Fraction(low) + Fraction(high)) / 2, length)}

        rows = side(prompt.y1, prompt.y2, height)
        columns = side(prompt.x1, prompt.x2, width)
        return {(r, c) for r in rows for c in columns}
    if isinstance(prompt, ClickPrompt):
        points, reach = [(prompt.x, prompt.y)], Fraction(prompt.radius) * longer
    else:
        points, reach = prompt.points, max(Fraction(prompt.width) * longer / 2, half)
    on_map = [(Fraction(x) * width, Fraction(y) * height) for x, y in points]
    lines = list(pairwise(on_map) if on_map[1:] else [on_map * 2])
    inside = {
        (r, c) for r, c in pixels if any(near_line(c + half, r + half, *ab, reach) for ab in lines)
    }
    return inside | {(under(y, height), under(x, width)) for x, y in points}


@given(SIZES, st.lists(PROMPTS, min_size=1, max_size=4))
@settings(SETTINGS, max_examples=250)
def test_pixels_against_a_slow_statement(size, prompts):
    """Every shape, alone and under later ones: exact sets of pixels, the last prompt on top."""
    scene = rasterize_prompts(prompts, size=size)
    expected = torch.zeros(size, dtype=torch.int32)
    for number, prompt in enumerate(prompts, start=1):
        cover = slow_cover(prompt, *size)
        assert cover, "the statement itself must give every prompt a pixel"
        for row, column in cover:
            expected[row, column] = number
    assert scene.segmentation.dtype == torch.int32
    assert torch.equal(scene.segmentation, expected)
    assert scene.segment_ids.tolist() == list(range(1, len(prompts) + 1))


FRACTIONS = st.floats(0, 1)
PAIRS = st.tuples(FRACTIONS, FRACTIONS)
ANY = st.one_of(
    st.builds(ClickPrompt, FRACTIONS, FRACTIONS, st.floats(0, 2)),
    st.builds(ScribblePrompt, st.lists(PAIRS, min_size=1), st.floats(0, 2)),
    st.tuples(FRACTIONS, FRACTIONS, FRACTIONS, FRACTIONS)
    .filter(lambda b: b[0] < b[2] and b[1] < b[3])
    .map(lambda b: BoxPrompt(*b)),
    masks(),
)  # fmt: skip


@given(st.tuples(st.integers(1, 60), st.integers(1, 60)), ANY)
@SETTINGS
def test_every_prompt_covers_a_pixel(size, prompt):
    """However thin or small, and however few pixels there are: what was drawn does not vanish."""
    assert (rasterize_prompts([prompt], size=size).segmentation == 1).any()


@st.composite
def maps(draw):
    """Ids with gaps, some absent from the map and some not listed, in ids or in colours."""
    height, width = draw(SIZES)
    ids = draw(st.lists(st.integers(1, 3000), min_size=1, max_size=6, unique=True))
    listed = draw(st.lists(st.sampled_from(ids), unique=True))
    values = draw(
        st.lists(st.sampled_from([0, *ids]), min_size=height * width, max_size=height * width)
    )
    segmentation = torch.tensor(values, dtype=torch.int32).reshape(height, width)
    if draw(st.booleans()):
        channels = [segmentation & 255, segmentation >> 8 & 255, segmentation >> 16]
        segmentation = torch.stack(channels, dim=-1).to(torch.uint8)
    classes = draw(st.lists(st.integers(-1, 132), min_size=len(listed), max_size=len(listed)))
    return PanopticMap.from_segments(segmentation, listed, classes)


def rows_of(scene, grid=(3, 3)):
    crayon = panoptic_lookup(
        [scene.segmentation], [scene.segment_ids], [scene.segment_classes], grid=grid
    )
    names = ("row_class", "row_number", "row_segment_id", "row_area")
    return [
        dict(zip(names, row, strict=True))
        for row in zip(*(getattr(crayon, name).tolist() for name in names), strict=True)
    ]


@given(maps(), st.lists(PROMPTS, max_size=4))
@SETTINGS
def test_rows_and_numbers_of_the_map_stay(scene, prompts):
    before = scene.segmentation.clone()
    drawn = rasterize_prompts(prompts, scene)
    assert torch.equal(scene.segmentation, before), "the map below is not written to"
    old, new = rows_of(scene), rows_of(drawn)
    assert len(new) == len(old) + len(prompts)
    for one, other in zip(old, new, strict=False):
        assert {**one, "row_area": 0} == {**other, "row_area": 0}
        assert other["row_area"] <= one["row_area"]
    untouched = (drawn.segmentation == scene.ids()).sum()
    assert (
        untouched
        == drawn.segmentation.numel()
        - (
            drawn.segmentation
            > max([0, *scene.ids().unique().tolist(), *scene.segment_ids.tolist()])
        ).sum()
    ), "only pixels of prompts change, and no id of a prompt was there before"


def test_numbers_follow_the_instances_of_the_map():
    """A drawn horse is the next horse; segments of unknown class count among themselves."""
    ids = torch.tensor([[4, 4, 9, 9], [4, 4, 9, 12]], dtype=torch.int32)  # 12 is not listed
    scene = PanopticMap.from_segments(ids, [9, 4], [17, 17])
    prompts = [
        ClickPrompt(0, 0, radius=0, label="horse"),
        BoxPrompt(0.5, 0, 1, 0.5),
        MaskPrompt(torch.tensor([[False, False], [True, False]])),
    ]
    drawn = rasterize_prompts(prompts, scene)
    assert drawn.segmentation.tolist() == [[13, 4, 14, 14], [15, 15, 9, 12]]
    assert drawn.segment_ids.tolist() == [9, 4, 13, 14, 15]
    assert drawn.segment_classes.tolist() == [17, 17, 17, -1, -1]
    assert [(r["row_segment_id"], r["row_number"]) for r in rows_of(drawn)] == [
        (0, 0), (4, 1), (9, 2), (13, 3), (14, 1), (15, 2),
    ]  # fmt: skip


def test_what_is_covered_completely_keeps_its_row():
    """A segment below everything, and a prompt below a later one."""
    scene = PanopticMap.from_segments(torch.full((4, 4), 7, dtype=torch.int32), [7], [17])
    whole = BoxPrompt(0, 0, 1, 1, label="cow")
    rows = rows_of(rasterize_prompts([whole, whole], scene))
    assert [(r["row_segment_id"], r["row_number"], r["row_area"]) for r in rows] == [
        (0, 0, 0), (7, 1, 0), (8, 1, 0), (9, 2, 16),
    ]  # fmt: skip


def test_the_result_is_the_callers():
    scene = PanopticMap.empty(2, 2)
    drawn = rasterize_prompts([], scene)
    drawn.segmentation.fill_(5)
    assert scene.segmentation.eq(0).all() and drawn.num_segments == 0


def test_a_listed_id_that_covers_nothing_is_not_taken_again():
    scene = PanopticMap.from_segments(torch.zeros(1, 1, dtype=torch.int32), [50], [3])
    drawn = rasterize_prompts([ClickPrompt(0.5, 0.5)], scene)
    assert drawn.segment_ids.tolist() == [50, 51]


def test_ids_fit_into_int32():
    largest = PanopticMap.from_segments(torch.tensor([[2**31 - 2]]), [], [])
    assert rasterize_prompts([ClickPrompt(0, 0)], largest).segmentation.tolist() == [[2**31 - 1]]
    with pytest.raises(ValueError, match=r"prompts: 2 ids after the map's largest, 2147483646, do"):
        rasterize_prompts([ClickPrompt(0, 0)] * 2, largest)


POSITIONS = st.one_of(
    st.floats(0, 1),
    # Where cells meet is the worst place: no cell has more than a quarter of the disc.
    st.tuples(st.integers(0, 35), st.sampled_from([24, 35])).map(lambda p: min(p[0] / p[1], 1.0)),
)


@given(
    st.one_of(
        st.tuples(st.integers(1, 180), st.integers(1, 180)),
        st.sampled_from([(35, 35), (24, 24), (480, 640), (640, 427), (50, 51), (76, 76), (26, 26)]),
    ),
    st.sampled_from([(24, 24), (35, 35)]),
    POSITIONS,
    POSITIONS,
    st.booleans(),
    st.booleans(),
)
@settings(SETTINGS, max_examples=400)
def test_a_click_owns_a_cell_wherever_it_is(size, grid, x, y, on_a_segment, as_dot):
    """By default, in the middle of nothing or of one large segment, after the majority."""
    below = torch.full(size, 3 if on_a_segment else 0, dtype=torch.int32)
    click = ScribblePrompt([(x, y)]) if as_dot else ClickPrompt(x, y)
    drawn = rasterize_prompts([click], PanopticMap.from_segments(below, [3], [17]))
    crayon = panoptic_lookup(
        [drawn.segmentation], [drawn.segment_ids], [drawn.segment_classes], grid=grid
    )
    assert (crayon.row_index == 2).any()


def test_a_thin_scribble_has_no_gaps():
    """Narrower than a pixel, it is still a line: every column has pixels, next to the last's."""
    scene = rasterize_prompts([ScribblePrompt([(0, 0.1), (1, 0.8)], width=0.001)], size=(20, 30))
    rows = [scene.segmentation[:, c].nonzero().flatten().tolist() for c in range(30)]
    assert all(rows)
    assert all(min(b) - max(a) <= 1 for a, b in pairwise(rows))


def test_points_may_be_an_array_and_radii_enormous():
    points = np.array([[0.1, 0.2], [0.9, 0.7]], dtype=np.float32)
    stroke = rasterize_prompts([ScribblePrompt(points)], size=(9, 9)).segmentation
    same = rasterize_prompts([ScribblePrompt(points.tolist())], size=(9, 9)).segmentation
    assert torch.equal(stroke, same)
    everything = rasterize_prompts([ClickPrompt(0, 0, radius=1e308)], size=(9, 9)).segmentation
    assert everything.eq(1).all()


def test_prompts_go_through_the_processor(tiny_processor, scene):
    """The crayon's own road: rows, numbers and cells of what was drawn reach the model's inputs."""
    ids, classes = scene
    panoptic = PanopticMap.from_segments(ids, list(classes), list(classes.values()))
    drawn = rasterize_prompts(
        [BoxPrompt(0, 0, 0.25, 0.25, label="horse"), ClickPrompt(1, 1, radius=0.25)], panoptic
    )
    processor = tiny_processor()
    prompt = "USER: <image>\nIs there a horse ASSISTANT:"
    batch = processor(
        text=prompt, images=Image.new("RGB", (16, 12)), panoptic=drawn, return_tensors="pt"
    )
    # By ascending id: unknown, horses 12 and 256, person, sky, grass, the new horse, the click.
    assert batch["crayon_class"].tolist() == [[0, 18, 18, 1, 120, 126, 18, 0]]
    assert batch["crayon_number"].tolist() == [[0, 1, 2, 1, 1, 1, 3, 1]]
    assert int(batch["crayon_index"][0, 0]) == 6 and int(batch["crayon_index"][0, -1]) == 7
    text = processor.tokenizer.decode(batch["input_ids"][0])
    assert "(#3 horse) [0.00, 0.00, 0.25, 0.25]" in text
    alone = rasterize_prompts([BoxPrompt(0, 0, 0.5, 1, label="cow")], size=(12, 16))
    batch = processor(text=prompt, images=Image.new("RGB", (16, 12)), panoptic=alone)
    assert batch["crayon_class"] == [[0, 20]]


GOOD = BoxPrompt(0, 0, 1, 1)
SOME = torch.ones(2, 2, dtype=torch.bool)


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        (ClickPrompt(1.5, 0), r"\[1\]\.x: expected a fraction 0\.\.1 .*got 1\.5; divide pixels"),
        (ClickPrompt(320, 0), r"\[1\]\.x: expected a fraction 0\.\.1"),
        (ClickPrompt(0, float("nan")), r"\[1\]\.y: expected a fraction 0\.\.1 .*got nan"),
        (ClickPrompt("0", 0), r"\[1\]\.x: expected a fraction 0\.\.1 .*got '0'"),
        (ClickPrompt(0, True), r"\[1\]\.y: .*got True"),
        (ClickPrompt(0, 0, -0.1), r"\[1\]\.radius: expected a fraction of the longer .*-0\.1"),
        (ClickPrompt(0, 0, float("inf")), r"\[1\]\.radius: .*got inf"),
        (ClickPrompt(0, 0, float("nan")), r"\[1\]\.radius: .*got nan"),
        (ClickPrompt(0, 0, label="unicorn"), r"\[1\]\.label: expected a COCO .*got 'unicorn'"),
        (ClickPrompt(0, 0, label=133), r"\[1\]\.label: expected .*0\.\.132 or None, got 133"),
        (ClickPrompt(0, 0, label=-1), r"\[1\]\.label: .*got -1"),
        (ClickPrompt(0, 0, label=True), r"\[1\]\.label: .*got True"),
        (BoxPrompt(0, 0, -0.1, 1), r"\[1\]\.x2: expected a fraction 0\.\.1 .*got -0\.1"),
        (BoxPrompt(0, 2, 1, 1), r"\[1\]\.y1: expected a fraction 0\.\.1 .*got 2"),
        (BoxPrompt(0.5, 0, 0.5, 1), r"\[1\]\.x2: expected more than x1, 0\.5, got 0\.5"),
        (BoxPrompt(0, 0.9, 1, 0.2), r"\[1\]\.y2: expected more than y1, 0\.9, got 0\.2"),
        (ScribblePrompt([]), r"\[1\]\.points: expected at least one point, got none"),
        (ScribblePrompt([(0, 0), (0, 7)]), r"\[1\]\.points\[1\]: expected a fraction .*got 7"),
        (ScribblePrompt([(0, 0), (0, 1, 1)]), r"\[1\]\.points\[1\]: expected a pair \(x, y\)"),
        (ScribblePrompt([0.5, 0.5]), r"\[1\]\.points\[0\]: expected a pair \(x, y\), got 0\.5"),
        (ScribblePrompt([(0, 0)], -1), r"\[1\]\.width: expected a fraction of the longer side"),
        (MaskPrompt(~SOME), r"\[1\]\.mask: expected at least one pixel that is set, got none"),
        (MaskPrompt(SOME[:0]), r"\[1\]\.mask: expected at least one pixel that is set, got none"),
        (MaskPrompt(SOME[0]), r"\[1\]\.mask: expected bool \[h, w\], got \[2\]"),
    ],
)  # fmt: skip
def test_bad_values_are_named(prompt, message):
    with pytest.raises(ValueError, match=r"^prompts" + message):
        rasterize_prompts([GOOD, prompt], size=(4, 4))


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        (
            [MaskPrompt(SOME.int())],
            r"^prompts\[0\]\.mask: expected bool .*, got torch\.int32",
        ),
        ([MaskPrompt([[True]])], r"^prompts\[0\]\.mask: expected a tensor or an array, got list"),
        ([ScribblePrompt(3)], r"^prompts\[0\]\.points: expected pairs \(x, y\), got int"),
        ([(0, 0, 1, 1)], r"^prompts\[0\]: expected a prompt, such as a BoxPrompt, got tuple"),
        (GOOD, r"^prompts: expected a list of prompts, got BoxPrompt"),
        (None, r"^prompts: expected a list of prompts, got NoneType"),
    ],
)
def test_wrong_kinds_are_named(prompts, message):
    with pytest.raises(TypeError, match=message):
        rasterize_prompts(prompts, size=(4, 4))


def test_map_or_size():
    scene = PanopticMap.empty(2, 3)
    with pytest.raises(ValueError, match=r"panoptic, size: expected exactly one .*, got none"):
        rasterize_prompts([GOOD])
    with pytest.raises(ValueError, match=r"panoptic, size: expected exactly one .*, got both"):
        rasterize_prompts([GOOD], scene, size=(2, 3))
    with pytest.raises(TypeError, match="panoptic: expected a PanopticMap, got Tensor"):
        rasterize_prompts([GOOD], scene.segmentation)
    for size in ((0, 4), (4,), (4, -1), 4, (4.0, 4), (4, 4, 3)):
        with pytest.raises(ValueError, match="size: expected a positive height and width, got"):
            rasterize_prompts([GOOD], size=size)
    assert rasterize_prompts([GOOD], size=(2, 3)).size == (2, 3)
