"""From batch-first model inputs to what the decoder's layers read."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from collavo_kernels._rows import checked_index


class CrayonRows(NamedTuple):
    """The crayon inputs of a batch with its rows laid end to end.

    Attributes:
        row_class: int ``[T]``, T = B R; a row that only pads has class -1 and no token.
        row_number: int ``[T]``.
        row_index: int32 ``[B, S]``, -1 where a token has no row.
    """

    row_class: Tensor
    row_number: Tensor
    row_index: Tensor


def flatten_rows(
    image_tokens: Tensor, crayon_index: Tensor, crayon_class: Tensor, crayon_number: Tensor
) -> CrayonRows:
    """Lay the samples' padded rows end to end and give every image token its row in them.

    Nothing depends on values, so nothing synchronises with a GPU and the shapes are those of the
    inputs.

    Args:
        image_tokens: bool ``[B, S]``, True at image tokens.
        crayon_index: int ``[B, P]``: row, local to the sample, of each of its image tokens in
            order; -1 = none.
        crayon_class: int ``[B, R]``: 0 = unknown, class c is c + 1, -1 = a row that only pads.
        crayon_number: int ``[B, R]``: instance number, 0 = unknown.

    Raises:
        ValueError: if shapes disagree; on the CPU also if a sample has more image tokens than P, or
            an entry of ``crayon_index`` is no row of its sample.

    Example:
        >>> import torch
        >>> tokens = torch.tensor([[False, True, True]])
        >>> index, classes = torch.tensor([[1, 0]]), torch.tensor([[0, 3]])
        >>> flatten_rows(tokens, index, classes, torch.tensor([[0, 1]])).row_index
        tensor([[-1,  1,  0]], dtype=torch.int32)
    """
    _check_shapes(image_tokens, crayon_index, crayon_class, crayon_number)
    batch, rows = crayon_class.shape
    places = crayon_index.shape[1]
    if image_tokens.device.type == "cpu":
        _check_values(image_tokens, crayon_index, crayon_class)
    else:  # no waiting for the device: collavo_kernels.check() reports what was out of range
        crayon_index = checked_index(crayon_index, rows)
    offset = torch.arange(batch, device=crayon_index.device)[:, None] * rows
    valid = (crayon_index >= 0) & (crayon_index < rows)
    shifted = torch.where(valid, crayon_index + offset, -1).to(torch.int32)
    place = image_tokens.long().cumsum(1) - 1
    if places == 0 or rows == 0:
        index = torch.full_like(place, -1, dtype=torch.int32)
    else:
        taken = shifted.gather(1, place.clamp(0, places - 1))
        index = torch.where(image_tokens & (place < places), taken, -1)
    return CrayonRows(crayon_class.reshape(-1), crayon_number.reshape(-1), index)


def _check_shapes(
    image_tokens: Tensor, crayon_index: Tensor, crayon_class: Tensor, crayon_number: Tensor
) -> None:
    batch = image_tokens.shape[0]
    named = {
        "crayon_index": crayon_index,
        "crayon_class": crayon_class,
        "crayon_number": crayon_number,
    }
    for name, value in named.items():
        if value.ndim != 2 or value.shape[0] != batch:
            raise ValueError(
                f"{name}: expected two dimensions and a batch of {batch} (as input_ids), "
                f"got {list(value.shape)}"
            )
    if crayon_class.shape != crayon_number.shape:
        raise ValueError(
            f"crayon_number: expected the shape of crayon_class {list(crayon_class.shape)}, "
            f"got {list(crayon_number.shape)}"
        )


def _check_values(image_tokens: Tensor, crayon_index: Tensor, crayon_class: Tensor) -> None:
    places, rows = crayon_index.shape[1], crayon_class.shape[1]
    counts = image_tokens.sum(1)
    if bool((counts > places).any()):
        sample = int((counts > places).nonzero()[0])
        raise ValueError(
            f"crayon_index: sample {sample} has {int(counts[sample])} image tokens in input_ids "
            f"and crayon_index has {places} columns; give one entry per image token (-1 = no row)"
        )
    bad = (crayon_index < -1) | (crayon_index >= rows)
    if bool(bad.any()):
        sample, place = (int(x) for x in bad.nonzero()[0])
        raise ValueError(
            f"crayon_index: expected entries from -1 to {rows - 1} (the columns of crayon_class), "
            f"got {int(crayon_index[sample, place])} at sample {sample}, image token {place}"
        )


def is_packed(position_ids: Tensor | None, attention_mask: Tensor | None) -> bool:
    """Tell whether several sequences share a row: positions that jump, and no mask.

    Args:
        position_ids: ``[B, S]`` or None.
        attention_mask: The mask given with them, or None.
    """
    if position_ids is None or attention_mask is not None or position_ids.shape[-1] < 2:
        return False
    return bool((position_ids.diff(dim=-1) != 1).any())


def repeat_images(pixel_values: Tensor, image_tokens: Tensor, times: int) -> Tensor:
    """Repeat the images of every sample as a whole: a, b becomes a, b, a, b, not a, a, b, b.

    Args:
        pixel_values: ``[images, ...]``, in the order of the samples.
        image_tokens: int ``[B]``: how many image tokens each sample has, the same for each image.
        times: How often.

    Example:
        >>> import torch
        >>> images = torch.tensor([[1], [2], [3]])
        >>> repeat_images(images, torch.tensor([8, 4]), 2).flatten().tolist()
        [1, 2, 1, 2, 3, 3]
    """
    images, counts = pixel_values.shape[0], image_tokens.tolist()
    own = [count * images // max(sum(counts), 1) for count in counts]
    if sum(own) != images:  # not the images of these tokens; the model says so itself
        return pixel_values.repeat_interleave(times, dim=0)
    parts = torch.split(pixel_values, own)
    return torch.cat([part for part in parts for _ in range(times)])


def new_images(inputs: dict[str, Any], conversation: Tensor | None, config: Any) -> dict[str, Any]:
    """Return the images and crayon of a later turn alone, where those in the cache came again.

    Args:
        inputs: The turn's model inputs; ``input_ids`` are its new tokens.
        conversation: int64 ``[B, L]``: all tokens, or None.
        config: The model's configuration.

    Returns:
        What to replace in ``inputs``; nothing where only new images were given.
    """
    tokens, pixels = inputs.get("input_ids"), inputs.get("pixel_values")
    if tokens is None or pixels is None or conversation is None:
        return {}
    whole, new = ((x == config.image_token_id).sum(1) for x in (conversation, tokens))
    per_image = (config.vision_config.image_size // config.vision_config.patch_size) ** 2
    per_image += config.vision_feature_select_strategy == "full"
    # Neither all images nor the new ones, or no whole ones: the model says so itself.
    counts = whole.tolist()
    whole_images = not any(count % per_image for count in counts)
    all_of_them = whole_images and pixels.shape[0] * per_image == sum(counts)
    if tokens.shape == conversation.shape or not all_of_them:
        return {}
    kept: dict[str, Any] = {"pixel_values": last_images(pixels, whole, new, per_image)}
    if inputs.get("crayon_index") is not None:
        kept["crayon_index"] = last_places(inputs["crayon_index"], whole, new)
    return kept


def last_images(pixel_values: Tensor, tokens: Tensor, new_tokens: Tensor, per_image: int) -> Tensor:
    """Keep the last images of every sample: those whose tokens are new.

    Args:
        pixel_values: ``[images, ...]``, in the order of the samples.
        tokens: int ``[B]``: how many image tokens each sample has.
        new_tokens: int ``[B]``: how many of them, at the end, are new.
        per_image: Image tokens of one image.

    Example:
        >>> import torch
        >>> images = torch.tensor([[1], [2], [3]])
        >>> last_images(images, torch.tensor([8, 4]), torch.tensor([4, 4]), 4).flatten().tolist()
        [2, 3]
    """
    own = [count // per_image for count in tokens.tolist()]
    new = [count // per_image for count in new_tokens.tolist()]
    parts = torch.split(pixel_values, own)
    return torch.cat([part[len(part) - n :] for part, n in zip(parts, new, strict=True)])


def last_places(crayon_index: Tensor, tokens: Tensor, new_tokens: Tensor) -> Tensor:
    """Move the entries of the new image tokens to the front; what follows them is -1.

    Args:
        crayon_index: int ``[B, P]``: the row of each image token in order.
        tokens: int ``[B]``: how many image tokens each sample has.
        new_tokens: int ``[B]``: how many of them, at the end, are new.

    Example:
        >>> import torch
        >>> last_places(torch.tensor([[0, 1, 2, 3]]), torch.tensor([4]), torch.tensor([1]))
        tensor([[ 3, -1, -1, -1]])
    """
    places = crayon_index.shape[1]
    place = torch.arange(places, device=crayon_index.device)[None]
    source = place + (tokens - new_tokens)[:, None]
    moved = crayon_index.gather(1, source.clamp_max(places - 1))
    return torch.where((place < new_tokens[:, None]) & (source < places), moved, -1)
