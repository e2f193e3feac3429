"""The view of the crayon grid: every cell in its row's colour, every region with its label."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from collavo.pictures.canvas import BLACK, AnyCanvas, Canvas, NewCanvas, line_height, text_width
from collavo.pictures.labels import Mask, regions, roomy_block
from collavo.pictures.palette import Colour, ink_on
from collavo.pictures.scene import SceneRows

# Cells are at least this wide and high, so that a number can be read in one, unless the grid would
# be wider than a screen.
_CELL, _WIDEST = 14, 2000
# Every cell of this size carries its row number; smaller ones carry one per region.
_LARGE_CELL = 26
_LABEL_FONTS, _SMALL = (13, 12, 10), 10
_NUMBER_FONTS = (13, 11, 10, 9, 8, 7)
_THIN: Colour = (150, 150, 150)

Block = tuple[int, int, int, int]


@dataclass(frozen=True)
class _Words:
    """What stands in a block of cells (line, column, height, width): its lines and their size."""

    block: Block
    row: int
    lines: tuple[str, ...]
    size: int


def draw_grid(new: NewCanvas[AnyCanvas], size: tuple[int, int], scene: SceneRows) -> AnyCanvas:
    """Draw the crayon grid: colours of rows, borders between them, a label in every region.

    A region is what hangs together of a row's cells. It carries its label, such as ``#2 horse``,
    in one line or two, where it has room for it, and else its bare row number.

    Args:
        new: Makes a canvas of a size.
        size: Width and height that the grid would best have; cells are made larger where they
            could not be read.
        scene: The rows.
    """
    cells = scene.cell_rows
    height, width = cells.shape
    xs, ys = _stops(size[0], width), _stops(size[1], height)
    canvas = new((xs[-1], ys[-1]))
    for row, colour in enumerate(scene.colours):
        runs = [(xs[a], ys[i], xs[b], ys[i + 1]) for i, a, b in _runs(cells == row)]
        canvas.area(runs, colour)
    _borders(canvas, scene, xs, ys)
    covered = np.zeros(cells.shape, dtype=bool)
    words = list(_words(scene, xs, ys))
    for one in words:
        line, column, high, wide = one.block
        covered[line : line + high, column : column + wide] = True
    if min(size[0] / width, size[1] / height) >= _LARGE_CELL:
        for line, column in np.argwhere(~covered).tolist():
            row = int(cells[line, column])
            words.append(_Words((line, column, 1, 1), row, (str(row),), 11))
    for one in words:
        _write(canvas, scene, one, xs, ys)
    return canvas


def _stops(length: int, count: int) -> list[int]:
    length = max(length, min(_CELL * count, _WIDEST))
    return [round(length * i / count) for i in range(count + 1)]


def _runs(mask: Mask) -> Iterator[tuple[int, int, int]]:
    """List the runs of true cells: line, first column, last column plus one."""
    padded = np.zeros((mask.shape[0], mask.shape[1] + 2), dtype=np.int8)
    padded[:, 1:-1] = mask
    change = np.diff(padded, axis=1)
    starts, stops = np.argwhere(change == 1), np.argwhere(change == -1)
    for (line, first), (_, last) in zip(starts.tolist(), stops.tolist(), strict=True):
        yield line, first, last


def _borders(canvas: Canvas, scene: SceneRows, xs: list[int], ys: list[int]) -> None:
    """Draw thin lines between all cells, thick ones where another row begins."""
    cells = scene.cell_rows
    thin = [(x, 0, x + 1, ys[-1]) for x in xs[1:-1]] + [(0, y, xs[-1], y + 1) for y in ys[1:-1]]
    canvas.area(thin, _THIN)
    right, bottom = xs[-1], ys[-1]
    thick = [(0, 0, right, 1), (0, bottom - 1, right, bottom)]
    thick += [(0, 0, 1, bottom), (right - 1, 0, right, bottom)]
    for i, a, b in _runs(cells[1:] != cells[:-1]):
        thick.append((max(xs[a] - 1, 0), ys[i + 1] - 1, min(xs[b] + 1, right), ys[i + 1] + 1))
    for j, a, b in _runs((cells[:, 1:] != cells[:, :-1]).T):
        thick.append((xs[j + 1] - 1, max(ys[a] - 1, 0), xs[j + 1] + 1, min(ys[b] + 1, bottom)))
    canvas.area(thick, BLACK)


def _words(scene: SceneRows, xs: list[int], ys: list[int]) -> Iterator[_Words]:
    """Find for every region the fullest and largest words that lie wholly within it."""
    cell = (xs[-1] / (len(xs) - 1), ys[-1] / (len(ys) - 1))
    for row, corner, mask in regions(scene.cell_rows):
        for lines, size in _choices(scene.label(row), row):
            wide, high = _plate(lines, size) if lines != (str(row),) else _bare(lines[0], size)
            block = (int(np.ceil(high / cell[1])), int(np.ceil(wide / cell[0])))
            at = roomy_block(mask, block)
            if at is not None:
                yield _Words((corner[0] + at[0], corner[1] + at[1], *block), row, lines, size)
                break


def _choices(label: str, row: int) -> Iterator[tuple[tuple[str, ...], int]]:
    """List what may stand in a region, best first: lines and font size."""
    number, _, name = label.partition(" ")
    for size in _LABEL_FONTS:
        yield (label,), size
        if name:
            yield (number, name), size
    for size in _NUMBER_FONTS:
        yield (str(row),), size


def _plate(lines: tuple[str, ...], size: int) -> tuple[float, float]:
    """Return the width and height of a label's plate."""
    wide = max(text_width(line, size) for line in lines) + 8
    return wide, line_height(size) * len(lines) + (4 if size > _SMALL else 3)


def _bare(text: str, size: int) -> tuple[float, float]:
    """Return the width and height that a number without a plate needs."""
    return text_width(text, size) + 1, size


def _write(canvas: Canvas, scene: SceneRows, words: _Words, xs: list[int], ys: list[int]) -> None:
    line, column, lines, columns = words.block
    x, y = (xs[column] + xs[column + columns]) / 2, (ys[line] + ys[line + lines]) / 2
    colour = scene.colours[words.row]
    if words.lines == (str(words.row),):
        canvas.text((x, y), words.lines[0], words.size, ink=ink_on(colour), side="middle")
        return
    wide, high = _plate(words.lines, words.size)
    canvas.label(
        (x - wide / 2, y - high / 2, x + wide / 2, y + high / 2), words.lines, colour, words.size
    )
