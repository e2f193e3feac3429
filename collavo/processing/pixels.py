"""Pixels of an image processor, bit for bit as transformers makes them, in less time.

What follows resizing is a function of one byte of one channel, so a table of 256 values does it;
pictures stay Pillow's until then, where transformers changes to arrays and back between steps; and
rows of padding are not resized along themselves, which leaves a colour as it is.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import collavo._requirements  # noqa: F401  (before what it checks)

import numpy as np
from PIL import Image
from transformers import BatchFeature
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil

from collavo.processing.geometry import resized_size, square


class _FromPillow:
    """Makes pixels of RGB pictures of Pillow; everything else is left to transformers."""

    stock: type[Any]

    def to_dict(self) -> dict[str, Any]:
        """Return the settings under the name of transformers' class, which reads them."""
        values: dict[str, Any] = super().to_dict()  # type: ignore[misc]
        return {**values, "image_processor_type": self.stock.__name__.removesuffix("Pil")}

    def _preprocess_image_like_inputs(self, images: Any, *args: Any, **kwargs: Any) -> BatchFeature:
        pictures = [images] if isinstance(images, Image.Image) else images
        if not args and isinstance(pictures, list | tuple) and pictures:
            tried = [self._pixels(picture, kwargs) for picture in pictures]
            made = [pixels for pixels in tried if pixels is not None]
            if len(made) == len(tried):
                kind = kwargs["return_tensors"]
                values = np.stack(made) if kind in ("pt", "np") and _one_shape(made) else made
                return BatchFeature({"pixel_values": values}, tensor_type=kind)
        plain: BatchFeature = super()._preprocess_image_like_inputs(  # type: ignore[misc]
            images, *args, **kwargs
        )
        return plain

    def _pixels(self, picture: Any, settings: dict[str, Any]) -> np.ndarray[Any, Any] | None:
        """Return the pixels ``[3, H, W]`` of a picture, or None where transformers has to."""
        if not isinstance(picture, Image.Image) or picture.mode != "RGB":
            return None
        if not settings["do_resize"] or not isinstance(settings["resample"], int):
            return None
        pads = bool(settings["do_pad"])
        if pads and (self.stock is not LlavaImageProcessorPil or not settings["image_mean"]):
            return None
        try:
            side = max(picture.size)
            canvas = (side, side) if pads else (picture.height, picture.width)
            height, width = resized_size(dict(settings["size"]), *canvas)
            resample = Image.Resampling(settings["resample"])
        except ValueError:  # transformers knows more ways, and says what is wrong
            return None
        if pads:
            colour = tuple(int(part * 255) for part in settings["image_mean"])
            picture = _padded(picture, colour, (width, height), resample)
        else:
            picture = picture.resize((width, height), resample)
        if settings["do_center_crop"]:
            crop = settings["crop_size"]
            if crop is None or not (0 < (crop.height or 0) <= height):
                return None
            if not (0 < (crop.width or 0) <= width):
                return None
            left, top = (width - crop.width) // 2, (height - crop.height) // 2
            picture = picture.crop((left, top, left + crop.width, top + crop.height))
        names = ("do_rescale", "rescale_factor", "do_normalize", "image_mean", "image_std")
        tables = _tables(*(_hashable(settings[name]) for name in names))
        made = np.empty((3, picture.height, picture.width), tables.dtype)
        for channel, (table, samples) in enumerate(zip(tables, picture.split(), strict=True)):
            np.take(table, np.asarray(samples), out=made[channel], mode="clip")
        return made


class PadImageProcessor(_FromPillow, LlavaImageProcessorPil):  # type: ignore[misc]
    """LLaVA's image processor, which may pad a picture to a square first; saved under its name."""

    stock = LlavaImageProcessorPil


class CropImageProcessor(_FromPillow, CLIPImageProcessorPil):  # type: ignore[misc]
    """CLIP's image processor, saved under its name."""

    stock = CLIPImageProcessorPil


def from_pillow(image_processor: Any) -> Any:
    """Return an image processor that makes the same pixels in less time, or the one given.

    Args:
        image_processor: Of any class; CLIP's and LLaVA's for Pillow are exchanged.
    """
    for kind in (PadImageProcessor, CropImageProcessor):
        if type(image_processor) is kind.stock:
            return kind.from_dict(image_processor.to_dict())
    return image_processor


def _padded(
    picture: Image.Image,
    colour: tuple[int, ...],
    size: tuple[int, int],
    resample: Image.Resampling,
) -> Image.Image:
    """Pad a picture to a square and resize that."""
    top, left, side = square(picture.height, picture.width)
    if top:
        # Pillow resizes along rows, rounds to bytes, and then along columns.
        picture = picture.resize((size[0], picture.height), resample)
        left = 0
    canvas = Image.new("RGB", (picture.width if top else side, side), colour)
    canvas.paste(picture, (left, top))
    return canvas.resize(size, resample)


def _one_shape(made: Sequence[Any]) -> bool:
    return len({one.shape for one in made}) == 1


def _hashable(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


@lru_cache(maxsize=16)
def _tables(
    do_rescale: bool,
    rescale_factor: float,
    do_normalize: bool,
    image_mean: float | tuple[float, ...] | None,
    image_std: float | tuple[float, ...] | None,
) -> np.ndarray[Any, Any]:
    """Return what transformers makes of each byte of each channel, ``[3, 256]``."""
    samples = np.arange(256, dtype=np.uint8).reshape(1, 16, 16).repeat(3, axis=0)
    if do_rescale or do_normalize:
        steps: Any = CLIPImageProcessorPil()
        if do_rescale:
            samples = steps.rescale(samples, rescale_factor)
        if do_normalize:
            samples = steps.normalize(samples, image_mean, image_std)
    return samples.reshape(3, 256)
