"""What the processor makes of a batch: images by prompt, checked and padded crayons, labels."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, TypeAlias

import torch
from PIL import Image
from torch import Tensor

from collavo_kernels import CrayonMap

ImageInput: TypeAlias = Image.Image | str | Path
Conversation: TypeAlias = Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class Piece:
    """A stretch of a prompt, and whether the model has to say it."""

    text: str
    is_answer: bool


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
        ("class", crayon.row_class, num_classes),
        ("number", crayon.row_number, max_number),
    ):
        if values.numel() and int(values.max()) > most:
            raise ValueError(
                f"{where}: expected a row's {name} to be at most {most}, as the processor's "
                f"crayon has it, got {int(values.max())}"
            )


def flatten_images(images: ImageInput | Sequence[Any] | None) -> Iterator[ImageInput]:
    """Go through one image, a list of images, or lists of images per prompt, in order.

    Args:
        images: None gives nothing.

    Raises:
        TypeError: if something is neither an image nor a path.
    """
    if images is None:
        return
    if isinstance(images, Image.Image | str | Path):
        yield images
    elif isinstance(images, Sequence):
        for one in images:
            yield from flatten_images(one)
    else:
        raise TypeError(
            f"images: expected PIL images, paths or lists of them, got {type(images).__name__}"
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


def answer_labels(
    pieces: Sequence[Piece],
    input_ids: Sequence[int],
    offsets: Sequence[tuple[int, int]],
    ignore_index: int,
) -> list[int]:
    """Keep the token ids of answers and put ``ignore_index`` everywhere else.

    Args:
        pieces: The prompt's text, in order.
        input_ids: Its token ids.
        offsets: First and one-past-last character of every token; equal for added ones.
        ignore_index: What the loss leaves out.
    """
    spans, position = [], 0
    for piece in pieces:
        if piece.is_answer:
            spans.append((position, position + len(piece.text)))
        position += len(piece.text)
    labels, current = [], 0
    for token, (start, stop) in zip(input_ids, offsets, strict=True):
        if stop > start:
            while current < len(spans) and spans[current][1] <= start:
                current += 1
        inside = current < len(spans) and start < stop and stop > spans[current][0]
        labels.append(token if inside else ignore_index)
    return labels
