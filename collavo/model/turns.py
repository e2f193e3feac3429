"""Images and crayon of a conversation's turns, of beams, and of packed rows.

What an image is to a model's tensors differs from family to family: one picture, a stack of crops,
a padded list of a sample's pictures. Its features do not: one per image token, in order. So images
are encoded first, and it is features that are kept for a later turn and repeated for beams.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor

from collavo.model.families import find_tokens, image_inputs


def is_packed(position_ids: Tensor | None, attention_mask: Tensor | None) -> bool:
    """Tell whether several sequences share a row: positions that jump, and no mask.

    Args:
        position_ids: ``[B, S]`` or None.
        attention_mask: The mask given with them, or None.
    """
    if position_ids is None or attention_mask is not None or position_ids.shape[-1] < 2:
        return False
    return bool((position_ids.diff(dim=-1) != 1).any())


def cached_tokens(cache: Any) -> int:
    """Return how many tokens of each sample a cache holds.

    Args:
        cache: Of transformers, or None.
    """
    return 0 if cache is None else int(cache.get_seq_length())


def encode_for_beams(
    model: Any, inputs: Mapping[str, Any], input_ids: Tensor | None, times: int
) -> dict[str, Any]:
    """Return the encoded images, those of every sample repeated as a whole: a, b, a, b.

    Args:
        model: A vision-language model without its head.
        inputs: Its inputs, not yet repeated.
        input_ids: int64 ``[B, L]``: all tokens of the conversation, or None beside embeddings.
        times: How often.

    Raises:
        ValueError: if the images are neither those of all tokens nor those of the new ones.
    """
    cached = cached_tokens(inputs.get("past_key_values"))
    places = find_tokens(model, input_ids, inputs.get("inputs_embeds"))
    repeated = {}
    for modality, output in _encoded(model, inputs).items():
        total = _rows(output.pooler_output)
        new, whole = places[modality][:, cached:].sum(1), places[modality].sum(1)
        counts = next((c.tolist() for c in (new, whole) if int(c.sum()) == total), None)
        if counts is None:
            names = ", ".join(image_inputs(model, inputs)[modality])
            raise ValueError(
                f"{names}: expected {modality}s for {int(whole.sum())} {modality} tokens, got "
                f"{total} features"
            )
        parts = torch.split(_flat(output.pooler_output), counts)
        repeated[modality] = _replaced(output, [part for part in parts for _ in range(times)])
    return repeated


def new_images(model: Any, inputs: dict[str, Any], conversation: Tensor | None) -> dict[str, Any]:
    """Return the images and crayon of a later turn alone, where those in the cache came again.

    Args:
        model: A vision-language model without its head.
        inputs: The turn's model inputs; ``input_ids`` are its new tokens.
        conversation: int64 ``[B, L]``: all tokens, or None.

    Returns:
        What to replace in ``inputs``; nothing where this is no later turn.

    Raises:
        ValueError: if images and videos do not agree on whether those in the cache came again.
    """
    tokens, given = inputs.get("input_ids"), image_inputs(model, inputs)
    if tokens is None or conversation is None or tokens.shape == conversation.shape or not given:
        return {}
    encoded = inputs.get("encoded_images") or _encoded(model, inputs)
    whole = {k: v.sum(1) for k, v in find_tokens(model, conversation, None).items()}
    new = {k: v.sum(1) for k, v in find_tokens(model, tokens, None).items()}
    kept: dict[str, Any] = {}
    again: set[str] = set()
    for modality, output in encoded.items():
        total, all_of_them = _rows(output.pooler_output), int(whole[modality].sum())
        # Neither all images nor the new ones: the model says so itself.
        if total != all_of_them or total == int(new[modality].sum()):
            kept[modality] = output
            continue
        again.add(modality)
        if bool(new[modality].any()):
            kept[modality] = _last(output, whole[modality], new[modality])
    changed: dict[str, Any] = dict.fromkeys(
        name for modality in given if modality not in kept for name in given[modality]
    )
    index = inputs.get("crayon_index")
    if again and index is not None:
        rest = [m for m in whole if m not in again and not torch.equal(whole[m], new[m])]
        if rest:
            raise ValueError(
                f"{rest[0]}: expected the {rest[0]}s of the whole conversation, as of the "
                f"{next(iter(again))}s, since one crayon_index counts the tokens of both; give "
                "all of them or only the new ones"
            )
        changed["crayon_index"] = last_places(index, sum(whole.values()), sum(new.values()))
    return changed | {"encoded_images": kept}


def last_places(crayon_index: Tensor, tokens: Any, new_tokens: Any) -> Tensor:
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


def _encoded(model: Any, inputs: Mapping[str, Any]) -> dict[str, Any]:
    # Called, not asked: offload brings weights to a module when it is called.
    given = {name for names in image_inputs(model, inputs).values() for name in names}
    images = {name: value for name, value in inputs.items() if name in given}
    return cast("dict[str, Any]", model(encode_only=True, **images)) if images else {}


def _last(output: Any, tokens: Tensor, new_tokens: Tensor) -> Any:
    """Keep the features of the last tokens of every sample."""
    parts = torch.split(_flat(output.pooler_output), tokens.tolist())
    new = new_tokens.tolist()
    return _replaced(output, [p[len(p) - n :] for p, n in zip(parts, new, strict=True)])


def _flat(features: Any) -> Tensor:
    """Lay features end to end: ``[tokens, hidden_size]``."""
    parts = [features] if isinstance(features, Tensor) else list(features)
    return torch.cat([part.reshape(-1, part.shape[-1]) for part in parts])


def _rows(features: Any) -> int:
    parts = [features] if isinstance(features, Tensor) else list(features)
    return sum(part.numel() // part.shape[-1] for part in parts)


def _replaced(output: Any, parts: list[Tensor]) -> Any:
    """Return what a model's tower gave with other features, laid out as its own."""
    made, features = copy.copy(output), torch.cat(parts)
    is_stack = isinstance(output.pooler_output, Tensor)
    shape = output.pooler_output.shape[1:] if is_stack else ()
    made.pooler_output = features.reshape(-1, *shape) if is_stack else [features]
    return made
