"""Where a picture lies in what an image processor makes of it."""

from __future__ import annotations

from typing import Any, NamedTuple

import collavo._requirements  # noqa: F401  (before what it checks)

from PIL import Image

from collavo.processing.blocks import Axis, Block
from collavo.processing.geometry import resized_size, square
from collavo.processing.pixels import CropImageProcessor, PadImageProcessor


def make_image_processor(image_size: int = 490, *, mode: str = "squash") -> Any:
    """Make a CLIP or LLaVA image processor that needs Pillow only.

    Args:
        image_size: Height and width of the vision tower's input in pixels.
        mode: ``"squash"`` resizes the whole image to a square, as the released code does;
            ``"crop"`` resizes the shorter side and cuts out the centre, as CLIP and LLaVA-1 do;
            ``"pad"`` pads to a square of the mean's colour and resizes that, as LLaVA-1.5 does.

    Raises:
        ValueError: if the mode is unknown.

    Example:
        >>> make_image_processor(336, mode="crop").size["shortest_edge"]
        336
    """
    square = {"height": image_size, "width": image_size}
    if mode == "squash":
        # The released code resizes with torchvision's default, which is bilinear.
        bilinear = Image.Resampling.BILINEAR
        return CropImageProcessor(size=square, do_center_crop=False, resample=bilinear)
    if mode == "crop":
        return CropImageProcessor(size={"shortest_edge": image_size}, crop_size=square)
    if mode == "pad":
        shortest = {"shortest_edge": image_size}
        return PadImageProcessor(do_pad=True, size=shortest, crop_size=square)
    raise ValueError(f"mode: expected squash, crop or pad, got {mode!r}")


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
        ValueError: if it resizes in another way, or is of a class that moves pictures in ways of
            its own.

    Example:
        >>> frame(make_image_processor(4, mode="crop"), 10, 20)
        Frame(height=4, width=4, top=0.0, left=-2.0, tall=4, wide=8)
    """
    pads = _pads_to_square(image_processor)
    if not getattr(image_processor, "do_resize", True):
        raise ValueError("image_processor: expected do_resize=True, got False")
    top = left = 0
    canvas = (height, width)
    if getattr(image_processor, "do_pad", False):
        if not pads:
            raise ValueError("image_processor: expected do_pad=False, got True")
        top, left, side = square(height, width)
        canvas = (side, side)
    resized = resized_size(dict(image_processor.size or {}), *canvas)
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


# Whatever moves a picture in transformers' image processors, and whose code for it is known here.
_STEPS = (
    "__call__",
    "preprocess",
    "process_image",
    "resize",
    "center_crop",
    "pad",
    "pad_to_square",
    "_prepare_images_structure",
    "_prepare_image_like_inputs",
    "_preprocess_image_like_inputs",
    "_preprocess_image",
    "_preprocess",
)
_LLAVA = (
    "transformers.models.llava.image_processing_llava",
    "transformers.models.llava.image_processing_pil_llava",
)
_KNOWN = {
    "collavo.processing.pixels",
    "transformers.image_processing_backends",
    "transformers.image_processing_base",
    "transformers.image_processing_utils",
    "transformers.models.video_llava.image_processing_video_llava",
    *_LLAVA,
}


def _pads_to_square(image_processor: Any) -> bool:
    """Return whether ``do_pad`` means LLaVA's square, for a class whose settings say everything.

    Args:
        image_processor: Of transformers.

    Raises:
        ValueError: naming the class and the method, if it does anything in a way of its own.
    """
    kinds = type(image_processor).__mro__
    for step in _STEPS:
        owner = next((kind for kind in kinds if step in vars(kind)), None)
        if owner is not None and owner.__module__ not in _KNOWN:
            raise ValueError(
                "image_processor: expected one that resizes and crops as CLIP's, or pads as "
                f"LLaVA's, got {kinds[0].__name__}, whose {step} is {owner.__name__}'s own"
            )
    return any(kind.__module__ in _LLAVA for kind in kinds)


def _before(resized: int, kept: int, name: str) -> int:
    if kept > resized:
        raise ValueError(
            f"image_processor: expected a crop_size of at most the resized {name} {resized}, "
            f"got {kept}"
        )
    return (resized - kept) // 2


def padded_grid(height: int, width: int, grid: tuple[int, int]) -> Block:
    """Return the image tokens of a picture that is padded to a square, whatever the square's size.

    Args:
        height: Of the picture, in pixels.
        width: Of the picture.
        grid: Rows and columns.
    """
    top, left, side = square(height, width)
    return even_grid(Frame(side, side, top, left, height, width), grid)


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
