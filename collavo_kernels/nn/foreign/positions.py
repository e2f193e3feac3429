"""Where a batch's image tokens stand in models that merge them into the embeddings themselves."""

from __future__ import annotations

import inspect
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from collavo_kernels._validation import describe, expect_tensor

_INTEGERS = (torch.int32, torch.int64)
_IGNORED = -100  # the label that LLaVA's code gives to image tokens and to padding


class ImagePositions(NamedTuple):
    """Where the image tokens of a batch stand, in the order of its images.

    Attributes:
        mask: bool ``[B, S]``: which places of the merged sequences are image tokens.
        images: int64 ``[B]``: how many images each sample refers to.
        begun: int64 ``[B]``: how many of them stand before the place where the sample was cut at
            its greatest length; all, where it was not.
        whole: int64 ``[B]``: how many of those surely have all their tokens.
    """

    mask: Tensor
    images: Tensor
    begun: Tensor
    whole: Tensor


def find_image_positions(
    model: nn.Module,
    input_ids: Tensor,
    images: Any,
    *,
    attention_mask: Tensor | None = None,
    **options: Any,
) -> ImagePositions:
    """Find where a model of LLaVA's lineage puts the image tokens of a batch.

    ``prepare_inputs_labels_for_multimodal`` of the original LLaVA and its descendants merges image
    features into the embeddings and does not say where. It is run once more, without gradients,
    with labels that are all ones: what is then ignored and no padding is an image token. So
    padding on either side, several images, crops and cuts at ``tokenizer_model_max_length`` are as
    that code has them. The vision tower runs for it.

    Args:
        model: With that method.
        input_ids: int64 ``[B, L]``, negative where an image goes (LLaVA: -200).
        images: What the method takes.
        attention_mask: ``[B, L]``, as the method takes it; None = no padding.
        options: What else it takes, by its own names (``image_sizes``, ``modalities``).

    Raises:
        TypeError: if the model has no such method, or it does not take an option.
        ValueError: if it merges nothing: no images, sequences of one token, no vision tower.

    Source: LLaVA, ``llava/model/llava_arch.py``.
    """
    prepare = getattr(model, "prepare_inputs_labels_for_multimodal", None)
    if prepare is None:
        raise TypeError(
            "model: expected one with prepare_inputs_labels_for_multimodal (LLaVA and its "
            f"descendants), got {type(model).__name__}; unwrap it (model.module), or pass "
            "crayon_context a mask of the image tokens"
        )
    expect_tensor("input_ids", input_ids, shape=("B", "L"), dtypes=_INTEGERS)
    mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
    expect_tensor("attention_mask", mask, shape=tuple(input_ids.shape))
    given: dict[str, Any] = {
        "input_ids": input_ids,
        "attention_mask": mask,
        "labels": torch.ones_like(input_ids),
        "images": images,
        "position_ids": None,
        "past_key_values": None,
    }
    known = inspect.signature(prepare).parameters
    unknown = [name for name in options if name not in known]
    if unknown:
        raise TypeError(f"{unknown[0]}: expected one of {', '.join(known)}")
    with torch.no_grad():
        result = prepare(**{n: v for n, v in given.items() if n in known}, **options)
    # Versions differ in what stands before: mask, cache, embeddings and labels are the last four.
    merged, embeddings, labels = result[-4], result[-2], result[-1]
    if embeddings is None:
        raise ValueError(
            "images: expected images that join the embeddings, but nothing was merged: images is "
            f"{describe(images)}, input_ids {list(input_ids.shape)}, or there is no vision tower"
        )
    if labels is None or merged is None or labels.shape != embeddings.shape[:2]:
        raise ValueError(
            "model: expected labels and a mask beside the embeddings "
            f"{list(embeddings.shape[:2])}, got {describe(labels)} and {describe(merged)}"
        )
    return _read(model, input_ids, mask.bool(), merged.bool(), labels == _IGNORED)


def _read(
    model: nn.Module, input_ids: Tensor, valid: Tensor, merged: Tensor, ignored: Tensor
) -> ImagePositions:
    placeholder = (input_ids < 0) & valid
    words = valid & ~placeholder
    images = placeholder.sum(1)
    kept = (merged & ~ignored).sum(1).to(words.device)
    cut = kept < words.sum(1)
    longest = getattr(getattr(model, "config", None), "tokenizer_model_max_length", None)
    if longest is not None:
        cut = cut | (merged.sum(1) >= int(longest)).to(words.device)
    # A word that is left says that every image before it is whole.
    before, last = words.cumsum(1), kept[:, None]
    begun = torch.where(cut, (placeholder & (before <= last)).sum(1), images)
    whole = torch.where(cut, (placeholder & (before < last)).sum(1), images)
    return ImagePositions(merged & ignored, images, begun, whole)
