"""Sizes of resized pictures, and the square that a picture is padded to."""

from __future__ import annotations

from collections.abc import Mapping


def square(height: int, width: int) -> tuple[int, int, int]:
    """Return where a picture starts in the square that it is padded to, and the square's side.

    Args:
        height: Of the picture.
        width: Of the picture.
    """
    side = max(height, width)
    return (side - height) // 2, (side - width) // 2, side


def resized_size(size: Mapping[str, int], height: int, width: int) -> tuple[int, int]:
    """Return height and width of a picture as transformers' image processors resize it.

    Args:
        size: ``height`` and ``width``, or ``shortest_edge`` alone.
        height: Of the picture.
        width: Of the picture.

    Raises:
        ValueError: if ``size`` says anything else.
    """
    if set(size) == {"height", "width"} and min(size.values()) > 0:
        return size["height"], size["width"]
    if set(size) == {"shortest_edge"} and size["shortest_edge"] > 0:
        edge, short = size["shortest_edge"], min(height, width)
        return int(edge * height / short), int(edge * width / short)
    raise ValueError(
        "image_processor: expected size with height and width, or with shortest_edge, "
        f"got {dict(size)}"
    )
