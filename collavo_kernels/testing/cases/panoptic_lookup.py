"""The case table of panoptic_lookup, and a naive oracle that shares no code with any backend."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from collavo_kernels.ops.panoptic_lookup.inputs import LookupInputs, LookupResult

INT_MAX = 2**31 - 1
INT_MIN = -(2**31)
Segments = list[list[tuple[int, int]]]


@dataclass(frozen=True)
class Case:
    """A batch of maps, the (id, class) pairs of each, and why the case is here."""

    why: str
    maps: Callable[[], list[Tensor]]
    segments: Segments
    grid: tuple[int, int]
    num_classes: int = 133
    max_number: int = 20

    def ids(self) -> list[Tensor]:
        """Return the ids of every image."""
        return [ints([pair[0] for pair in each]) for each in self.segments]

    def classes(self) -> list[Tensor]:
        """Return the classes of every image."""
        return [ints([pair[1] for pair in each]) for each in self.segments]

    def has_colours(self) -> bool:
        """Whether all ids of the maps are colours, which negative and large ones are not."""
        return all(int(each.min()) >= 0 and int(each.max()) < 2**24 for each in self.maps())

    def inputs(self, reduce: str, device: str = "cpu", *, coloured: bool = False) -> LookupInputs:
        """Return what a backend takes."""
        flat = [pair for each in self.segments for pair in each]
        plain = self.maps()
        return LookupInputs(
            maps=[(colours(m) if coloured else m)[None].to(device) for m in plain],
            segment_ids=ints([pair[0] for pair in flat]),
            segment_classes=ints([pair[1] for pair in flat]),
            segment_counts=[len(each) for each in self.segments],
            grid_h=self.grid[0],
            grid_w=self.grid[1],
            num_classes=self.num_classes,
            max_number=self.max_number,
            reduce=reduce,
        )


def ints(values: list[int]) -> Tensor:
    """Return an int32 tensor."""
    return torch.tensor(values, dtype=torch.int32)


def colours(ids: Tensor) -> Tensor:
    """COCO's colours of ids: red, green and blue are the bytes from the lowest one on."""
    return torch.stack([ids & 255, ids >> 8 & 255, ids >> 16], -1).to(torch.uint8)


def noise(height: int, width: int, ids: list[int], seed: int = 0) -> Tensor:
    """Every pixel drawn alone: as many runs as pixels."""
    generator = torch.Generator().manual_seed(seed)
    pick = torch.randint(len(ids), (height, width), generator=generator)
    return ints(ids)[pick]


def blobs(height: int, width: int, ids: list[int], seed: int = 0) -> Tensor:
    """Each pixel takes the id of the nearest of some points: connected segments, like real maps."""
    generator = torch.Generator().manual_seed(seed)
    y = torch.randint(height, (len(ids), 1, 1), generator=generator)
    x = torch.randint(width, (len(ids), 1, 1), generator=generator)
    far = (torch.arange(height)[:, None] - y) ** 2 + (torch.arange(width) - x) ** 2
    return ints(ids)[far.argmin(0)]


def checkerboard(height: int, width: int, a: int, b: int) -> Tensor:
    """Return a map whose neighbours always differ."""
    odd = (torch.arange(height)[:, None] + torch.arange(width)) % 2
    return torch.where(odd == 0, a, b).to(torch.int32)


