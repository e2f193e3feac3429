"""Drawn scenes: small pictures of coloured shapes that carry COCO class names.

Ten classes are made of five shapes and five hues so that every class shares its shape with one
class and its hue with another: neither alone names the object. Colour jitter and strong pixel noise
make the pictures hard for a small vision tower, which is the premise of the Crayon Prompt.
"""

from __future__ import annotations

import colorsys
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

ImageArray = npt.NDArray[np.uint8]
MaskArray = npt.NDArray[np.bool_]
IdArray = npt.NDArray[np.int32]

THING_NAMES = (
    "person", "car", "dog", "horse", "cat",
    "bus", "cow", "bird", "sheep", "boat",
)  # fmt: skip
STUFF_NAMES = ("sky", "grass", "sea")

SIZE = 48
"""Width and height of a scene in pixels."""
SNAP = 4
"""Objects start and end at multiples of this many pixels, so that few coordinates occur."""

_HUES = (0.0, 0.13, 0.36, 0.60, 0.80)
_STUFF_COLOURS = ((0.55, 0.62, 0.70), (0.42, 0.52, 0.40), (0.45, 0.47, 0.60))


@dataclass(frozen=True)
class SceneStyle:
    """How hard a scene is to see.

    Args:
        hue_jitter: Standard deviation of an object's hue, in turns of the colour circle.
        noise: Standard deviation of the pixel noise, in units of 0..1.
        sizes: Possible widths and heights of objects in pixels, multiples of ``SNAP``.
        max_objects: Largest number of objects; at least two are drawn.
    """

    hue_jitter: float = 0.035
    noise: float = 0.22
    sizes: tuple[int, ...] = (12, 16, 20)
    max_objects: int = 4


@dataclass(frozen=True)
class SceneObject:
    """One segment: its id in the map, its display name and its pixel box (x1, y1, x2, y2)."""

    segment_id: int
    name: str
    is_thing: bool
    box: tuple[int, int, int, int]


@dataclass(frozen=True)
class Scene:
    """A drawn picture with its panoptic truth.

    Args:
        image: uint8 ``[SIZE, SIZE, 3]``.
        segmentation: int32 ``[SIZE, SIZE]``, the segment id of every pixel.
        segments: One entry per segment, stuff first, ascending segment id.
    """

    image: ImageArray
    segmentation: IdArray
    segments: tuple[SceneObject, ...]


def _disc(y: npt.NDArray[np.float64], x: npt.NDArray[np.float64]) -> MaskArray:
    return x * x + y * y <= 1.0


def _square(y: npt.NDArray[np.float64], x: npt.NDArray[np.float64]) -> MaskArray:
    return np.ones_like(x, dtype=bool)


def _triangle(y: npt.NDArray[np.float64], x: npt.NDArray[np.float64]) -> MaskArray:
    return np.abs(x) <= (y + 1.0) / 2.0 + 0.08


def _cross(y: npt.NDArray[np.float64], x: npt.NDArray[np.float64]) -> MaskArray:
    return (np.abs(x) <= 0.36) | (np.abs(y) <= 0.36)


def _ring(y: npt.NDArray[np.float64], x: npt.NDArray[np.float64]) -> MaskArray:
    return (np.maximum(np.abs(x), np.abs(y)) >= 0.5) & (np.abs(x) <= 1.0)


_SHAPES: tuple[Callable[..., MaskArray], ...] = (_disc, _square, _triangle, _cross, _ring)


