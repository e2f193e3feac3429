"""One picture of what the model is told: segments, numbered boxes, crayon grid and legend."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFont

from collavo.panoptic.categories import NUM_THINGS, display_name
from collavo.panoptic.labels import Rectangle, inner_points, place, touches
from collavo.panoptic.maps import PanopticMap
from collavo.panoptic.palette import ink_on, row_colours
from collavo.panoptic.text import format_box
from collavo_kernels import panoptic_lookup

_PAPER = (255, 255, 255)
_INK = (30, 30, 30)
_SOFT = (110, 110, 110)
_MARGIN = 20
_TITLE = 26
_LINE = 20
# Beyond this many, labels and legend lines hide more than they tell.
_MOST_LABELS = 60

Pixels = npt.NDArray[np.uint8]
Rows = npt.NDArray[np.int32]


@dataclass(frozen=True)
class _Scene:
    """A map's rows, ready to be drawn."""

    pixel_rows: Rows
    cell_rows: Rows
    classes: list[int]
    numbers: list[int]
    boxes: list[tuple[float, ...]]
    shares: list[float]
    colours: Pixels

    def label(self, row: int) -> str:
        if self.classes[row] <= 0:
            return "unknown" if not self.numbers[row] else f"#{self.numbers[row]} unknown"
        return f"#{self.numbers[row]} {display_name(self.classes[row] - 1)}"

    def is_stuff(self, row: int) -> bool:
        return self.classes[row] > NUM_THINGS

    @property
    def rows(self) -> range:
        """All rows but the unknown one."""
        return range(1, len(self.classes))


def draw_scene(
    image: Image.Image,
    panoptic: PanopticMap,
    *,
    grid: tuple[int, int] = (24, 24),
    max_number: int = 20,
    panel: int = 760,
    title: str = "",
) -> Image.Image:
    """Draw an image's segments, numbered boxes, crayon grid and a legend into one picture.

    A row's number in the crayon grid is its number in the legend; labels and boxes are those of
    the text that the model reads.

    Args:
        image: The image.
        panoptic: Its panoptic map, of any size.
        grid: Height and width of the crayon grid.
        max_number: Largest instance number.
        panel: Longer side of the drawn image in pixels, at least 240.
        title: Stands over the picture.

    Returns:
        An RGB picture of two by two panels.

    Raises:
        ValueError: if the grid or the panel is too small.

    Example:
        >>> import torch
        >>> ids = torch.ones(8, 12, dtype=torch.int32)
        >>> picture = draw_scene(
        ...     Image.new("RGB", (12, 8)), PanopticMap.from_segments(ids, [1], [17]), grid=(4, 6)
        ... )
        >>> picture.mode
        'RGB'
    """
    if panel < 240:
        raise ValueError(f"panel: expected at least 240 pixels, got {panel}")
    scene = _rows_of(panoptic, grid, max_number)
    scale = panel / max(image.size)
    size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    smooth = Image.Resampling.LANCZOS if scale < 4 else Image.Resampling.NEAREST
    photo = image.convert("RGB").resize(size, smooth)
    legend = _legend(scene, size)
    panels = (
        (f"Segments ({len(scene.rows)})", _segments(photo, scene)),
        ("Boxes, as the text has them", _boxes(photo, scene)),
        (f"Crayon grid, {grid[0]} x {grid[1]} cells, one row number each", _grid(size, scene)),
        ("Rows of the crayon", legend),
    )
    return _assemble(panels, title)


def _rows_of(panoptic: PanopticMap, grid: tuple[int, int], max_number: int) -> _Scene:
    lists: dict[str, Any] = {
        "segment_ids": [panoptic.segment_ids],
        "segment_classes": [panoptic.segment_classes],
        "max_number": max_number,
    }
    cells = panoptic_lookup([panoptic.segmentation], grid=grid, **lists)
    pixels = panoptic_lookup([panoptic.segmentation], grid=panoptic.size, **lists)
    classes, numbers = cells.row_class.tolist(), cells.row_number.tolist()
    total = panoptic.size[0] * panoptic.size[1]
    return _Scene(
        pixels.row_index.reshape(panoptic.size).numpy(),
        cells.row_index.reshape(grid).numpy(),
        classes,
        numbers,
        [tuple(box) for box in cells.row_box.tolist()],
        [area / total for area in cells.row_area.tolist()],
        row_colours(classes, numbers),
    )


