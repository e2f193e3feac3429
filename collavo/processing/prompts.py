"""What stands in a prompt: places of images, and the text of the objects that they show."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence

from collavo.processing.chat_templates import OBJECTS_MARKER
from collavo.processing.stretches import Piece


def count_images(
    samples: Sequence[Sequence[Piece]],
    names: Sequence[str],
    image_token: str,
    images: int,
    nested: list[int] | None,
) -> list[int]:
    """Return how many images each prompt has places for.

    Args:
        samples: Prompts.
        names: What to call them in messages.
        image_token: The placeholder of an image.
        images: How many images there are for all of them.
        nested: How many there are for each, where that is known.

    Raises:
        ValueError: if there are more or less than places, or an answer has one.
    """
    for name, pieces in zip(names, samples, strict=True):
        if any(piece.is_answer and image_token in piece.text for piece in pieces):
            raise ValueError(f"{name}: the chat template put {image_token!r} in an answer")
    counts = [sum(p.text.count(image_token) for p in pieces) for pieces in samples]
    if sum(counts) != images:
        raise ValueError(
            f"text: expected one {image_token!r} for each of {images} images, "
            f"got {sum(counts)} ({counts} per prompt)"
        )
    if nested is not None and nested != counts:
        raise ValueError(
            f"text: expected as many {image_token!r} per prompt as the lists in images "
            f"have images, {nested}, got {counts}"
        )
    return counts


def with_objects(
    pieces: Sequence[Piece],
    prefixes: Sequence[str],
    name: str,
    *,
    image_token: str,
    behind_image: str,
) -> list[Piece]:
    """Put the object text where it belongs.

    Args:
        pieces: A prompt.
        prefixes: The object text of each of its images.
        name: What to call it in messages.
        image_token: The placeholder of an image.
        behind_image: What closes an image, where something does.

    Raises:
        ValueError: if the prompt has markers, but not one for each image.
    """
    markers = sum(p.text.count(OBJECTS_MARKER) for p in pieces if not p.is_answer)
    if markers not in (0, len(prefixes)):
        raise ValueError(
            f"{name}: expected no {OBJECTS_MARKER!r}, or one for each of {len(prefixes)} "
            f"images, got {markers}"
        )
    if not markers and not any(prefixes):
        return list(pieces)
    remaining = iter(prefixes)
    # Blanks after the placeholder stay in front of the object text.
    image = rf"({re.escape(image_token)}(?:{re.escape(behind_image)})?\s*)"

    def replace(match: re.Match[str]) -> str:
        if match[1] is None:
            return next(remaining)
        return match[1] + ("" if markers else next(remaining))

    return [
        piece
        if piece.is_answer
        else dataclasses.replace(
            piece, text=re.sub(rf"{image}|{re.escape(OBJECTS_MARKER)}", replace, piece.text)
        )
        for piece in pieces
    ]
