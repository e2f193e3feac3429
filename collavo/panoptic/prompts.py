"""Visual prompts: clicks, boxes, scribbles and masks drawn by a user become segments of a map.

A prompt has no size in pixels. Its coordinates are fractions 0..1 of the map's width (x) and height
(y), counted from the upper left corner, as in the boxes of the object text; so one prompt fits an
image, its COCO map and a segmenter's 35x35 map. A position in pixels becomes a fraction when it is
divided by the width or height: the pixel in column c of W columns has its centre at
``(c + 0.5) / W`` and its left edge at ``c / W``. Radii and widths are fractions of the longer side.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any

import numpy as np
import torch
from torch import Tensor

from collavo.panoptic.categories import NUM_CLASSES, class_index
from collavo.panoptic.maps import PanopticMap

Label = int | str | None

UNKNOWN_CLASS = -1
_MAX_ID = 2**31 - 1
# Where four cells of a 24x24 grid meet, a disc holds the majority of one if its radius is above
# sqrt(2 / pi) of a cell's side, 1 / 30 of the map's; the rest is for cells that are rounded up.
_LEAST_RADIUS = 1 / 28
_LEAST_MARGIN = 1.0
# Any radius or width from here on covers the whole map; no larger one is worth an overflow.
_WHOLE = 4.0


@dataclass(frozen=True)
class ClickPrompt:
    """A click: the pixels whose centre is at most ``radius`` from it, and the pixel under it.

    Args:
        x: Fraction of the width.
        y: Fraction of the height.
        radius: Fraction of the longer side. None takes 1/28 of it and one pixel: about the least
            with which a click anywhere owns a cell of a 24x24 or 35x35 grid by majority.
        label: A class's name or index 0..132; None is a segment of unknown class.

    Example:
        >>> click = ClickPrompt(0.5, 0.5, radius=0.2)
        >>> rasterize_prompts([click], size=(3, 4)).segmentation.tolist()
        [[0, 0, 0, 0], [0, 1, 1, 0], [0, 0, 0, 0]]
    """

    x: float
    y: float
    radius: float | None = None
    label: Label = None


@dataclass(frozen=True)
class BoxPrompt:
    """A box: the pixels whose centre lies in it; x2 and y2 are exclusive, as in ``row_box``.

    A side that is too thin to hold the centre of a pixel gets the pixel under its middle.

    Args:
        x1: Left edge, a fraction of the width.
        y1: Upper edge, a fraction of the height.
        x2: Right edge, above ``x1``.
        y2: Lower edge, above ``y1``.
        label: A class's name or index 0..132; None is a segment of unknown class.

    Example:
        >>> box = BoxPrompt(0.25, 0, 0.75, 0.5, label="horse")
        >>> rasterize_prompts([box], size=(2, 4)).segmentation.tolist()
        [[0, 1, 1, 0], [0, 0, 0, 0]]
    """

    x1: float
    y1: float
    x2: float
    y2: float
    label: Label = None


@dataclass(frozen=True)
class ScribblePrompt:
    """A stroke with round ends: the pixels whose centre is at most half a width from the line.

    It is at least one pixel wide, so that it has no gaps, and the pixels under its points belong
    to it.

    Args:
        points: Pairs ``(x, y)`` of fractions, joined by straight lines; one point is a dot.
        width: Fraction of the longer side; None takes twice a click's radius.
        label: A class's name or index 0..132; None is a segment of unknown class.

    Example:
        >>> stroke = ScribblePrompt([(0, 0), (1, 1)], width=0)
        >>> rasterize_prompts([stroke], size=(3, 3)).segmentation.tolist()
        [[1, 0, 0], [0, 1, 0], [0, 0, 1]]
    """

    points: Sequence[tuple[float, float]]
    width: float | None = None
    label: Label = None


@dataclass(frozen=True, eq=False)
class MaskPrompt:
    """A free mask: the pixels over whose centre the mask is set.

    A mask that is set over no centre, because it is much finer than the map, gets all pixels that
    it has a part in.

    Args:
        mask: bool ``[h, w]``, of any size; it is laid over the whole map.
        label: A class's name or index 0..132; None is a segment of unknown class.

    Example:
        >>> mask = MaskPrompt(np.array([[True], [False]]))
        >>> rasterize_prompts([mask], size=(2, 2)).segmentation.tolist()
        [[1, 1], [0, 0]]
    """

    mask: Tensor | np.ndarray[Any, Any]
    label: Label = None


VisualPrompt = ClickPrompt | BoxPrompt | ScribblePrompt | MaskPrompt


def rasterize_prompts(
    prompts: Sequence[VisualPrompt],
    panoptic: PanopticMap | None = None,
    *,
    size: tuple[int, int] | None = None,
) -> PanopticMap:
    """Make segments of what a user has drawn, over a panoptic map or over nothing.

    Later prompts lie over earlier ones and over the map. Their ids follow the largest id of the
    map, listed or not, so every segment keeps its row and its instance number; one that is covered
    completely stays listed, with area 0. A prompt with a class is numbered after the map's
    instances of that class, one without a class like the segments of unknown class.

    Args:
        prompts: The prompts in the order in which they were drawn; each covers at least one pixel.
        panoptic: The map below, in ids or in colours; it is not changed.
        size: Height and width in pixels of an empty map, instead of ``panoptic``.

    Returns:
        A map of the same size, in ids (int32 ``[H, W]``), that lists the map's segments and then
        one segment per prompt.

    Raises:
        TypeError: if ``prompts`` is no sequence of prompts, or a mask is not of bool.
        ValueError: naming the prompt and its field, if a coordinate is outside 0..1, a radius or a
            width is negative, a box, a scribble or a mask is empty or a class is unknown; if both
            or none of ``panoptic`` and ``size`` are given; if an id would not fit into int32.

    Source: LLaVA-Grounding's clicks, boxes and marks, on the road of the paper's Crayon Prompt.

    Example:
        >>> horse = BoxPrompt(0, 0.5, 0.5, 1, label="horse")
        >>> scene = rasterize_prompts([horse, ClickPrompt(1, 0, radius=0)], size=(2, 4))
        >>> scene.segmentation.tolist(), scene.segment_classes.tolist()
        ([[0, 0, 0, 2], [1, 1, 0, 0]], [17, -1])
    """
    below = _below(panoptic, size)
    ids = below.ids().clone()
    listed = below.segment_ids.tolist()
    last = max(0, int(ids.max()), *listed)
    if isinstance(prompts, VisualPrompt) or not isinstance(prompts, Sequence):
        raise TypeError(f"prompts: expected a list of prompts, got {type(prompts).__name__}")
    if last + len(prompts) > _MAX_ID:
        raise ValueError(
            f"prompts: {len(prompts)} ids after the map's largest, {last}, do not fit into int32"
        )
    classes = []
    for position, prompt in enumerate(prompts):
        where = f"prompts[{position}]"
        ids[_cover(prompt, where, *below.size)] = last + 1 + position
        classes.append(_class(prompt.label, f"{where}.label"))
    new_ids = range(last + 1, last + 1 + len(prompts))
    return PanopticMap.from_segments(
        ids, [*listed, *new_ids], [*below.segment_classes.tolist(), *classes]
    )


def _below(panoptic: PanopticMap | None, size: tuple[int, int] | None) -> PanopticMap:
    if (panoptic is None) == (size is None):
        found = "none" if size is None else "both"
        raise ValueError(f"panoptic, size: expected exactly one of the two, got {found}")
    if size is not None:
        whole = isinstance(size, Sequence) and all(isinstance(side, Integral) for side in size)
        if not whole or len(size) != 2 or min(size) < 1:
            raise ValueError(f"size: expected a positive height and width, got {size!r}")
        return PanopticMap.empty(int(size[0]), int(size[1]))
    if not isinstance(panoptic, PanopticMap):
        raise TypeError(f"panoptic: expected a PanopticMap, got {type(panoptic).__name__}")
    return panoptic


def _cover(prompt: VisualPrompt, where: str, height: int, width: int) -> Tensor:
    """Return which pixels a prompt covers, bool ``[height, width]``; at least one."""
    if isinstance(prompt, ClickPrompt):
        points = [_point((prompt.x, prompt.y), (f"{where}.x", f"{where}.y"))]
        radius = _length(prompt.radius, f"{where}.radius", 1, height, width)
        return _stroke(points, radius, height, width)
    if isinstance(prompt, ScribblePrompt):
        points = _points(prompt.points, f"{where}.points")
        half = _length(prompt.width, f"{where}.width", 2, height, width) / 2
        return _stroke(points, max(half, 0.5), height, width)
    if isinstance(prompt, BoxPrompt):
        return _box(prompt, where, height, width)
    if isinstance(prompt, MaskPrompt):
        return _mask(prompt.mask, f"{where}.mask", height, width)
    raise TypeError(f"{where}: expected a prompt, such as a BoxPrompt, got {type(prompt).__name__}")


def _stroke(
    points: Sequence[tuple[float, float]], radius: float, height: int, width: int
) -> Tensor:
    """Cover what is at most ``radius`` pixels from a line through points, and what they lie on."""
    cover = torch.zeros(height, width, dtype=torch.bool)
    for start, end in zip(points, points[1:] or points, strict=False):
        # Only the neighbourhood of the line is looked at: scribbles have thousands of points.
        (x1, x2), (y1, y2) = sorted((start[0], end[0])), sorted((start[1], end[1]))
        columns = _window(x1 * width - radius, x2 * width + radius, width)
        rows = _window(y1 * height - radius, y2 * height + radius, height)
        line = [(x * width, y * height) for x, y in (start, end)]
        cover[rows, columns] |= _near(line, radius, rows, columns)
    for x, y in points:
        cover[_under(y, height), _under(x, width)] = True
    return cover


def _near(
    line: Sequence[tuple[float, float]], radius: float, rows: slice, columns: slice
) -> Tensor:
    """Return which centres of a window are at most ``radius`` from a line, all in pixels."""
    (x1, y1), (x2, y2) = line
    dx, dy = x2 - x1, y2 - y1
    across = _centres(columns)[None, :] - x1
    down = _centres(rows)[:, None] - y1
    reach = radius * radius
    near = (across**2 + down**2 <= reach) | ((across - dx) ** 2 + (down - dy) ** 2 <= reach)
    # Between its ends the distance from the line is |cross| / length; no division, so that
    # coordinates which are exact in binary give exact results.
    squared = dx * dx + dy * dy
    along = across * dx + down * dy
    cross = across * dy - down * dx
    return near | ((along > 0) & (along < squared) & (cross**2 <= reach * squared))


def _box(box: BoxPrompt, where: str, height: int, width: int) -> Tensor:
    for name in ("x1", "y1", "x2", "y2"):
        _fraction(getattr(box, name), f"{where}.{name}")
    cover = torch.zeros(height, width, dtype=torch.bool)
    rows = _side((box.y1, box.y2), (f"{where}.y2", "y1"), height)
    cover[rows, _side((box.x1, box.x2), (f"{where}.x2", "x1"), width)] = True
    return cover


def _side(ends: tuple[float, float], names: tuple[str, str], length: int) -> slice:
    low, high = ends
    if low >= high:
        raise ValueError(f"{names[0]}: expected more than {names[1]}, {low}, got {high}")
    # The centre c + 0.5 lies in [low, high) from ceil(low - 0.5) on, below ceil(high - 0.5).
    first, stop = math.ceil(low * length - 0.5), math.ceil(high * length - 0.5)
    if first == stop:
        first = _under((low + high) / 2, length)
    return slice(first, max(stop, first + 1))


def _mask(mask: object, where: str, height: int, width: int) -> Tensor:
    if not isinstance(mask, Tensor | np.ndarray):
        raise TypeError(f"{where}: expected a tensor or an array, got {type(mask).__name__}")
    found = torch.as_tensor(mask.copy() if isinstance(mask, np.ndarray) else mask).detach().cpu()
    if found.dtype != torch.bool:
        raise TypeError(f"{where}: expected bool [h, w], got {found.dtype}")
    if found.dim() != 2:
        raise ValueError(f"{where}: expected bool [h, w], got {list(found.shape)}")
    if not found.any():
        raise ValueError(f"{where}: expected at least one pixel that is set, got none")
    rows = _sampled(height, found.shape[0])
    cover = found[rows][:, _sampled(width, found.shape[1])]
    if not cover.any():
        down, across = found.nonzero(as_tuple=True)
        rows, columns = _sampled(found.shape[0], height), _sampled(found.shape[1], width)
        cover[rows[down], columns[across]] = True
    return cover


def _sampled(length: int, source: int) -> Tensor:
    """Return which of ``source`` pixels lies under the centre of each of ``length`` pixels."""
    return (2 * torch.arange(length) + 1) * source // (2 * length)


def _centres(window: slice) -> Tensor:
    return torch.arange(window.start, window.stop, dtype=torch.float64) + 0.5


def _window(low: float, high: float, length: int) -> slice:
    first = min(max(math.floor(low), 0), length)
    return slice(first, max(first, min(math.ceil(high), length)))


def _under(fraction: float, length: int) -> int:
    return min(int(fraction * length), length - 1)


def _points(points: object, where: str) -> list[tuple[float, float]]:
    if not isinstance(points, Sequence | Tensor | np.ndarray) or isinstance(points, str):
        raise TypeError(f"{where}: expected pairs (x, y), got {type(points).__name__}")
    if len(points) == 0:
        raise ValueError(f"{where}: expected at least one point, got none")
    pairs = points if isinstance(points, Sequence) else points.tolist()
    return [_point(pair, (f"{where}[{i}]", f"{where}[{i}]")) for i, pair in enumerate(pairs)]


def _point(pair: object, names: tuple[str, str]) -> tuple[float, float]:
    if not isinstance(pair, Sequence | np.ndarray) or len(pair) != 2:
        raise ValueError(f"{names[0]}: expected a pair (x, y), got {pair!r}")
    return _fraction(pair[0], names[0]), _fraction(pair[1], names[1])


def _fraction(value: object, where: str) -> float:
    number = _number(value)
    if not 0 <= number <= 1:
        raise ValueError(
            f"{where}: expected a fraction 0..1 of the width or height, got {value!r}; "
            "divide pixels by the image's width or height"
        )
    return number


def _length(value: object, where: str, times: int, height: int, width: int) -> float:
    """Turn a fraction of the longer side into pixels; None is ``times`` the least radius."""
    longer = max(height, width)
    if value is None:
        return times * (_LEAST_RADIUS * longer + _LEAST_MARGIN)
    number = _number(value)
    if not 0 <= number < math.inf:
        raise ValueError(
            f"{where}: expected a fraction of the longer side, at least 0, got {value!r}"
        )
    return min(number, _WHOLE) * longer


def _number(value: object) -> float:
    """Return a number as a float, and anything else as NaN, which no comparison lets pass."""
    real = isinstance(value, Real) and not isinstance(value, bool)
    return float(value) if real else math.nan  # type: ignore[arg-type]


def _class(label: Label, where: str) -> int:
    if label is None:
        return UNKNOWN_CLASS
    if isinstance(label, str):
        try:
            return class_index(label)
        except ValueError:
            pass
    elif 0 <= (number := _number(label)) < NUM_CLASSES and isinstance(label, Integral):
        return int(number)
    raise ValueError(
        f"{where}: expected a COCO panoptic class, its index 0..{NUM_CLASSES - 1} or None, "
        f"got {label!r}"
    )