def _enlarge(rows: Rows, size: tuple[int, int]) -> Rows:
    """Nearest-neighbour copy of a row map at a picture's size."""
    y = np.arange(size[1]) * rows.shape[0] // size[1]
    x = np.arange(size[0]) * rows.shape[1] // size[0]
    enlarged: Rows = rows[y[:, None], x[None, :]]
    return enlarged


def _segments(photo: Image.Image, scene: _Scene) -> Image.Image:
    rows = _enlarge(scene.pixel_rows, photo.size)
    pixels = np.asarray(photo).astype(np.float32)
    tinted = 0.4 * pixels + 0.6 * scene.colours[rows]
    edges = np.zeros(rows.shape, dtype=bool)
    edges[:, 1:] |= rows[:, 1:] != rows[:, :-1]
    edges[1:] |= rows[1:] != rows[:-1]
    thick = edges.copy()
    thick[:, :-1] |= edges[:, 1:]
    thick[:-1] |= edges[1:]
    tinted[thick] = 255
    tinted[edges] = 0
    picture = Image.fromarray(tinted.astype(np.uint8))
    points = inner_points(scene.pixel_rows, len(scene.classes))
    anchors = [
        None if point is None else (point[0] * photo.width, point[1] * photo.height)
        for point in points
    ]
    _draw_labels(picture, scene, anchors)
    return picture


def _boxes(photo: Image.Image, scene: _Scene) -> Image.Image:
    picture = Image.blend(photo, Image.new("RGB", photo.size, _PAPER), 0.35)
    draw = ImageDraw.Draw(picture)
    anchors: list[tuple[float, float] | None] = [None] * len(scene.classes)
    # Large boxes first, so that small ones lie over them.
    for row in sorted(scene.rows, key=lambda row: -_box_area(scene.boxes[row])):
        x1, y1, x2, y2 = scene.boxes[row]
        if x2 <= x1 or y2 <= y1:
            continue
        corners = (x1 * photo.width, y1 * photo.height, x2 * photo.width, y2 * photo.height)
        _frame(draw, corners, _rgb(scene.colours[row]), dashed=scene.is_stuff(row))
        width, height = _text_size(scene.label(row), 13)
        anchors[row] = (corners[0] + width / 2 + 6, corners[1] + height / 2 + 4)
    _draw_labels(picture, scene, anchors)
    return picture


def _box_area(box: tuple[float, ...]) -> float:
    return (box[2] - box[0]) * (box[3] - box[1])


def _frame(
    draw: ImageDraw.ImageDraw, box: Rectangle, colour: tuple[int, int, int], *, dashed: bool
) -> None:
    left, top, right, bottom = (round(v) for v in box)
    right, bottom = right - 1, bottom - 1
    sides = (
        ((left, top), (right, top)),
        ((left, bottom), (right, bottom)),
        ((left, top), (left, bottom)),
        ((right, top), (right, bottom)),
    )
    for outline, width in (((0, 0, 0), 4), (colour, 2)):
        for start, stop in sides:
            for a, b in _dashes(start, stop) if dashed else [(start, stop)]:
                draw.line((*a, *b), fill=outline, width=width)


def _dashes(
    start: tuple[int, int], stop: tuple[int, int], length: int = 9
) -> list[tuple[tuple[int, int], tuple[int, int]]]:
    across = start[1] == stop[1]
    low, high = (start[0], stop[0]) if across else (start[1], stop[1])
    spans = [(at, min(at + length, high)) for at in range(low, high, 2 * length)]
    if across:
        return [((a, start[1]), (b, start[1])) for a, b in spans]
    return [((start[0], a), (start[0], b)) for a, b in spans]


