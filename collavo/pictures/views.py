"""The views of a scene in a picture: its segments, its boxes and a legend of its rows."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from PIL import Image

from collavo.panoptic.text import format_box
from collavo.pictures.canvas import (
    BLACK,
    INK,
    PAPER,
    SOFT,
    AnyCanvas,
    Canvas,
    NewCanvas,
    Point,
    line_height,
    text_width,
)
from collavo.pictures.labels import Rectangle, inner_points, place
from collavo.pictures.palette import Colour
from collavo.pictures.scene import SceneRows, enlarge

Anchors = list[tuple[float, float] | None]

_FONT = 13
_LINE = 20
# Labels stand beside a picture that is narrower or flatter than this, not over it.
_NARROW, _FLAT = 260, 120
_BESIDE, _BELOW = 170, 90
# Labels may hide this part of a picture; what is above it gets its row number for a label.
_HIDDEN = 0.22
# Beyond this many, labels and legend lines hide more than they tell.
_MOST = 150


def draw_overlay(new: NewCanvas[AnyCanvas], photo: Image.Image, scene: SceneRows) -> AnyCanvas:
    """Draw every segment in its colour over the image, with its border and its label.

    Args:
        new: Makes a canvas of a size.
        photo: The image at the size in which it is to be drawn, RGB.
        scene: Its rows.
    """
    rows = enlarge(scene.pixel_rows, photo.size)
    colours = scene.colour_table()
    # Grey under the tint, so that what is seen is the segment's colour and not the photo's.
    grey = np.asarray(photo.convert("L")).astype(np.float32)[..., None]
    own = np.asarray(photo).astype(np.float32)
    tinted = 0.55 * colours[rows] + 0.3 * grey + 0.15 * own
    canvas = new(_sheet_size(photo.size, scene))
    canvas.picture((0, 0), Image.fromarray(tinted.astype(np.uint8)))
    canvas.picture((0, 0), _edges(rows))
    points = inner_points(scene.pixel_rows, len(scene.classes))
    anchors: Anchors = [
        None if point is None else (point[0] * photo.width, point[1] * photo.height)
        for point in points
    ]
    _draw_labels(canvas, photo.size, scene, anchors)
    return canvas


def _edges(rows: np.ndarray[tuple[int, ...], np.dtype[np.int32]]) -> Image.Image:
    """Draw the borders between rows: black, with white on both sides."""
    edges = np.zeros(rows.shape, dtype=bool)
    edges[:, 1:] |= rows[:, 1:] != rows[:, :-1]
    edges[1:] |= rows[1:] != rows[:-1]
    around = edges.copy()
    for axis in (0, 1):
        for step in (1, -1):
            shifted = np.roll(edges, step, axis=axis)
            # What leaves the picture on one side does not come in on the other.
            np.moveaxis(shifted, axis, 0)[0 if step > 0 else -1] = False
            around |= shifted
    light = np.where(edges, 0, 255).astype(np.uint8)
    alpha = np.where(edges, 255, np.where(around, 200, 0)).astype(np.uint8)
    return Image.fromarray(np.stack((light, alpha), axis=-1))


def draw_boxes(new: NewCanvas[AnyCanvas], photo: Image.Image, scene: SceneRows) -> AnyCanvas:
    """Draw every segment's box over the paled image, with the label that the text has.

    Args:
        new: Makes a canvas of a size.
        photo: The image at the size in which it is to be drawn, RGB.
        scene: Its rows.
    """
    canvas = new(_sheet_size(photo.size, scene))
    canvas.picture((0, 0), Image.blend(photo, Image.new("RGB", photo.size, PAPER), 0.45))
    anchors: Anchors = [None] * len(scene.classes)
    # Large boxes first, so that small ones lie over them.
    for row in sorted(scene.rows, key=lambda row: -_box_area(scene.boxes[row])):
        if not scene.is_there(row):
            continue
        x1, y1, x2, y2 = scene.boxes[row]
        corners = (x1 * photo.width, y1 * photo.height, x2 * photo.width, y2 * photo.height)
        _frame(canvas, photo.size, corners, scene.colours[row], dashed=scene.is_stuff(row))
        half = (text_width(scene.label(row), _FONT) / 2 + 5, line_height(_FONT) / 2 + 3)
        anchors[row] = (
            min(corners[0] + half[0], photo.width - 4.0),
            min(corners[1] + half[1], photo.height - 4.0),
        )
    _draw_labels(canvas, photo.size, scene, anchors)
    return canvas


def _box_area(box: Rectangle) -> float:
    return (box[2] - box[0]) * (box[3] - box[1])


def _frame(
    canvas: Canvas, size: tuple[int, int], box: Rectangle, colour: Colour, *, dashed: bool
) -> None:
    """Draw a box's four sides: three pixels of its colour between two black ones."""
    left, top = (max(0, round(value)) for value in box[:2])
    right, bottom = max(left + 5, round(box[2])), max(top + 5, round(box[3]))
    right, bottom = min(right, size[0]), min(bottom, size[1])
    for inset, width, fill in ((0, 5, BLACK), (1, 3, colour)):
        x1, y1, x2, y2 = left + inset, top + inset, right - inset, bottom - inset
        sides = []
        for a, b in _spans(x1, x2, inset, dashed=dashed):
            sides += [(a, y1, b, min(y1 + width, y2)), (a, max(y2 - width, y1), b, y2)]
        for a, b in _spans(y1, y2, inset, dashed=dashed):
            sides += [(x1, a, min(x1 + width, x2), b), (max(x2 - width, x1), a, x2, b)]
        canvas.area(sides, fill)