CASES = {
    "one-pixel": Case("the smallest map", lambda: [ints([7]).reshape(1, 1)], [[(7, 5)]], (1, 1)),
    "grid-sized": Case(
        "a segmenter's own grid is taken cell by cell",
        lambda: [blobs(4, 5, [0, 1, 2, 3])],
        [[(1, 0), (2, 1), (3, 0)]],
        (4, 5),
    ),
    "grid-divides-map": Case(
        "cells share no pixel", lambda: [blobs(24, 40, [4, 9, -1])], [[(4, 1), (9, 1)]], (3, 4)
    ),
    "cells-overlap": Case(
        "a grid that does not divide the map: neighbouring cells share pixels",
        lambda: [noise(37, 53, [0, 1, 2])],
        [[(1, 3), (2, 4)]],
        (4, 5),
    ),
    "map-smaller-than-grid": Case(
        "several cells share each pixel, and some cells own none",
        lambda: [noise(3, 2, [0, 1, 2])],
        [[(1, 0), (2, 0)]],
        (5, 7),
    ),
    "one-side-smaller": Case(
        "fewer pixel rows than cell rows, more columns than cell columns",
        lambda: [blobs(3, 50, [1, 2, 3])],
        [[(1, 0), (2, 0), (3, 1)]],
        (8, 6),
    ),
    "single-line": Case(
        "one pixel row: runs longer than a vector register",
        lambda: [blobs(1, 500, [1, 2, 0])],
        [[(1, 0), (2, 7)]],
        (1, 3),
    ),
    "no-segments": Case(
        "an empty list and a map of negative values: one unknown row",
        lambda: [torch.full((6, 5), -1, dtype=torch.int32)],
        [[]],
        (2, 3),
    ),
    "absent-segments": Case(
        "listed segments without a pixel, first, in the middle and last, keep their rows",
        lambda: [blobs(12, 12, [0, 5, 9])],
        [[(3, 2), (5, 2), (7, 2), (9, 2), (11, 2)]],
        (4, 4),
    ),
    "unlisted-ids": Case(
        "ids below, between and above the listed ones are unknown, and count together",
        lambda: [noise(20, 20, [1, 4, 5, 6, 9, INT_MAX])],
        [[(4, 1), (6, 1)]],
        (5, 5),
    ),
    "extreme-ids": Case(
        "the largest id, ids beyond COCO's 2^24, and the most negative value",
        lambda: [noise(16, 16, [INT_MAX, INT_MAX - 1, 2**24, 1, INT_MIN])],
        [[(INT_MAX, 0), (2**24, 1), (1, 132)]],
        (4, 4),
    ),
    "list-out-of-order": Case(
        "rows go by ascending id whatever the order of the list",
        lambda: [blobs(20, 30, [8, 3, 5, 1])],
        [[(8, 2), (1, 2), (5, 0), (3, 2)]],
        (4, 6),
    ),
    "unknown-class": Case(
        "segments of unknown class are numbered like a class of their own",
        lambda: [blobs(20, 20, [1, 2, 3, 4])],
        [[(1, -1), (2, 0), (3, -1), (4, -1)]],
        (5, 5),
    ),
    "too-many-instances": Case(
        "instances after the last number get number 0",
        lambda: [blobs(30, 30, list(range(1, 8)))],
        [[(i, 1) for i in range(1, 8)]],
        (4, 4),
        num_classes=2,
        max_number=3,
    ),
    "ties": Case(
        "equal counts go to the lower id, and to the unknown row before any id",
        lambda: [checkerboard(8, 8, 9, 2), checkerboard(8, 8, 3, 0), checkerboard(8, 8, 77, 3)],
        [[(9, 0), (2, 1)], [(3, 0)], [(3, 1)]],
        (4, 4),
    ),
    "colliding-ids": Case(
        "more segments than the look-up cache has slots, ids equal in their low bits",
        lambda: [noise(40, 40, [64 * k for k in range(100)])],
        [[(64 * k, k % 5) for k in range(1, 100)]],
        (8, 8),
    ),
    "colours": Case(
        "ids that differ in one byte each, up to white: all three channels count",
        lambda: [blobs(37, 90, [1, 256, 65536, 2**24 - 1, 0x010203, 0x030201, 0])],
        [[(1, 0), (256, 0), (65536, 1), (2**24 - 1, 1), (0x030201, 2)]],
        (4, 5),
    ),
    "wide-cells": Case(
        "cells of more pixels than a tile: several tiles of several widths and heights",
        lambda: [blobs(150, 333, [3, 4, 5, 6, 7, 8, 0]), noise(70, 200, [0, 2, 3])],
        [[(3, 0), (4, 0), (5, 1), (6, 1), (8, 1)], [(2, 3)]],
        (2, 2),
    ),
    "mixed-sizes": Case(
        "maps of any sizes in one call, one of them without a segment",
        lambda: [
            blobs(31, 17, [1, 2, 3]),
            torch.zeros(4, 4, dtype=torch.int32),
            blobs(8, 60, [2, 7, 0]),
        ],
        [[(1, 0), (2, 0), (3, 1)], [], [(7, 5), (2, 5)]],
        (5, 6),
    ),
}