def _draw_labels(
    picture: Image.Image, scene: _Scene, anchors: list[tuple[float, float] | None]
) -> None:
    """Write every row's label near its anchor, with a line to it where it had to move."""
    draw = ImageDraw.Draw(picture)
    bounds = (1.0, 1.0, picture.width - 1.0, picture.height - 1.0)
    taken: list[Rectangle] = []
    placed = []
    # Small segments first: large ones have room elsewhere.
    largest = sorted(scene.rows, key=lambda row: -scene.shares[row])[:_MOST_LABELS]
    for row in reversed(largest):
        anchor = anchors[row]
        if anchor is None:
            continue
        width, height = _text_size(scene.label(row), 13)
        where = place(anchor, (width + 8, height + 5), bounds, taken)
        taken.append(where)
        placed.append((row, anchor, where))
    for _, anchor, where in placed:
        if not (where[0] <= anchor[0] <= where[2] and where[1] <= anchor[1] <= where[3]):
            middle = ((where[0] + where[2]) / 2, (where[1] + where[3]) / 2)
            draw.line((*middle, *anchor), fill=(0, 0, 0), width=3)
            draw.line((*middle, *anchor), fill=(255, 255, 255), width=1)
    for row, _, where in placed:
        _pill(draw, where, scene.label(row), _rgb(scene.colours[row]))


def _grid(size: tuple[int, int], scene: _Scene) -> Image.Image:
    rows = _enlarge(scene.cell_rows, size)
    picture = Image.fromarray(scene.colours[rows])
    draw = ImageDraw.Draw(picture)
    height, width = scene.cell_rows.shape
    xs = [round(size[0] * i / width) for i in range(width + 1)]
    ys = [round(size[1] * i / height) for i in range(height + 1)]
    for i in range(height):
        for j in range(width):
            corner = (xs[j], ys[i], xs[j + 1], ys[i + 1])
            _cell_borders(draw, scene.cell_rows, i, j, corner)
    labels = _region_labels(scene, rows)
    font_size = max(7, min(13, int((ys[1] - ys[0]) * 0.62), int((xs[1] - xs[0]) * 0.62)))
    for i in range(height):
        for j in range(width):
            row = int(scene.cell_rows[i, j])
            x, y = (xs[j] + xs[j + 1]) / 2, (ys[i] + ys[i + 1]) / 2
            half = font_size / 2
            if not any(touches((x - half, y - half, x + half, y + half), box) for box, _ in labels):
                ink = ink_on(scene.colours[row])
                draw.text((x, y), str(row), fill=ink, font=_font(font_size), anchor="mm")
    for box, row in labels:
        _pill(draw, box, scene.label(row), _rgb(scene.colours[row]))
    return picture


def _region_labels(scene: _Scene, rows: Rows) -> list[tuple[Rectangle, int]]:
    """Find the regions of the grid that have room for their label, and where it goes."""
    labels = []
    for row, point in enumerate(inner_points(rows, len(scene.classes))):
        if point is None:
            continue
        width, height = _text_size(scene.label(row), 13)
        x, y = point[0] * rows.shape[1], point[1] * rows.shape[0]
        box = (x - width / 2 - 4, y - height / 2 - 4, x + width / 2 + 4, y + height / 2 + 4)
        left, top, right, bottom = (round(value) for value in box)
        under = rows[max(top, 0) : bottom, max(left, 0) : right]
        if left >= 0 and top >= 0 and under.size and (under == row).all():
            labels.append((box, row))
    return labels


def _pill(
    draw: ImageDraw.ImageDraw, box: Rectangle, text: str, colour: tuple[int, int, int]
) -> None:
    draw.rounded_rectangle(box, radius=3, fill=colour, outline=(0, 0, 0))
    middle = ((box[0] + box[2]) / 2, (box[1] + box[3]) / 2)
    draw.text(middle, text, fill=ink_on(colour), font=_font(13), anchor="mm")


