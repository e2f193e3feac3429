"""From batch-first, padded crayon inputs to rows laid end to end, as the decoder reads them."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from collavo_kernels.nn import checked_crayon_index

_INTEGERS = (torch.int32, torch.int64)


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
        TypeError: if a part of the crayon is no int32 or int64 tensor.
        ValueError: if shapes disagree; on the CPU also if a sample has more image tokens than P, or
            rows for more image tokens than it has, or an entry of ``crayon_index`` is no row of its
            sample. Elsewhere such an entry counts as -1 and ``collavo_kernels.check()`` reports it.

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
    counts = image_tokens.sum(1, keepdim=True)
    beyond = torch.arange(places, device=image_tokens.device) >= counts
    surplus = beyond & (crayon_index >= 0)
    if image_tokens.device.type == "cpu":
        _check_places(counts, surplus)
    else:  # both become entries that are no row, which is reported
        checked_crayon_index(torch.where(counts > places, rows, -1), rows)
        crayon_index = torch.where(surplus, rows, crayon_index)
    crayon_index = checked_crayon_index(crayon_index, rows)
    offset = torch.arange(batch, device=crayon_index.device)[:, None] * rows
    shifted = torch.where(crayon_index >= 0, crayon_index + offset, -1).to(torch.int32)
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
        kind = value.dtype if isinstance(value, Tensor) else type(value).__name__
        if kind not in _INTEGERS:  # a float loses rows in silence: bfloat16 has no 257
            raise TypeError(
                f"{name}: expected an int32 or int64 tensor, as processors make it, got {kind}; "
                "cast pixel_values alone"
            )
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


def _check_places(counts: Tensor, surplus: Tensor) -> None:
    """Raise unless every image token has an entry, and every row an image token."""
    places = surplus.shape[1]
    missing, left = counts[:, 0] > places, surplus.any(1)
    if bool((missing | left).any()):
        sample = int((missing | left).nonzero()[0])
        count = int(counts[sample])
        if bool(missing[sample]):
            raise ValueError(
                f"crayon_index: sample {sample} has {count} image tokens and crayon_index has "
                f"{places} columns; give one entry per image token (-1 = no row)"
            )
        raise ValueError(
            f"crayon_index: sample {sample} has {count} image tokens and a row for image token "
            f"{int(surplus[sample].nonzero()[-1])} (from 0); give the crayon of these images on "
            "their grid, and input_ids, or inputs_embeds with the image token's own embedding: "
            "where features are merged in already no image token can be found"
        )
