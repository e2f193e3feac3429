"""Marks are the same on pixels and as vectors, and words lie where they belong."""

from __future__ import annotations

import base64
import io
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from collavo.panoptic import PanopticMap
from collavo.pictures.canvas import (
    Canvas,
    PixelCanvas,
    VectorCanvas,
    line_height,
    shorten,
    text_width,
)
from collavo.pictures.crayon_grid import draw_grid
from collavo.pictures.labels import regions, roomy_block, touches
from collavo.pictures.scene import SceneRows
from collavo.pictures.views import draw_boxes, draw_legend, draw_overlay

SVG = "{http://www.w3.org/2000/svg}"


class Notes(Canvas):
    """A canvas that only takes notes of plates and texts."""

    def __init__(self, size):
        super().__init__(size)
        self.plates, self.written = [], []

    def paste(self, corner, other):
        raise NotImplementedError

    def picture(self, corner, image):
        pass

    def area(self, boxes, fill):
        for left, top, right, bottom in boxes:
            assert min(left, top) >= 0 and right <= self.size[0] and bottom <= self.size[1]

    def rounded(self, box, fill, outline, radius):
        pass

    def line(self, start, stop, colour, width):
        pass

    def text(self, point, text, size, *, ink=None, side="left"):
        assert size >= 7
        wide = text_width(text, size)
        left = point[0] - {"left": 0, "middle": wide / 2, "right": wide}[side]
        box = (left, point[1] - size / 2, left + wide, point[1] + size / 2)
        self.written.append((text, box))

    def label(self, box, lines, fill, size):
        high = line_height(size) * len(lines)
        assert max(text_width(line, size) for line in lines) <= box[2] - box[0] - 6
        assert high <= box[3] - box[1]
        self.plates.append((tuple(lines), box))


def scene_of(ids, classes, grid, max_number=20):
    panoptic = PanopticMap.from_segments(ids, range(1, len(classes) + 1), classes)
    return SceneRows.of(panoptic, grid, max_number)


def patches(height, width, count, seed=0):
    """Cut a map into patches around random points."""
    points = np.random.default_rng(seed).random((count, 2)) * [height, width]
    y, x = np.mgrid[:height, :width]
    distance = (y[..., None] - points[:, 0]) ** 2 + (x[..., None] - points[:, 1]) ** 2
    return torch.from_numpy(distance.argmin(axis=-1).astype(np.int32) + 1)


CLASSES = [0, 17, 119, 9, 38, 58]  # traffic light and baseball glove have long names


