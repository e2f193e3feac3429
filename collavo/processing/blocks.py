"""Where in its picture each image token looks, and the crayon rows that follow from it.

Whatever a model does with a picture (squash it, crop it, pad it, cut it into tiles beside a small
base image, merge patches), in the end an image token looks at a rectangle of the picture, and the
tokens of one view of it stand in rows and columns. A ``Block`` is such a view. Tokens that look at
no place (a class token, the newline behind a row of tokens, a patch of padding) have no crayon row.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TypeAlias

import numpy as np
import torch
from torch import Tensor

from collavo.panoptic.maps import PanopticMap
from collavo_kernels import MAX_MAP_SIDE, CrayonMap, panoptic_lookup

# Where a cell's borders cut pixels, the cell is read at this many lines or more, evenly spaced.
_LINES_PER_CELL = 4


@dataclass(frozen=True)
class Axis:
    """The cells of a block along one side of a picture, in any unit of length.

    Args:
        cells: First and last place of each cell, in order; there may be none.
        start: Where the picture starts, in the same unit; cells may lie beside the picture.
        length: How long the picture is.
    """

    cells: tuple[tuple[float, float], ...]
    start: float
    length: float

    @classmethod
    def even(cls, count: int, cell: float, start: float, length: float) -> Axis:
        """Return neighbouring cells of one length, from 0 on.

        Args:
            count: How many.
            cell: How long each is.
            start: Where the picture starts.
            length: How long the picture is.
        """
        return cls(tuple((i * cell, (i + 1) * cell) for i in range(count)), start, length)

    def on(self, size: int) -> np.ndarray[tuple[int, int], np.dtype[np.float64]]:
        """Return first and last place of each cell in pixels of a map, float64 ``[cells, 2]``.

        Args:
            size: The map's height or width.
        """
        places = np.array(self.cells, dtype=np.float64).reshape(-1, 2)
        # Whatever unit it is in, a place between two pixels is one: no rounding may move it.
        return ((places - self.start) * size / self.length).round(9)

    @property
    def whole(self) -> bool:
        """Whether even cells cover the picture and nothing else."""
        borders = np.arange(len(self.cells) + 1)
        return bool((self.on(len(self.cells)) == np.stack([borders[:-1], borders[1:]], 1)).all())

    def pixels(self, size: int) -> tuple[int, int] | None:
        """Return the pixels of a map that even cells divide between them, or None.

        Args:
            size: The map's height or width.
        """
        places = self.on(size)
        first, last = places[0, 0], places[-1, 1]
        inside = 0 <= first < last <= size and first.is_integer() and last.is_integer()
        borders = np.linspace(first, last, len(places) + 1)
        even = np.stack([borders[:-1], borders[1:]], 1)
        if inside and np.allclose(places, even, rtol=0, atol=1e-9 * size):
            return int(first), int(last)
        return None

    @property
    def all_seen(self) -> bool:
        """Whether cells see all of the picture, but for less than a cell at its end."""
        if not self.cells:
            return False
        (first, _), (before, last) = self.on(1)[[0, -1]]
        return bool(first <= 0 and last > 1 - (last - before) + 1e-9)

    def seen(self, size: int) -> slice:
        """Return the pixels of a map whose middle the cells see, one at least.

        What an image has beyond the last whole patch counts as seen.

        Args:
            size: The map's height or width.
        """
        if self.all_seen:
            return slice(0, size)
        first, last = (math.ceil(place - 0.5) for place in self.on(size)[[0, -1], [0, 1]])
        first = min(max(first, 0), size - 1)
        return slice(first, min(max(last, first + 1), size))

    def lines(self, size: int) -> tuple[Tensor, Tensor]:
        """Return the lines of a map to read, as many for each cell, and which cells see any.

        Where all cells together begin and end between two pixels, these are the pixels between, and
        the lookup divides them as it always does. Otherwise each cell is read at evenly spaced
        lines of what it sees of the picture, so that a majority of lines is one of area.

        Args:
            size: The map's height or width.
        """
        pixels = self.pixels(size)
        if pixels is not None:
            return torch.arange(*pixels), torch.ones(len(self.cells), dtype=torch.bool)
        places = self.on(size)
        seen = places.clip(0, size)
        lengths = seen[:, 1] - seen[:, 0]
        count = max(_LINES_PER_CELL, math.ceil(lengths.max()))
        count = max(1, min(count, MAX_MAP_SIDE // len(places)))
        steps = (np.arange(count) + 0.5) / count
        lines = np.floor(seen[:, :1] + steps * lengths[:, None]).clip(0, size - 1)
        # Where a cell ends as the picture starts, rounding must not let it see a hair of that.
        see = lengths > 1e-9 * (places[:, 1] - places[:, 0])
        return torch.from_numpy(lines.astype(np.int64).reshape(-1)), torch.from_numpy(see)


@dataclass(frozen=True)
class Block:
    """One view of a picture: image tokens in rows and columns, row by row.

    Args:
        rows: Their places from top to bottom.
        columns: Their places from left to right.
        before: How many image tokens without a place stand in front of them.
        newline: How many stand behind each row.
        after: How many stand behind them.
    """

    rows: Axis
    columns: Axis
    before: int = 0
    newline: int = 0
    after: int = 0

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns."""
        return len(self.rows.cells), len(self.columns.cells)

    @property
    def places(self) -> int:
        """How many image tokens it has, those without a place among them."""
        height, width = self.grid
        return self.before + height * (width + self.newline) + self.after

    @property
    def whole(self) -> bool:
        """Whether it is an even grid over the whole picture."""
        return self.rows.whole and self.columns.whole

    @property
    def all_seen(self) -> bool:
        """Whether it sees all of the picture, but for less than a cell at its ends."""
        return self.rows.all_seen and self.columns.all_seen

    @property
    def padded(self) -> bool:
        """Whether it sees the whole picture, and perhaps what lies beside it."""
        ends = [axis.on(1)[[0, -1], [0, 1]] for axis in (self.rows, self.columns) if axis.cells]
        return len(ends) == 2 and all(first <= 0 and last >= 1 - 1e-9 for first, last in ends)

    @property
    def seeing(self) -> Tensor:
        """Which cells see anything of the picture, bool ``[h, w]``."""
        rows, columns = (
            torch.from_numpy((axis.on(1)[:, 0] < 1) & (axis.on(1)[:, 1] > 0))
            for axis in (self.rows, self.columns)
        )
        return rows[:, None] & columns

    @property
    def area(self) -> float:
        """The part of the picture, 0 to 1, that it sees."""
        if 0 in self.grid:
            return 0.0
        rows, columns = (axis.on(1).clip(0, 1) for axis in (self.rows, self.columns))
        return float((rows[-1, 1] - rows[0, 0]) * (columns[-1, 1] - columns[0, 0]))

    def cut(self, panoptic: PanopticMap) -> tuple[PanopticMap, Tensor]:
        """Return the map as this block sees it, and which cells see anything, bool ``[h, w]``.

        Args:
            panoptic: The map of the picture, of any size.
        """
        if self.whole:
            return panoptic, torch.ones(self.grid, dtype=torch.bool)
        rows, rows_see = self.rows.lines(panoptic.size[0])
        columns, columns_see = self.columns.lines(panoptic.size[1])
        # NumPy takes columns in a fifth of torch's time.
        cut = panoptic.segmentation.numpy().take(columns.numpy(), 1).take(rows.numpy(), 0)
        return replace(panoptic, segmentation=torch.from_numpy(cut)), rows_see[
            :, None
        ] & columns_see

    def with_boxes(self, crayon: CrayonMap, panoptic: PanopticMap) -> CrayonMap:
        """Return a lookup of ``cut`` with boxes and areas of what the block sees of the picture.

        Where lines stand for pixels, or for padding, a box of lines is none of the picture.

        Args:
            crayon: What was looked up of the cut map.
            panoptic: The map of the picture.
        """
        height, width = panoptic.size
        pixels = self.rows.pixels(height) and self.columns.pixels(width)
        if self.whole or (pixels and not self.all_seen):
            return crayon
        seen = panoptic.segmentation[self.rows.seen(height)][:, self.columns.seen(width)]
        boxes = panoptic_lookup(
            [seen.contiguous()], [panoptic.segment_ids], [panoptic.segment_classes], grid=(1, 1)
        )
        return replace(crayon, row_box=boxes.row_box, row_area=boxes.row_area)

    def index(self, cells: Tensor) -> Tensor:
        """Return the row of each image token, int32 ``[places]``.

        Args:
            cells: int32 ``[h w]``: the row of each cell, -1 where it has none.
        """
        rows = cells.view(self.grid)
        rows = torch.cat([rows, rows.new_full((len(rows), self.newline), -1)], 1).reshape(-1)
        return torch.cat(
            [rows.new_full((self.before,), -1), rows, rows.new_full((self.after,), -1)]
        )


