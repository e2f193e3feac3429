"""The part of an image that an image processor keeps, and the same part of a panoptic map."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeAlias

import collavo._requirements  # noqa: F401  (before what it checks)

from PIL import Image
from transformers.models.clip import image_processing_pil_clip

from collavo.panoptic.maps import PanopticMap

Region: TypeAlias = tuple[int, int, int, int]


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


def visible_region(image_processor: Any, height: int, width: int) -> Region:
    """Return the part of an image that an image processor keeps.

    Args:
        image_processor: A transformers image processor.
        height: Of the image or map, in pixels.
        width: Of the image or map, in pixels.

    Returns:
        Top, left, bottom and right in pixels of the image or map, the last two exclusive.

    Raises:
        ValueError: if the processor resizes neither to a fixed size nor by the shorter side.
    """
    size: Mapping[str, int] = dict(image_processor.size or {})
    if not getattr(image_processor, "do_resize", True):
        raise ValueError("image_processor: expected do_resize=True, got False")
    if size.get("height") and size.get("width"):
        resized = (size["height"], size["width"])
    elif size.get("shortest_edge"):
        edge, short = size["shortest_edge"], min(height, width)
        resized = (int(height * edge / short), int(width * edge / short))
    else:
        raise ValueError(
            "image_processor: expected size with height and width, or with shortest_edge, "
            f"got {dict(size)}"
        )
    if not getattr(image_processor, "do_center_crop", False):
        if not size.get("height"):
            raise ValueError("image_processor: expected do_center_crop with shortest_edge")
        return 0, 0, height, width
    crop = image_processor.crop_size
    rows = _central(resized[0], crop["height"], height, "height")
    columns = _central(resized[1], crop["width"], width, "width")
    return rows[0], columns[0], rows[1], columns[1]


def _central(resized: int, kept: int, source: int, name: str) -> tuple[int, int]:
    if kept > resized:
        raise ValueError(
            f"image_processor: expected a crop_size of at most the resized {name} {resized}, "
            f"got {kept}"
        )
    first = (resized - kept) // 2
    start = round(first * source / resized)
    stop = round((first + kept) * source / resized)
    return start, max(stop, start + 1)


def crop_map(panoptic: PanopticMap, region: Region) -> PanopticMap:
    """Cut a region out of a panoptic map; its list of segments stays.

    Args:
        panoptic: The map.
        region: Top, left, bottom and right in pixels, the last two exclusive.
    """
    top, left, bottom, right = region
    if region == (0, 0, *panoptic.size):
        return panoptic
    cut = panoptic.segmentation[top:bottom, left:right].contiguous()
    return PanopticMap(cut, panoptic.segment_ids, panoptic.segment_classes)
