"""Where a picture lies in what an image processor makes of it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import collavo._requirements  # noqa: F401  (before what it checks)

from PIL import Image
from transformers.models.clip import image_processing_pil_clip

from collavo.processing.blocks import Axis, Block


def make_image_processor(image_size: int = 490, *, mode: str = "squash") -> Any:
    """Make a CLIP image processor that needs Pillow only.

    Args:
        image_size: Height and width of the vision tower's input in pixels.
        mode: ``"squash"`` resizes the whole image to a square, as the released code does;
            ``"crop"`` resizes the shorter side and cuts out the centre, as CLIP does.

    Raises:
        ValueError: if the mode is unknown.

    Example:
        >>> make_image_processor(336, mode="crop").size["shortest_edge"]
        336
    """
    square = {"height": image_size, "width": image_size}
    processor: Any = image_processing_pil_clip.CLIPImageProcessorPil
    if mode == "squash":
        # The released code resizes with torchvision's default, which is bilinear.
        bilinear = Image.Resampling.BILINEAR
        return processor(size=square, do_center_crop=False, resample=bilinear)
    if mode == "crop":
        return processor(size={"shortest_edge": image_size}, crop_size=square)
    raise ValueError(f"mode: expected squash or crop, got {mode!r}")


class Frame(NamedTuple):
    """What an image processor hands on, in pixels of it, and where the picture lies in it.

    Args:
        height: Of what is handed on.
        width: Of what is handed on.
        top: Where the picture starts; negative where it is cropped.
        left: Where the picture starts.
        tall: How high the whole picture is there.
        wide: How wide the whole picture is there.
    """

    height: int
    width: int
    top: float
    left: float
    tall: float
    wide: float


def frame(image_processor: Any, height: int, width: int) -> Frame:
    """Return where a picture lies in what an image processor makes of it.

    Args:
        image_processor: A transformers image processor that resizes to a fixed size, or by the
            shorter side and cuts out the centre; LLaVA's may pad to a square before.
        height: Of the picture, in pixels.
        width: Of the picture, in pixels.

    Raises:
        ValueError: if it resizes in another way.

    Example:
        >>> frame(make_image_processor(4, mode="crop"), 10, 20)
        Frame(height=4, width=4, top=0.0, left=-2.0, tall=4, wide=8)
    """
    if not getattr(image_processor, "do_resize", True):
        raise ValueError("image_processor: expected do_resize=True, got False")
    top = left = 0
    canvas = (height, width)
    if getattr(image_processor, "do_pad", False):
        if not type(image_processor).__name__.startswith("LlavaImageProcessor"):
            raise ValueError("image_processor: expected do_pad=False, got True")
        top, left, side = square(height, width)
        canvas = (side, side)
    resized = _resized(dict(image_processor.size or {}), *canvas)
    placed = Frame(
        *resized,
        top * resized[0] / canvas[0],
        left * resized[1] / canvas[1],
        height * resized[0] / canvas[0] if canvas[0] != height else resized[0],
        width * resized[1] / canvas[1] if canvas[1] != width else resized[1],
    )
    if not getattr(image_processor, "do_center_crop", False):
        if not dict(image_processor.size).get("height"):
            raise ValueError("image_processor: expected do_center_crop with shortest_edge")
        return placed
    crop = dict(image_processor.crop_size or {})
    if not (crop.get("height") and crop.get("width")):
        raise ValueError(f"image_processor: expected crop_size with height and width, got {crop}")
    return placed._replace(
        height=crop["height"],
        width=crop["width"],
        top=placed.top - _before(placed.height, crop["height"], "height"),
        left=placed.left - _before(placed.width, crop["width"], "width"),
    )


def square(height: int, width: int) -> tuple[int, int, int]:
    """Return where a picture starts in the square that it is padded to, and the square's side.

    Args:
        height: Of the picture.
        width: Of the picture.
    """
    side = max(height, width)
    return (side - height) // 2, (side - width) // 2, side


def _resized(size: Mapping[str, int], height: int, width: int) -> tuple[int, int]:
    if size.get("height") and size.get("width"):
        return size["height"], size["width"]
    if size.get("shortest_edge") and not size.get("longest_edge"):
        edge, short = size["shortest_edge"], min(height, width)
        return int(edge * height / short), int(edge * width / short)
    raise ValueError(
        "image_processor: expected size with height and width, or with shortest_edge, "
        f"got {dict(size)}"
    )


def _before(resized: int, kept: int, name: str) -> int:
    if kept > resized:
        raise ValueError(
            f"image_processor: expected a crop_size of at most the resized {name} {resized}, "
            f"got {kept}"
        )
    return (resized - kept) // 2


def even_grid(placed: Frame, grid: tuple[int, int]) -> Block:
    """Return the image tokens of a frame that an even grid covers.

    Args:
        placed: What the image processor hands on.
        grid: Rows and columns.
    """
    rows, columns = grid
    tall, wide = rows / placed.height, columns / placed.width  # cells to a pixel
    return Block(
        Axis.even(rows, 1, placed.top * tall, placed.tall * rows / placed.height),
        Axis.even(columns, 1, placed.left * wide, placed.wide * columns / placed.width),
    )