def _spans(low: int, high: int, inset: int, *, dashed: bool) -> list[tuple[int, int]]:
    """Cut a side into dashes of 12 pixels with gaps of 8, the last one at its end."""
    if not dashed:
        return [(low, high)]
    shorter = 2 * inset  # the colour's dashes lie within the black ones
    starts = range(low, high, 20)
    return [(at, min(at + 12 - shorter, high)) for at in starts]


def _sheet_size(size: tuple[int, int], scene: SceneRows) -> tuple[int, int]:
    """Add room for labels beside a picture that is too small to carry them."""
    if not scene.rows:
        return size
    return (
        size[0] + _BESIDE if size[0] < _NARROW else size[0],
        size[1] + _BELOW if size[1] < _FLAT else size[1],
    )


def _draw_labels(canvas: Canvas, size: tuple[int, int], scene: SceneRows, anchors: Anchors) -> None:
    """Write the rows' labels near their anchors, with a line to it where one had to move.

    A label never lies over another: where there is no room for it, the row number stands for it,
    and where there is none for that either, nothing.
    """
    beside, below = canvas.size[0] > size[0], canvas.size[1] > size[1]
    bounds = (
        size[0] + 8.0 if beside else 2.0,
        size[1] + 8.0 if below and not beside else 2.0,
        canvas.size[0] - 2.0,
        canvas.size[1] - 2.0,
    )
    largest = sorted(scene.rows, key=lambda row: -scene.shares[row])
    points = {row: point for row in largest[:_MOST] if (point := anchors[row]) is not None}
    # Small segments first: large ones have room elsewhere. In a margin, as they lie.
    order = sorted(points, key=lambda row: points[row][1 if beside else 0])
    if not beside and not below:
        order = list(reversed(points))
    full = _with_full_labels(scene, points, _box_area(bounds), 1 if beside or below else _HIDDEN)
    taken: list[Rectangle] = []
    placed: list[tuple[int, str, Point, Rectangle]] = []
    for row in order:
        texts = [(str(row), 3)] if row not in full else [(scene.label(row), 6), (str(row), 3)]
        for text, reach in texts:
            area = (text_width(text, _FONT) + 9, line_height(_FONT) + 5)
            where = place(points[row], area, bounds, taken, 24 if beside or below else reach)
            if where is not None:
                taken.append(where)
                placed.append((row, text, points[row], where))
                break
    for row, _, anchor, where in placed:
        if not (where[0] <= anchor[0] <= where[2] and where[1] <= anchor[1] <= where[3]):
            _pointer(canvas, where, anchor, scene.colours[row])
    for row, text, _, where in placed:
        canvas.label(where, (text,), scene.colours[row], _FONT)


