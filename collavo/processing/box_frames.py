"""What boxes are fractions of: the image, or the square that it is padded to."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

from collavo.panoptic.text import Box, detections_by_image, object_prefix
from collavo.processing.blocks import Layout
from collavo.processing.geometry import square
from collavo_kernels import CrayonMap

BOX_FRAMES = ("image", "padded")
"""The image, or the square that it is padded to, with the image in the middle."""


def check_box_frame(box_frame: str, layout: Layout) -> None:
    """Raise unless boxes of images can be told in a frame.

    Args:
        box_frame: One of ``BOX_FRAMES``.
        layout: Where the image tokens of a picture look that is no square.

    Raises:
        ValueError: naming it, if it is another, or images are cropped and it is ``"padded"``.
    """
    _check_known(box_frame)
    if box_frame == "padded" and not any(block.all_seen for block in layout):
        raise ValueError(
            "box_frame: expected 'image', since the image processor crops images and boxes are "
            "those of what is left, got 'padded'"
        )


def object_text(crayon: CrayonMap, height: int, width: int, box_frame: str) -> str:
    """Return the object text of an image.

    Args:
        crayon: Of that image.
        height: Of the image, in pixels.
        width: Of the image, in pixels.
        box_frame: One of ``BOX_FRAMES``.
    """
    return object_prefix(
        [
            dataclasses.replace(one, box=box_in_frame(one.box, height, width, box_frame))
            for one in detections_by_image(crayon)[0]
        ]
    )


def box_in_frame(box: Sequence[float], height: int, width: int, box_frame: str) -> Box:
    """Return a box of an image in a frame.

    Args:
        box: x1, y1, x2, y2 in 0..1 of the image.
        height: Of the image, in pixels.
        width: Of the image, in pixels.
        box_frame: One of ``BOX_FRAMES``.

    Raises:
        ValueError: if there is no such frame.
    """
    _check_known(box_frame)
    if box_frame == "padded":
        return to_padded(box, height, width)
    x1, y1, x2, y2 = box
    return x1, y1, x2, y2


def _check_known(box_frame: str) -> None:
    if box_frame not in BOX_FRAMES:
        raise ValueError(f"box_frame: expected one of {', '.join(BOX_FRAMES)}, got {box_frame!r}")


def to_padded(box: Sequence[float], height: int, width: int) -> Box:
    """Return a box of an image as fractions of the square that the image is padded to.

    ``x' = (x width + (side - width) // 2) / side``, and y alike, with the longer side.

    Args:
        box: x1, y1, x2, y2 in 0..1 of the image.
        height: Of the image, in pixels.
        width: Of the image, in pixels.

    Raises:
        ValueError: if a side is not positive or there are not four numbers.

    Source: LLaVA-1.5's data, whose boxes of Visual Genome and RefCOCO are those of padded images.

    Example:
        >>> to_padded((0, 0, 1, 1), 50, 100)
        (0.0, 0.25, 1.0, 0.75)
    """
    return _moved(box, height, width, lambda x, start, length, side: (x * length + start) / side)


def from_padded(box: Sequence[float], height: int, width: int) -> Box:
    """Return a box of a padded square as fractions of the image in it; ``to_padded``'s inverse.

    Args:
        box: x1, y1, x2, y2 in 0..1 of the square. What lies in the padding is cut off.
        height: Of the image, in pixels.
        width: Of the image, in pixels.

    Raises:
        ValueError: if a side is not positive or there are not four numbers.

    Example:
        >>> from_padded((0.5, 0.25, 1, 1), 50, 100)
        (0.5, 0.0, 1.0, 1.0)
    """

    def back(x: float, start: int, length: int, side: int) -> float:
        return min(max((x * side - start) / length, 0.0), 1.0)

    return _moved(box, height, width, back)


def _moved(
    box: Sequence[float],
    height: int,
    width: int,
    move: Callable[[float, int, int, int], float],
) -> Box:
    if height < 1 or width < 1:
        raise ValueError(f"height, width: expected positive sizes, got {height} and {width}")
    if len(box) != 4:
        raise ValueError(f"box: expected x1, y1, x2, y2, got {list(box)}")
    top, left, side = square(height, width)
    x1, y1, x2, y2 = box
    return (
        move(x1, left, width, side),
        move(y1, top, height, side),
        move(x2, left, width, side),
        move(y2, top, height, side),
    )
