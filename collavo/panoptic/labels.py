"""Where labels go: inside their segment, and not over one another."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt

Rectangle = tuple[float, float, float, float]


def inner_points(rows: npt.NDArray[np.int32], num_rows: int) -> list[tuple[float, float] | None]:
    """Find, for every row, a point deep inside of its largest part.

    Args:
        rows: ``[H, W]``, row of every pixel.
        num_rows: How many rows there are.

    Returns:
        x and y as fractions of the width and height, or None for a row without a pixel.
    """
    step = max(1, max(rows.shape) // 160)  # a label need not be placed to the pixel
    small = rows[::step, ::step]
    depth = _depth(small)
    points: list[tuple[float, float] | None] = []
    for row in range(num_rows):
        own = np.where(small == row, depth, 0)
        if not own.any():
            places = np.argwhere(rows == row)
            if not len(places):
                points.append(None)
                continue
            y, x = places[len(places) // 2]
            points.append(((x + 0.5) / rows.shape[1], (y + 0.5) / rows.shape[0]))
            continue
        ys, xs = np.nonzero(own == own.max())
        middle = np.argmin((ys - ys.mean()) ** 2 + (xs - xs.mean()) ** 2)
        x, y = xs[middle] * step + step / 2, ys[middle] * step + step / 2
        points.append((min(x / rows.shape[1], 1.0), min(y / rows.shape[0], 1.0)))
    return points


def _depth(rows: npt.NDArray[np.int32]) -> npt.NDArray[np.int32]:
    """Count the steps from every pixel to another row or to the border."""
    height, width = rows.shape
    inside = np.ones((height, width), dtype=bool)
    depth = np.zeros((height, width), dtype=np.int32)
    same_right = rows[:, 1:] == rows[:, :-1]
    same_below = rows[1:] == rows[:-1]
    while inside.any():
        depth += inside
        keep = inside.copy()
        keep[:, 0] = keep[:, -1] = False
        keep[0] = keep[-1] = False
        keep[:, :-1] &= same_right & inside[:, 1:]
        keep[:, 1:] &= same_right & inside[:, :-1]
        keep[:-1] &= same_below & inside[1:]
        keep[1:] &= same_below & inside[:-1]
        inside = keep
    return depth


def place(
    anchor: tuple[float, float],
    size: tuple[float, float],
    bounds: Rectangle,
    taken: Sequence[Rectangle],
) -> Rectangle:
    """Choose where a label goes: as near to its anchor as others allow.

    Args:
        anchor: Where its centre would best be.
        size: Its width and height.
        bounds: What it must stay within.
        taken: The labels that are there already.

    Returns:
        Left, top, right and bottom; over another label only where there is no free place.
    """
    first: Rectangle | None = None
    for x, y in _spiral(anchor, size):
        left = min(max(x - size[0] / 2, bounds[0]), bounds[2] - size[0])
        top = min(max(y - size[1] / 2, bounds[1]), bounds[3] - size[1])
        candidate = (left, top, left + size[0], top + size[1])
        first = first or candidate
        if not any(touches(candidate, other) for other in taken):
            return candidate
    return first or (*anchor, *anchor)


def _spiral(
    centre: tuple[float, float], size: tuple[float, float]
) -> Iterator[tuple[float, float]]:
    yield centre
    for ring in range(1, 13):
        for turn in range(8 * ring):
            angle = 2 * np.pi * turn / (8 * ring)
            x = centre[0] + np.sin(angle) * ring * size[0] * 0.3
            yield float(x), float(centre[1] - np.cos(angle) * ring * size[1] * 0.6)


def touches(a: Rectangle, b: Rectangle) -> bool:
    """Say whether two rectangles overlap.

    Args:
        a: Left, top, right and bottom.
        b: Left, top, right and bottom.
    """
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]
