"""Images and crayon of a conversation's turns, of beams, and of packed rows."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


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
