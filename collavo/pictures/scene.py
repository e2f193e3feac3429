"""A panoptic map's rows with all that pictures say of them: labels, colours, boxes, cells."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from collavo._arguments import expect_like
from collavo.panoptic.categories import NUM_THINGS, display_name
from collavo.panoptic.maps import PanopticMap
from collavo.pictures.labels import Rectangle, Rows
from collavo.pictures.palette import Colour, row_colours
from collavo_kernels import panoptic_lookup


@dataclass(frozen=True)
class SceneRows:
    """The rows of one image's crayon, row 0 being the unknown one.

    Args:
        pixel_rows: int32 ``[H, W]``, row of every pixel of the map.
        cell_rows: int32 ``[grid_h, grid_w]``, row of every cell of the crayon grid.
        classes: Per row 0 = unknown, class c is c + 1.
        numbers: Per row its number within its class.
        boxes: Per row x1, y1, x2, y2 in 0..1.
        shares: Per row its part of the map's pixels, 0..1.
        colours: Per row its colour.
    """

    pixel_rows: Rows
    cell_rows: Rows
    classes: list[int]
    numbers: list[int]
    boxes: list[Rectangle]
    shares: list[float]
    colours: list[Colour]

    @classmethod
    def of(cls, panoptic: PanopticMap, grid: tuple[int, int], max_number: int) -> SceneRows:
        """Look a map up, once at its own size and once on the grid.

        Args:
            panoptic: The map.
            grid: Height and width of the crayon grid.
            max_number: Largest instance number.
        """
        expect_like("panoptic", panoptic, "a PanopticMap", has=("segmentation", "segment_ids"))
        lists: dict[str, Any] = {
            "segment_ids": [panoptic.segment_ids],
            "segment_classes": [panoptic.segment_classes],
            "max_number": max_number,
        }
        cells = panoptic_lookup([panoptic.segmentation], grid=grid, **lists)
        pixels = panoptic_lookup([panoptic.segmentation], grid=panoptic.size, **lists)
        classes, numbers = cells.row_class.tolist(), cells.row_number.tolist()
        pixel_rows = pixels.row_index.reshape(panoptic.size).numpy()
        cell_rows = cells.row_index.reshape(grid).numpy()
        colours = row_colours(classes, numbers, _touching(pixel_rows) | _touching(cell_rows))
        total = panoptic.size[0] * panoptic.size[1]
        return cls(
            pixel_rows,
            cell_rows,
            classes,
            numbers,
            [(box[0], box[1], box[2], box[3]) for box in cells.row_box.tolist()],
            [area / total for area in cells.row_area.tolist()],
            [(red, green, blue) for red, green, blue in colours.tolist()],
        )

    @property
    def rows(self) -> range:
        """All rows but the unknown one."""
        return range(1, len(self.classes))

    def label(self, row: int) -> str:
        """Return what the text calls a row, such as ``#2 horse``.

        Args:
            row: 0 and segments without class are ``unknown``.
        """
        label, number = self.classes[row], self.numbers[row]
        if label <= 0:
            return f"#{number} unknown" if number else "unknown"
        return f"#{number} {display_name(label - 1)}"

    def is_stuff(self, row: int) -> bool:
        """Say whether a row's class is of the uncountable kind, such as sky.

        Args:
            row: Which row.
        """
        return self.classes[row] > NUM_THINGS

    def is_there(self, row: int) -> bool:
        """Say whether a row has a pixel in the map.

        Args:
            row: Which row.
        """
        return self.shares[row] > 0

    def colour_table(self) -> npt.NDArray[np.uint8]:
        """Return uint8 ``[T, 3]``, to be indexed with rows."""
        return np.asarray(self.colours, dtype=np.uint8).reshape(-1, 3)


def enlarge(rows: Rows, size: tuple[int, int]) -> Rows:
    """Return a nearest-neighbour copy of a row map at a picture's size.

    Args:
        rows: int32 ``[H, W]``.
        size: Width and height in pixels.

    Example:
        >>> enlarge(np.array([[1, 2]], dtype=np.int32), (4, 2)).tolist()
        [[1, 1, 2, 2], [1, 1, 2, 2]]
    """
    y = np.arange(size[1]) * rows.shape[0] // size[1]
    x = np.arange(size[0]) * rows.shape[1] // size[0]
    enlarged: Rows = rows[y[:, None], x[None, :]]
    return enlarged


def _touching(rows: Rows) -> set[tuple[int, int]]:
    """List the pairs of rows that lie side by side, the lower row first."""
    pairs = []
    for one, other in ((rows[:, 1:], rows[:, :-1]), (rows[1:], rows[:-1])):
        differ = one != other
        both = np.stack((one[differ], other[differ]), axis=1)
        both.sort(axis=1)
        pairs.append(both)
    unique = np.unique(np.concatenate(pairs), axis=0)
    return {(first, second) for first, second in unique.tolist()}