@pytest.mark.parametrize("count", [1, 6, 60, 400])
@pytest.mark.parametrize("size", [(760, 507), (95, 760), (760, 60), (240, 240)])
@pytest.mark.parametrize("draw", [draw_overlay, draw_boxes])
def test_labels_lie_apart_and_on_the_sheet(draw, size, count):
    """However many there are: nobody can read one label through another, or half of one."""
    ids = patches(size[1] // 4 + 1, size[0] // 4 + 1, count)
    scene = scene_of(ids, [CLASSES[i % 6] for i in range(count)], (35, 35))
    notes = draw(Notes, Image.new("RGB", size), scene)
    boxes = [box for _, box in notes.plates]
    for i, box in enumerate(boxes):
        assert min(box) >= 0 and box[2] <= notes.size[0] and box[3] <= notes.size[1]
        assert not any(touches(box, other) for other in boxes[:i])
    names = {scene.label(row) for row in scene.rows} | {str(row) for row in scene.rows}
    assert {lines[0] for lines, _ in notes.plates} <= names
    if count <= 6:
        assert len(boxes) == count


@pytest.mark.parametrize("count", [1, 9, 60, 300])
@pytest.mark.parametrize("size", [(760, 760), (760, 507), (95, 760), (240, 240), (1600, 1068)])
def test_every_region_of_a_35x35_grid_has_words_of_its_own(size, count):
    """Each carries its label or its row number, wholly within the region and readable."""
    ids = patches(70, 70, count)
    ids[:10, :10] = 0
    scene = scene_of(ids, [CLASSES[i % 6] for i in range(count)], (35, 35))
    notes = draw_grid(Notes, size, scene)
    cell = np.asarray(notes.size) / 35
    words = [(" ".join(lines), box) for lines, box in notes.plates] + notes.written
    for row, corner, mask in regions(scene.cell_rows):
        inside = np.zeros((35, 35), dtype=bool)
        inside[corner[0] : corner[0] + mask.shape[0], corner[1] : corner[1] + mask.shape[1]] = mask
        own = []
        for text, (left, top, right, bottom) in words:
            x = slice(int((left + 1) / cell[0]), int((right - 1) / cell[0]) + 1)
            y = slice(int((top + 2) / cell[1]), int((bottom - 2) / cell[1]) + 1)
            if inside[y, x].any():
                assert inside[y, x].all(), f"{text!r} leaves its region"
                own.append(text)
        assert own and set(own) <= {scene.label(row), str(row)}


def test_a_grid_prefers_labels_to_numbers():
    """A roomy region has its label in one line, a tall one in two, a single cell its row number."""
    ids = torch.ones(35, 35, dtype=torch.int32)
    ids[5:20, 10:12] = 2
    ids[30, 30] = 3
    notes = draw_grid(Notes, (760, 760), scene_of(ids, [119, 17, 0], (35, 35)))
    assert [lines for lines, _ in notes.plates] == [("#1 sky",), ("#1", "horse")]
    assert [text for text, _ in notes.written] == ["3"]


def test_numbers_beyond_the_largest_are_told_apart_by_their_rows():
    """With at most two numbers, persons three to six are all #0; their row numbers still differ."""
    ids = torch.arange(1, 7, dtype=torch.int32).repeat_interleave(12).reshape(6, 12)
    scene = scene_of(ids, [0] * 6, (6, 12), max_number=2)
    labels = [scene.label(row) for row in scene.rows]
    assert labels == ["#1 person", "#2 person", *["#0 person"] * 4]
    legend = [text for text, _ in draw_legend(Notes, scene, 2).written]
    assert all(str(row) in legend for row in range(7)) and legend.count("#0 person") == 4
    assert all(scene.colours[row] != scene.colours[row + 1] for row in range(1, 6))


def test_a_legend_says_what_is_missing():
    """Rows beyond the longest legend, rows without a cell, and segments without a pixel."""
    ids = torch.zeros(20, 20, dtype=torch.int32)
    ids[0, 0] = 1
    scene = scene_of(ids, [0] * 200, (2, 2))
    written = [text for text, _ in draw_legend(Notes, scene, 3).written]
    assert "and 51 more rows; grey: no cell of the grid carries this row" in written
    assert written.count("not in the map") == 148


@settings(derandomize=True, deadline=None, max_examples=60)
@given(st.integers(1, 9), st.integers(1, 9), st.data())
def test_regions_cover_the_grid_once(height, width, data):
    """Every cell is in one region of its row, and no two regions of a row touch."""
    values = st.lists(st.integers(0, 2), min_size=height * width, max_size=height * width)
    cells = np.asarray(data.draw(values), dtype=np.int32).reshape(height, width)
    owner = np.full(cells.shape, -1)
    for number, (row, (top, left), mask) in enumerate(regions(cells)):
        view = owner[top : top + mask.shape[0], left : left + mask.shape[1]]
        assert (view[mask] == -1).all()
        view[mask] = number
        assert (cells[owner == number] == row).all()
        assert mask.any(axis=0).all() and mask.any(axis=1).all()
        block = data.draw(st.tuples(st.integers(1, 3), st.integers(1, 3)))
        at = roomy_block(mask, block)
        fits = [
            mask[y : y + block[0], x : x + block[1]].all()
            for y in range(mask.shape[0] - block[0] + 1)
            for x in range(mask.shape[1] - block[1] + 1)
        ]
        assert (at is not None) == any(fits)
        if at is not None:
            assert mask[at[0] : at[0] + block[0], at[1] : at[1] + block[1]].all()
    assert (owner >= 0).all()
    for one, two, rows in (
        (owner[1:], owner[:-1], cells[1:] == cells[:-1]),
        (owner[:, 1:], owner[:, :-1], cells[:, 1:] == cells[:, :-1]),
    ):
        assert ((one == two) == rows).all()


def test_areas_are_the_same_boxes_on_both_canvases():
    """Empty and inverted boxes leave no mark on either."""
    boxes = [(1, 2, 4, 3), (5, 5, 5, 9), (7, 3, 6, 9), (0, 9, 10, 10)]
    pixels, vectors = PixelCanvas((10, 10)), VectorCanvas((10, 10))
    for canvas in (pixels, vectors):
        canvas.area(boxes, (255, 0, 0))
    red = np.asarray(pixels.image)[..., 1] == 0
    assert red.sum() == 3 + 10 and red[2, 1:4].all() and red[9].all()
    assert 'd="M1 2h3v1h-3zM0 9h10v1h-10z" fill="#ff0000"' in vectors.source()
    vectors.area([(3, 3, 3, 3)], (0, 0, 0))
    assert vectors.source().count("<path") == 1


@pytest.mark.parametrize(("mode", "kind"), [("flat", "png"), ("noise", "jpeg"), ("LA", "png")])
def test_pictures_are_embedded_in_the_smaller_way(mode, kind):
    """Flat colours and transparency stay exact, photos become small."""
    image = Image.effect_noise((64, 48), 90).convert("RGB")
    if mode != "noise":
        image = Image.new("LA", (64, 48), (7, 9)) if mode == "LA" else Image.new("RGB", (64, 48))
    canvas = VectorCanvas((70, 70))
    canvas.picture((3, 4), image)
    element = ElementTree.fromstring(canvas.source()).find(f"{SVG}image")
    assert element is not None
    assert [element.get(key) for key in ("x", "y", "width", "height")] == ["3", "4", "64", "48"]
    head, _, data = element.get("href").partition(",")
    assert head == f"data:image/{kind};base64"
    embedded = Image.open(io.BytesIO(base64.b64decode(data)))
    assert embedded.size == (64, 48)
    if kind == "png":
        assert embedded.mode == image.mode and embedded.tobytes() == image.tobytes()


def test_pasted_canvases_are_moved():
    pixels, part = PixelCanvas((9, 9)), PixelCanvas((2, 2))
    part.area([(0, 0, 2, 2)], (0, 0, 0))
    pixels.paste((3, 5), part)
    black = np.argwhere(np.asarray(pixels.image)[..., 0] == 0).tolist()
    assert black == [[5, 3], [5, 4], [6, 3], [6, 4]]
    vectors, piece = VectorCanvas((9, 9)), VectorCanvas((2, 2))
    piece.area([(0, 0, 2, 2)], (0, 0, 0))
    vectors.paste((3, 5), piece)
    group = ElementTree.fromstring(vectors.source()).find(f"{SVG}g")
    assert group.get("transform") == "translate(3 5)" and len(group) == 1


@pytest.mark.parametrize("width", [0, 10, 40, 100, 1000])
def test_long_titles_lose_their_middle(width):
    text = "a folder/with a very long name indeed.jpg"
    short = shorten(text, 13, width)
    assert text_width(short, 13) <= width or short == "..."
    if short not in (text, "..."):
        start, end = short.split("...")
        assert text.startswith(start) and text.endswith(end)
    assert (short == text) == (text_width(text, 13) <= width)