def _with_full_labels(
    scene: SceneRows, rows: Iterable[int], area: float, hidden: float
) -> set[int]:
    """Choose the rows that get their label, largest first, until labels fill a part of an area."""
    full: set[int] = set()
    left = hidden * area
    for row in rows:
        left -= (text_width(scene.label(row), _FONT) + 9) * (line_height(_FONT) + 5)
        if left < 0:
            break
        full.add(row)
    return full


def _pointer(canvas: Canvas, label: Rectangle, anchor: Point, colour: Colour) -> None:
    middle = ((label[0] + label[2]) / 2, (label[1] + label[3]) / 2)
    canvas.line(middle, anchor, BLACK, 3)
    canvas.line(middle, anchor, PAPER, 1)
    spot = (anchor[0] - 4, anchor[1] - 4, anchor[0] + 4, anchor[1] + 4)
    canvas.rounded(spot, colour, BLACK, 4)


def draw_legend(new: NewCanvas[AnyCanvas], scene: SceneRows, columns: int) -> AnyCanvas:
    """Write one line per row: number, colour, label, box, share of the pixels, cells.

    Args:
        new: Makes a canvas of a size.
        scene: The rows.
        columns: How many columns of lines stand side by side.
    """
    counts = np.bincount(scene.cell_rows.reshape(-1), minlength=len(scene.classes)).tolist()
    shown = min(len(scene.classes), _MOST)
    names = max(text_width(scene.label(row), _FONT) for row in range(shown))
    boxes = 76 + round(names) + 18
    stops = (28, 40, 76, boxes, boxes + 210, boxes + 256)
    width, lines = stops[-1] + 4, -(-shown // columns)
    notes = _notes(scene, counts, shown)
    canvas = new((columns * width + (columns - 1) * 36, (lines + 1 + bool(notes)) * _LINE + 4))
    for column in range(columns):
        x = column * (width + 36)
        heads = ("row", "", "label", "box x1, y1, x2, y2", "pixels", "cells")
        _legend_line(canvas, x, 0, stops, heads, SOFT)
        for line, row in enumerate(range(shown)[column * lines : (column + 1) * lines], start=1):
            box = scene.boxes[row]
            there = format_box(box) if scene.is_there(row) and row else ""
            text = there or ("not in the map" if row else "")
            share = f"{scene.shares[row]:.1%}"
            values = (str(row), "", scene.label(row), text, share, str(counts[row]))
            _legend_line(canvas, x, line, stops, values, INK if counts[row] else SOFT)
            chip = (x + stops[1], line * _LINE + 3, x + stops[1] + 26, line * _LINE + 18)
            canvas.rounded(chip, scene.colours[row], BLACK, 2)
    canvas.text((stops[1], (lines + 1) * _LINE + 10), notes, _FONT, ink=SOFT)
    return canvas


def _notes(scene: SceneRows, counts: list[int], shown: int) -> str:
    notes = []
    if len(scene.classes) > shown:
        notes.append(f"and {len(scene.classes) - shown} more rows")
    if not all(counts[1:]):
        notes.append("grey: no cell of the grid carries this row")
    return "; ".join(notes)


def _legend_line(
    canvas: Canvas,
    left: int,
    line: int,
    stops: tuple[int, ...],
    values: tuple[str, ...],
    ink: Colour,
) -> None:
    for stop, value, side in zip(stops, values, "rlllrr", strict=True):
        canvas.text(
            (left + stop, line * _LINE + 10),
            value,
            _FONT,
            ink=ink,
            side="left" if side == "l" else "right",
        )