def _cell_borders(
    draw: ImageDraw.ImageDraw, cells: Rows, i: int, j: int, corner: tuple[int, int, int, int]
) -> None:
    """Draw a cell's right and lower border: thick where another row begins, thin elsewhere."""
    _, _, right, bottom = corner
    for other, line in (
        ((i, j + 1), (right, corner[1], right, bottom)),
        ((i + 1, j), (corner[0], bottom, right, bottom)),
    ):
        if other[0] < cells.shape[0] and other[1] < cells.shape[1]:
            differs = cells[i, j] != cells[other]
            draw.line(
                line, fill=(0, 0, 0) if differs else (160, 160, 160), width=2 if differs else 1
            )


def _legend(scene: _Scene, size: tuple[int, int]) -> Image.Image:
    """Write one line per row: number, colour, label, box, share of the pixels, cells."""
    cells = np.bincount(scene.cell_rows.reshape(-1), minlength=len(scene.classes))
    shown = range(min(len(scene.classes), _MOST_LABELS))
    names = max(_text_size(scene.label(row), 14)[0] for row in shown)
    width = max(size[0], round(names) + 420)
    picture = Image.new("RGB", (width, (len(shown) + 2) * _LINE + 6), _PAPER)
    draw = ImageDraw.Draw(picture)
    boxes = 78 + round(names) + 30
    columns = (34, 44, 78, boxes, boxes + 240, boxes + 300)
    heads = ("row", "", "label", "box x1, y1, x2, y2", "pixels", "cells")
    _legend_line(draw, 0, columns, heads, _SOFT)
    for row in shown:
        box = scene.boxes[row]
        text = format_box(box) if box[2] > box[0] else ("" if row == 0 else "not in the map")
        values = (str(row), "", scene.label(row), text, f"{scene.shares[row]:.1%}", str(cells[row]))
        _legend_line(draw, row + 1, columns, values, _INK if cells[row] else _SOFT)
        top = (row + 1) * _LINE + 3
        chip = (columns[1], top, columns[1] + 24, top + 14)
        draw.rectangle(chip, fill=_rgb(scene.colours[row]), outline=(0, 0, 0))
    notes = []
    if len(scene.classes) > len(shown):
        notes.append(f"and {len(scene.classes) - len(shown)} more rows")
    if not all(cells[1:]):
        notes.append("grey: too small for the grid, no cell carries this row")
    last = ("", "", "; ".join(notes), "", "", "")
    _legend_line(draw, len(shown) + 1, columns, last, _SOFT)
    return picture


def _legend_line(
    draw: ImageDraw.ImageDraw,
    number: int,
    columns: tuple[int, ...],
    values: tuple[str, ...],
    ink: tuple[int, int, int],
) -> None:
    for x, value, side in zip(columns, values, "rlllrr", strict=True):
        draw.text((x, number * _LINE + 10), value, fill=ink, font=_font(14), anchor=f"{side}m")


def _assemble(panels: tuple[tuple[str, Image.Image], ...], title: str) -> Image.Image:
    """Put four panels with their headings on one sheet, two by two."""
    widths = [max(panels[i][1].width, panels[i + 2][1].width) for i in (0, 1)]
    heights = [max(panels[i][1].height, panels[i + 1][1].height) for i in (0, 2)]
    head = 34 if title else 8
    sheet = Image.new(
        "RGB",
        (sum(widths) + 3 * _MARGIN, head + sum(heights) + 2 * _TITLE + 2 * _MARGIN),
        _PAPER,
    )
    draw = ImageDraw.Draw(sheet)
    draw.text((_MARGIN, head / 2 + 4), title, fill=_INK, font=_font(18), anchor="lm")
    for number, (heading, picture) in enumerate(panels):
        row, column = divmod(number, 2)
        x = _MARGIN + column * (widths[0] + _MARGIN)
        y = head + row * (heights[0] + _TITLE + _MARGIN)
        draw.text((x, y + _TITLE / 2), heading, fill=_INK, font=_font(15), anchor="lm")
        sheet.paste(picture, (x, y + _TITLE))
    return sheet


def _rgb(colour: Pixels) -> tuple[int, int, int]:
    return int(colour[0]), int(colour[1]), int(colour[2])


@lru_cache(maxsize=32)
def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size)


def _text_size(text: str, size: int) -> tuple[float, float]:
    left, top, right, bottom = _font(size).getbbox(text)
    return right - left, bottom - top
