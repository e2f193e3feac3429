"""What the processor makes of a batch: images by prompt, checked and padded crayons."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from collavo.panoptic.images import ImageInput
from collavo.panoptic.maps import MapInput
from collavo_kernels import CrayonMap


class Pictures(NamedTuple):
    """The images of a batch.

    Attributes:
        by_prompt: Those of each prompt.
        nested: Whether they were given so; else in one list.
    """

    by_prompt: list[list[Image.Image]]
    nested: bool

    @property
    def flat(self) -> list[Image.Image]:
        """All of them, in order."""
        return [one for own in self.by_prompt for one in own]

    @property
    def counts(self) -> list[int]:
        """How many each prompt has."""
        return [len(own) for own in self.by_prompt]

    def first(self, counts: Sequence[int]) -> Pictures:
        """Return so many of each prompt's.

        Args:
            counts: Of each prompt.
        """
        pairs = zip(self.by_prompt, counts, strict=True)
        return Pictures([own[:count] for own, count in pairs], self.nested)


def check_upright(size: tuple[int, int], picture: Image.Image, where: str) -> None:
    """Raise if a map has the picture's size with its sides exchanged.

    Maps may have any size, but this one is that of the photo as stored, before EXIF turned it.

    Args:
        size: Height and width of the map.
        picture: The image as it is shown.
        where: What to call the map in the message.

    Raises:
        ValueError: naming ``where`` and both sizes.
    """
    if size != (picture.height, picture.width) and size == picture.size:
        raise ValueError(
            f"{where}: expected the map of the image as shown, but the map of {size[1]}x{size[0]} "
            f"lies on its side, the image is {picture.width}x{picture.height}; turn the map as "
            "EXIF turns the image"
        )


def flatten_images(images: ImageInput | Sequence[Any] | None) -> Iterator[ImageInput]:
    """Go through one image, a list of images, or lists of images per prompt, in order.

    Args:
        images: None gives nothing.

    Raises:
        TypeError: if something is neither an image nor a path nor an array.
    """
    if images is None:
        return
    if isinstance(images, Image.Image | str | Path | np.ndarray):
        yield images
    elif isinstance(images, Sequence):
        for one in images:
            yield from flatten_images(one)
    else:
        raise TypeError(
            "images: expected PIL images, paths, NumPy arrays or lists of them, "
            f"got {type(images).__name__}"
        )


def images_per_prompt(images: ImageInput | Sequence[Any] | None) -> list[int] | None:
    """Return how many images each prompt has, where there is one list per prompt, else None.

    Args:
        images: As ``flatten_images`` takes them.
    """
    if not isinstance(images, list | tuple) or not images:
        return None
    if not all(isinstance(one, list | tuple) for one in images):
        return None
    return [len(list(flatten_images(one))) for one in images]


def maps_by_image(
    panoptic: MapInput | Sequence[MapInput | None] | None, images: int
) -> list[MapInput | None]:
    """Return one map, or None, for each image.

    Args:
        panoptic: What came: one for the only image, one for each, or none at all.
        images: How many images there are.

    Raises:
        TypeError: if one is no map.
        ValueError: if there are more or less.
    """
    if panoptic is None:
        return [None] * images
    if isinstance(panoptic, MapInput):
        panoptic = [panoptic]
    maps = list(panoptic)
    for position, one in enumerate(maps):
        if one is not None and not isinstance(one, MapInput):
            raise TypeError(
                f"panoptic[{position}]: expected a PanopticMap, a CrayonMap or None, "
                f"got {type(one).__name__}"
            )
    if len(maps) != images:
        raise ValueError(
            f"panoptic: expected one map, or None, for each of {images} images, got {len(maps)}"
        )
    return maps


def switch_by_prompt(
    wanted: bool | Sequence[bool] | None, default: bool, prompts: int
) -> list[bool]:
    """Return for each prompt whether it names its objects.

    Args:
        wanted: For all, for each, or None for the default.
        default: What None means.
        prompts: How many there are.

    Raises:
        ValueError: if there are more or less.
    """
    if wanted is None or isinstance(wanted, bool):
        return [default if wanted is None else wanted] * prompts
    if len(wanted) != prompts:
        raise ValueError(
            f"object_text: expected one value, or one for each of {prompts} prompts, "
            f"got {len(wanted)}"
        )
    return list(wanted)


def batch_crayon(crayons: Sequence[CrayonMap], counts: Sequence[int]) -> dict[str, Tensor]:
    """Turn the rows of a batch of images into the model's padded, batch-first inputs.

    Args:
        crayons: Rows and image tokens of each image, in the order of the samples.
        counts: How many of the images belong to each sample, in order.

    Returns:
        ``crayon_index`` int32 ``[B, P]``, the row, local to the sample, of each image token
        (-1 = none); ``crayon_class`` and ``crayon_number`` int32 ``[B, R]`` (class -1 = padding).

    Raises:
        ValueError: if the counts do not add up to the number of images.
    """
    if sum(counts) != len(crayons):
        raise ValueError(f"counts: expected {len(crayons)} images in all, got {sum(counts)}")
    bounds = [0, *torch.tensor(counts).cumsum(0).tolist()]
    samples = [crayons[first:last] for first, last in pairwise(bounds)]
    places = max(sum(one.num_cells for one in own) for own in samples)
    rows = max(sum(one.num_rows for one in own) for own in samples)
    index = torch.full((len(counts), places), -1, dtype=torch.int32)
    label = torch.full((len(counts), rows), -1, dtype=torch.int32)
    number = torch.zeros((len(counts), rows), dtype=torch.int32)
    for sample, own in enumerate(samples):
        place = row = 0
        for one in own:
            cells = one.row_index[0]
            shifted = torch.where(cells >= 0, cells + row, -1)
            index[sample, place : place + one.num_cells] = shifted
            label[sample, row : row + one.num_rows] = one.row_class
            number[sample, row : row + one.num_rows] = one.row_number
            place, row = place + one.num_cells, row + one.num_rows
    return {"crayon_index": index, "crayon_class": label, "crayon_number": number}


def as_kind(value: Tensor, kind: str | None) -> Any:
    """Return a tensor as what was asked for.

    Args:
        value: On the CPU.
        kind: ``"pt"``, ``"np"`` or None for lists.
    """
    if kind is None:
        return value.tolist()
    return value.numpy() if kind == "np" else value


def as_arrays(data: Mapping[str, Any], kind: str | None) -> dict[str, Any]:
    """Return a batch whose rows of numbers are arrays, which become tensors in a tenth of the time.

    Args:
        data: Lists of rows; others stay as they are, as do rows of different lengths.
        kind: What the batch is made for; lists stay where it is None.
    """
    arrays = dict(data)
    for key, rows in data.items():
        if kind and isinstance(rows, list) and len(set(map(len, rows))) == 1:
            arrays[key] = np.array(rows, dtype=np.int64)
    return arrays