def shape_and_hue(name: str) -> tuple[int, int]:
    """Return the indices of a thing's shape and hue; each index belongs to exactly two classes."""
    index = THING_NAMES.index(name)
    shape = index % len(_SHAPES)
    return shape, (shape + index // len(_SHAPES)) % len(_HUES)


def _shape_mask(shape: int, height: int, width: int) -> MaskArray:
    y = (np.arange(height) + 0.5) / height * 2.0 - 1.0
    x = (np.arange(width) + 0.5) / width * 2.0 - 1.0
    mask = _SHAPES[shape](*np.meshgrid(y, x, indexing="ij"))
    # The box of the mask is the box that was placed: its outer rows and columns are never empty.
    for edge in (mask[0], mask[-1]):
        edge[width // 2] |= not edge.any()
    for edge in (mask[:, 0], mask[:, -1]):
        edge[height // 2] |= not edge.any()
    return mask


def _place(
    rng: np.random.Generator, taken: list[tuple[int, int, int, int]], style: SceneStyle
) -> tuple[int, int, int, int] | None:
    """Find a free box for one more object, or None when the scene is full."""
    for _ in range(20):
        width, height = (int(value) for value in rng.choice(style.sizes, size=2))
        x1 = int(rng.integers(0, (SIZE - width) // SNAP + 1)) * SNAP
        y1 = int(rng.integers(0, (SIZE - height) // SNAP + 1)) * SNAP
        box = (x1, y1, x1 + width, y1 + height)
        apart = (
            box[2] <= other[0] or other[2] <= box[0] or box[3] <= other[1] or other[3] <= box[1]
            for other in taken
        )
        if all(apart):
            return box
    return None


def _paint_stuff(
    rng: np.random.Generator, canvas: npt.NDArray[np.float64], segmentation: IdArray
) -> list[SceneObject]:
    """Fill the background: one stuff class, or two with a horizon."""
    horizon = int(rng.choice((0, 16, 24, 32)))
    names = rng.choice(len(STUFF_NAMES), size=2, replace=False)
    bands = [(0, SIZE)] if horizon == 0 else [(0, horizon), (horizon, SIZE)]
    segments = []
    for number, (top, bottom) in enumerate(bands, start=1):
        stuff = int(names[number - 1])
        canvas[top:bottom] = np.asarray(_STUFF_COLOURS[stuff]) + rng.normal(0.0, 0.03, size=3)
        segmentation[top:bottom] = number
        segments.append(SceneObject(number, STUFF_NAMES[stuff], False, (0, top, SIZE, bottom)))
    return segments


def make_scene(rng: np.random.Generator, style: SceneStyle | None = None) -> Scene:
    """Draw one scene.

    Args:
        rng: Source of every random choice: the same state draws the same scene.
        style: Difficulty; None takes the defaults.

    Example:
        >>> scene = make_scene(np.random.default_rng(0))
        >>> scene.image.shape, scene.segmentation.shape
        ((48, 48, 3), (48, 48))
    """
    style = style or SceneStyle()
    canvas = np.zeros((SIZE, SIZE, 3))
    segmentation = np.zeros((SIZE, SIZE), dtype=np.int32)
    segments = _paint_stuff(rng, canvas, segmentation)
    boxes: list[tuple[int, int, int, int]] = []
    for _ in range(int(rng.integers(2, style.max_objects + 1))):
        box = _place(rng, boxes, style)
        if box is None:
            continue
        boxes.append(box)
        name = THING_NAMES[int(rng.integers(len(THING_NAMES)))]
        shape, hue = shape_and_hue(name)
        x1, y1, x2, y2 = box
        mask = _shape_mask(shape, y2 - y1, x2 - x1)
        colour = colorsys.hsv_to_rgb(
            (_HUES[hue] + rng.normal(0.0, style.hue_jitter)) % 1.0,
            float(rng.uniform(0.65, 1.0)),
            float(rng.uniform(0.6, 1.0)),
        )
        canvas[y1:y2, x1:x2][mask] = colour
        identifier = len(segments) + 1
        segmentation[y1:y2, x1:x2][mask] = identifier
        segments.append(SceneObject(identifier, name, True, box))
    canvas += rng.normal(0.0, style.noise, size=canvas.shape)
    image = (np.clip(canvas, 0.0, 1.0) * 255.0).round().astype(np.uint8)
    return Scene(image, segmentation, tuple(_with_true_boxes(segments, segmentation)))


def _with_true_boxes(segments: list[SceneObject], segmentation: IdArray) -> list[SceneObject]:
    """Give every segment the box of its visible pixels; stuff hidden by objects drops out."""
    visible = []
    for segment in segments:
        rows, columns = np.nonzero(segmentation == segment.segment_id)
        if rows.size:
            low, high = (int(columns.min()), int(rows.min())), (columns.max(), rows.max())
            box = (*low, int(high[0]) + 1, int(high[1]) + 1)
            visible.append(SceneObject(segment.segment_id, segment.name, segment.is_thing, box))
    return visible