# Too large for the naive oracle and for Triton's interpreter.
LARGE_CASES = {
    "several-bands": Case(
        "large enough that one map is cut into bands that share segments",
        lambda: [blobs(700, 900, list(range(12)))],
        [[(i, i % 3) for i in range(1, 12)]],
        (35, 35),
    ),
    "thousands-of-segments": Case(
        "5,000 segments, most of them absent",
        lambda: [noise(120, 160, list(range(0, 9000, 3)))],
        [[(2 * i + 1, i % 133) for i in range(5000)]],
        (24, 24),
    ),
}


def naive(
    maps: list[Tensor],
    segments: Segments,
    grid: tuple[int, int],
    reduce: str,
    max_number: int = 20,
) -> LookupResult:
    """Compute what the README says, pixel by pixel and in Python."""
    index: list[list[int]] = []
    rows: list[tuple[int, int, int, int]] = []
    boxes, areas = [], []
    for image, (map_, pairs) in enumerate(zip(maps, segments, strict=True)):
        first = len(rows)
        row_of, seen = {0: first}, Counter[int]()
        rows.append((0, 0, image, 0))
        for segment, label in sorted(pairs):
            seen[label] += 1
            number = seen[label] if seen[label] <= max_number else 0
            row_of[segment] = len(rows)
            rows.append((label + 1, number, image, segment))
        pixel_rows = [[row_of.get(max(p, 0), first) for p in line] for line in map_.tolist()]
        index.append(_cells(pixel_rows, grid, reduce))
        for row in range(first, len(rows)):
            at = [
                (x, y) for y, line in enumerate(pixel_rows) for x, r in enumerate(line) if r == row
            ]
            areas.append(len(at))
            boxes.append(_box(at, map_) if at and row > first else [0.0] * 4)
    columns = torch.tensor(rows, dtype=torch.int32).reshape(-1, 4).T
    cells = torch.tensor(index, dtype=torch.int32).reshape(len(maps), grid[0] * grid[1])
    box = torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4)
    row_class, number, row_image, segment = columns
    return LookupResult(cells, row_class, number, row_image, segment, box, ints(areas))


def _box(at: list[tuple[int, int]], map_: Tensor) -> list[float]:
    height, width = map_.shape
    x, y = [p[0] for p in at], [p[1] for p in at]
    edges = [(min(x), width), (min(y), height), (max(x) + 1, width), (max(y) + 1, height)]
    return [float(torch.tensor(float(edge)) / torch.tensor(float(size))) for edge, size in edges]


def _cells(pixel_rows: list[list[int]], grid: tuple[int, int], reduce: str) -> list[int]:
    height, width = len(pixel_rows), len(pixel_rows[0])
    out = []
    for i in range(grid[0]):
        for j in range(grid[1]):
            if reduce == "nearest":
                y, x = (2 * i + 1) * height // (2 * grid[0]), (2 * j + 1) * width // (2 * grid[1])
                out.append(pixel_rows[y][x])
                continue
            ys = range(i * height // grid[0], -(-(i + 1) * height // grid[0]))
            xs = range(j * width // grid[1], -(-(j + 1) * width // grid[1]))
            count = Counter(pixel_rows[y][x] for y in ys for x in xs)
            out.append(min(count, key=lambda row: (-count[row], row)))
    return out


def samples() -> list[tuple[str, LookupInputs]]:
    """Return a few cases by name, as bundles of inputs."""
    names = ("mixed-sizes", "no-segments", "cells-overlap")
    return [(name, CASES[name].inputs("majority")) for name in names]
