"""What every decoder layer is told about the image tokens of a forward pass."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class CrayonInputs(NamedTuple):
    """What a forward pass knows about its image tokens, computed once and handed to every layer.

    Attributes:
        table: The crayon, ``[T, hidden_size]``, one row per segment; None without crayon.
        row_index: int32 ``[B, S]``: the token's row, -1 where it has none; None without crayon.
        adapter_mask: uint8 ``[B, S]``: bit i set = adapter i acts on the token; None = all act.
        row_mask: uint8 ``[T]``: the same for the rows, equal to that of the rows' tokens; None =
            all act.
        key_range: int32 ``[B, 2]``: first and one-past-last valid key of each sample; None = all.
        fused: Whether the cache is empty and the mask is one interval per sample, so that
            ``crayon_attention`` applies; None = each layer decides, from its mask and cache.
    """

    table: Tensor | None = None
    row_index: Tensor | None = None
    adapter_mask: Tensor | None = None
    row_mask: Tensor | None = None
    key_range: Tensor | None = None
    fused: bool | None = None