Layout: TypeAlias = tuple[Block, ...]
"""All image tokens of a picture, in order."""


def look_up(
    pictures: Sequence[tuple[PanopticMap | None, Layout]],
    *,
    num_classes: int,
    max_number: int,
    reduce: str,
) -> list[CrayonMap]:
    """Give every image token of some pictures its crayon row.

    A picture has its rows once, whatever number of blocks see it; boxes and areas are those of what
    the block which sees most of it sees of the picture, padding left aside.

    Args:
        pictures: The map of each, or None, and its image tokens.
        num_classes: As of ``panoptic_lookup``.
        max_number: As of ``panoptic_lookup``.
        reduce: As of ``panoptic_lookup``.

    Returns:
        One map for each picture, of one image; ``row_index`` int32 ``[1, places]``, -1 where a
        token sees nothing of the picture.
    """
    work = defaultdict(list)
    index: dict[tuple[int, int], Tensor] = {}
    for picture, (panoptic, layout) in enumerate(pictures):
        # A map without segments is all unknown, whatever its size.
        known = PanopticMap.empty(1, 1) if panoptic is None else panoptic
        for number, block in enumerate(layout):
            if 0 in block.grid:  # of a panorama's tiles no line may be left
                index[picture, number] = torch.empty(0, dtype=torch.int32)
            else:
                work[block.grid].append(((picture, number), *block.cut(known)))
    found: dict[tuple[int, int], CrayonMap] = {}
    for grid, parts in work.items():
        crayon = panoptic_lookup(
            [cut.segmentation for _, cut, _ in parts],
            [cut.segment_ids for _, cut, _ in parts],
            [cut.segment_classes for _, cut, _ in parts],
            grid=grid,
            num_classes=num_classes,
            max_number=max_number,
            reduce=reduce,
        )
        for (name, _, see), one in zip(parts, split_images(crayon), strict=True):
            found[name] = one
            index[name] = torch.where(see.reshape(-1), one.row_index[0], -1)
    crayons = []
    for picture, (panoptic, layout) in enumerate(pictures):
        own = [(picture, number) for number in range(len(layout))]
        most = max(own, key=lambda name: layout[name[1]].area)
        tokens = [block.index(index[name]) for block, name in zip(layout, own, strict=True)]
        crayon = found[most]
        if panoptic is not None:
            crayon = layout[most[1]].with_boxes(crayon, panoptic)
        crayons.append(replace(crayon, row_index=torch.cat(tokens)[None]))
    return crayons


def split_images(crayon: CrayonMap) -> list[CrayonMap]:
    """Take a crayon map apart, one map for each image.

    Args:
        crayon: Of any number of images, without dead rows.
    """
    counts = torch.bincount(crayon.row_image.long(), minlength=crayon.num_images).tolist()
    parts, start = [], 0
    for image, count in enumerate(counts):
        rows = slice(start, start + count)
        parts.append(
            CrayonMap(
                row_index=crayon.row_index[image : image + 1] - start,
                row_class=crayon.row_class[rows],
                row_number=crayon.row_number[rows],
                row_image=crayon.row_image[rows] - image,
                row_segment_id=crayon.row_segment_id[rows],
                row_box=crayon.row_box[rows],
                row_area=crayon.row_area[rows],
            )
        )
        start += count
    return parts
