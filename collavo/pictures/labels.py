"""Where labels go: inside their segment, and not over one another."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import lru_cache

import numpy as np
import numpy.typing as npt

Rectangle = tuple[float, float, float, float]
Rows = npt.NDArray[np.int32]
Mask = npt.NDArray[np.bool_]


def inner_points(rows: Rows, num_rows: int) -> list[tuple[float, float] | None]:
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


def _depth(rows: Rows) -> Rows:
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


def regions(cells: Rows) -> Iterator[tuple[int, tuple[int, int], Mask]]:
    """Split a grid into its connected regions of one row each.

    Args:
        cells: int32 ``[H, W]``, row of every cell.

    Yields:
        The region's row, the line and column of its box's first cell, and which cells of its box
        belong to it; regions in the order of their first cells.

    Example:
        >>> for row, corner, mask in regions(np.array([[1, 1], [2, 1]], dtype=np.int32)):
        ...     print(row, corner, mask.tolist())
        1 (0, 0) [[True, True], [False, True]]
        2 (1, 0) [[True]]
    """
    height, width = cells.shape
    rows = cells.tolist()
    seen = [[False] * width for _ in range(height)]
    for start in range(height * width):
        i, j = divmod(start, width)
        if seen[i][j]:
            continue
        seen[i][j] = True
        found = [(i, j)]
        for y, x in found:  # grows while it is walked
            for near in ((y, x + 1), (y + 1, x), (y, x - 1), (y - 1, x)):
                inside = 0 <= near[0] < height and 0 <= near[1] < width
                if inside and not seen[near[0]][near[1]] and rows[near[0]][near[1]] == rows[i][j]:
                    seen[near[0]][near[1]] = True
                    found.append(near)
        places = np.asarray(found)
        corner = places.min(axis=0)
        mask = np.zeros(places.max(axis=0) - corner + 1, dtype=bool)
        mask[tuple((places - corner).T)] = True
        yield rows[i][j], (int(corner[0]), int(corner[1])), mask


def roomy_block(mask: Mask, block: tuple[int, int]) -> tuple[int, int] | None:
    """Find where a block of cells lies wholly within a region: deep inside, near to its middle.

    Args:
        mask: bool ``[H, W]``, the region's cells.
        block: Height and width of the block in cells.

    Returns:
        Line and column of the block's first cell, or None if the region has no such room.

    Example:
        >>> region = np.array([[True, False, False], [True, True, True]])
        >>> roomy_block(region, (1, 2)), roomy_block(region, (2, 2))
        ((1, 0), None)
    """
    for margin in (4, 2, 1, 0):
        window = (block[0] + 2 * margin, block[1] + 2 * margin)
        if window[0] > mask.shape[0] or window[1] > mask.shape[1]:
            continue
        inside = np.lib.stride_tricks.sliding_window_view(mask, window).all(axis=(2, 3))
        places = np.argwhere(inside)
        if len(places):
            nearest = ((places - places.mean(axis=0)) ** 2).sum(axis=1).argmin()
            return int(places[nearest, 0]) + margin, int(places[nearest, 1]) + margin
    return None


def place(
    anchor: tuple[float, float],
    size: tuple[float, float],
    bounds: Rectangle,
    taken: Sequence[Rectangle],
    reach: int = 12,
) -> Rectangle | None:
    """Choose where a label goes: as near to its anchor as the others allow.

    Args:
        anchor: Where its centre would best be.
        size: Its width and height.
        bounds: What it must stay within.
        taken: The labels that are there already.
        reach: How far from its anchor it may go; 3 is about its width or twice its height.

    Returns:
        Left, top, right and bottom, or None where nothing within reach is free.
    """
    room = (bounds[2] - bounds[0] - size[0], bounds[3] - bounds[1] - size[1])
    if min(room) < 0:
        return None
    spots = np.asarray(anchor) + _spiral(reach) * size - np.asarray(size) / 2
    low = np.asarray(bounds[:2])
    corners = np.clip(spots, low, low + room)
    free = np.ones(len(corners), dtype=bool)
    for other in taken:
        beyond = (corners >= other[2:]) | (corners + size <= other[:2])
        free &= beyond.any(axis=1)
    if not free.any():
        return None
    # The bounds have moved some places, so the order of the spiral no longer says what is near.
    away = np.abs((corners - corners[0]) / size / (0.3, 0.6)).max(axis=1)
    left, top = corners[np.where(free, away, np.inf).argmin()].tolist()
    return left, top, left + size[0], top + size[1]


@lru_cache(maxsize=8)
def _spiral(reach: int) -> npt.NDArray[np.float64]:
    """List places around a point, nearest first, in units of a label's width and height."""
    turns = [(ring, turn / (8 * ring)) for ring in range(1, reach + 1) for turn in range(8 * ring)]
    rings, angles = np.asarray([(0, 0.0), *turns]).T
    angles = angles * 2 * np.pi
    return np.stack((np.sin(angles) * rings * 0.3, -np.cos(angles) * rings * 0.6), axis=1)


def touches(a: Rectangle, b: Rectangle) -> bool:
    """Say whether two rectangles overlap.

    Args:
        a: Left, top, right and bottom.
        b: Left, top, right and bottom.
    """
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]
