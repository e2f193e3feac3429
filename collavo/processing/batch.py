"""What the processor makes of a batch: images by prompt, checked and padded crayons."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from collavo.panoptic.images import ImageInput
from collavo_kernels import CrayonMap


def check_crayon(
    crayon: CrayonMap, where: str, *, cells: int, num_classes: int, max_number: int
) -> None:
    """Raise unless this is the crayon of one image, as a lookup for these sizes gives it.

    Args:
        crayon: Rows and cells.
        where: What to call it in messages.
        cells: How many grid cells there have to be.
        num_classes: Number of classes.
        max_number: Largest instance number.

    Raises:
        ValueError: naming ``where`` and what differs.
    """
    if crayon.device.type != "cpu":
        raise ValueError(f"{where}: expected a CrayonMap on the CPU, got {crayon.device}")
    if crayon.num_images != 1 or bool((crayon.row_image != 0).any()):
        raise ValueError(
            f"{where}: expected a CrayonMap of one image without dead rows, got "
            f"{crayon.num_images} images and {crayon.num_rows} rows"
        )
    if crayon.num_cells != cells:
        raise ValueError(
            f"{where}: expected the processor's {cells} grid cells, got a CrayonMap with "
            f"{crayon.num_cells}; look the map up with the processor's grid"
        )
    for name, values, most in (
        ("a row's class", crayon.row_class, num_classes),
        ("a row's number", crayon.row_number, max_number),
        # In a batch a row outside would be one of another image.
        ("a cell's row_index", crayon.row_index, crayon.num_rows - 1),
    ):
        if values.numel() and int(values.max()) > most:
            raise ValueError(
                f"{where}: expected {name} to be at most {most}, as the processor's "
                f"crayon has it, got {int(values.max())}"
            )
        if values.numel() and int(values.min()) < 0:
            raise ValueError(
                f"{where}: expected {name} to be at least 0, got {int(values.min())}; look the map "
                "up again"
            )


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


def batch_crayon(crayon: CrayonMap, counts: Sequence[int]) -> dict[str, Tensor]:
    """Turn the rows of a batch of images into the model's padded, batch-first inputs.

    Args:
        crayon: Rows and cells of all images, in the order of the samples.
        counts: How many of the images belong to each sample, in order.

    Returns:
        ``crayon_index`` int32 ``[B, P]``, the row, local to the sample, of each image token
        (-1 = none); ``crayon_class`` and ``crayon_number`` int32 ``[B, R]`` (class -1 = padding).

    Raises:
        ValueError: if the counts do not add up to the number of images.
    """
    if sum(counts) != crayon.num_images:
        raise ValueError(f"counts: expected {crayon.num_images} images in all, got {sum(counts)}")
    rows_of_image = torch.bincount(crayon.row_image.long(), minlength=crayon.num_images)
    image_start = [0, *rows_of_image.cumsum(0).tolist()]
    cells = crayon.num_cells
    bounds = [0, *torch.tensor(counts).cumsum(0).tolist()]
    spans = [(image_start[a], image_start[b]) for a, b in pairwise(bounds)]
    batch, most = len(counts), max(stop - start for start, stop in spans)
    index = torch.full((batch, max(counts) * cells), -1, dtype=torch.int32)
    label = torch.full((batch, most), -1, dtype=torch.int32)
    number = torch.zeros((batch, most), dtype=torch.int32)
    for sample, (start, stop) in enumerate(spans):
        own = crayon.row_index[bounds[sample] : bounds[sample + 1]].reshape(-1)
        index[sample, : own.numel()] = own - start
        label[sample, : stop - start] = crayon.row_class[start:stop]
        number[sample, : stop - start] = crayon.row_number[start:stop]
    return {"crayon_index": index, "crayon_class": label, "crayon_number": number}
