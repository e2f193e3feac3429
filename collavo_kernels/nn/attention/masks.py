"""Masks of a prefill that need no S x S elements: a key range per sample, and a window."""

from __future__ import annotations

from typing import Any, TypeGuard

import torch
from torch import Tensor

from collavo_kernels._validation import expect_int, expect_tensor


def prefill_mask(key_range: Tensor, window: int | None = None) -> Tensor:
    """Carry a key range and a window where transformers passes an attention mask.

    transformers hands a mask of four dimensions through to the attention as it is. This one is
    int32, which tells it from masks of visible keys (bool) and of added scores (floating). The
    window is a size, not a value: reading it does not wait for a GPU.

    Args:
        key_range: int32 ``[B, 2]``: first and one-past-last valid token of each sample.
        window: Length of the sliding window; None = unlimited.

    Returns:
        int32 ``[B, 1, 1 + window, 2]``, the key range repeated without memory; window 0 stands for
        None.

    Raises:
        TypeError: if the key range is no int32 tensor.
        ValueError: if its shape is another, or the window is below 1.

    Example:
        >>> import torch
        >>> prefill_mask(torch.tensor([[0, 5]], dtype=torch.int32), window=3).shape
        torch.Size([1, 1, 4, 2])
    """
    expect_tensor("key_range", key_range, shape=("B", 2), dtypes=(torch.int32,))
    if window is not None:
        expect_int("window", window, minimum=1)
    return key_range[:, None, None, :].expand(-1, 1, 1 + (window or 0), 2)


def is_prefill_mask(mask: Any) -> TypeGuard[Tensor]:
    """Tell whether a mask comes from ``prefill_mask``.

    Args:
        mask: Anything that stands where an attention mask can.

    Example:
        >>> import torch
        >>> is_prefill_mask(torch.ones(1, 4)), is_prefill_mask(None)
        (False, False)
    """
    if not isinstance(mask, Tensor) or mask.dtype != torch.int32 or mask.ndim != 4:
        return False
    return mask.shape[1] == 1 and mask.shape[3] == 2


def read_prefill_mask(mask: Tensor) -> tuple[Tensor, int | None]:
    """Return what ``prefill_mask`` was given: int32 ``[B, 2]`` and the window or None.

    Args:
        mask: int32 ``[B, 1, 1 + window, 2]``.

    Example:
        >>> import torch
        >>> read_prefill_mask(prefill_mask(torch.tensor([[0, 5]], dtype=torch.int32), 3))
        (tensor([[0, 5]], dtype=torch.int32), 3)
    """
    return mask[:, 0, 0].contiguous(), (mask.shape[2] - 1) or None


def visible_keys(
    queries: int,
    keys: int,
    *,
    window: int | None = None,
    key_range: Tensor | None = None,
    query_offset: int | Tensor = 0,
    key_offset: int = 0,
    device: torch.device | None = None,
) -> Tensor:
    """Return the causal mask of a call, key by key: what SDPA reads on the slower path.

    With the positions ``i = query_offset + query`` and ``j = key_offset + key``, key j is visible
    to query i if ``j <= i``, ``i - j < window`` and j lies in the sample's key range.

    Args:
        queries: Number of queries.
        keys: Number of keys.
        window: Length of the sliding window; None = unlimited.
        key_range: int32 ``[B, 2]``: first and one-past-last valid position; None = all are.
        query_offset: Position of the first query: the tokens that the cache had before. A tensor is
            not read on the host.
        key_offset: Position of the first key: above 0 where a sliding cache dropped some.
        device: Where to make it.

    Returns:
        bool ``[B or 1, 1, queries, keys]``.

    Example:
        >>> visible_keys(2, 3, query_offset=1, window=2).int()
        tensor([[[[1, 1, 0],
                  [0, 1, 1]]]], dtype=torch.int32)
    """
    i = (torch.arange(queries, device=device) + query_offset)[:, None]
    j = torch.arange(keys, device=device) + key_offset
    visible = j <= i
    if window is not None:
        visible = visible & (i - j < window)
    visible = visible[None, None]
    if key_range is not None:
        first, end = key_range[:, :1], key_range[:, 1:]
        visible = visible & ((j >= first) & (j < end))[:, None, None, :]
    return visible


def cache_offsets(cache: Any, query: Tensor, layer_idx: int) -> tuple[int | Tensor, int]:
    """Return the positions of a call's first query and of the first key the cache will give.

    Args:
        cache: A Hugging Face cache, before it is updated.
        query: ``[B, H, S, D]``.
        layer_idx: The layer's index in the cache.

    Returns:
        ``query_offset`` (a tensor where a static cache counts on its device) and ``key_offset``.
    """
    past = cache.get_seq_length(layer_idx)
    _, first_key = cache.get_mask_sizes(query.shape[2], layer_idx)
    if isinstance(past, Tensor):  # it counts in place: the update would change this tensor
        return past.to(query.device, copy=True), first_key
    return past, first_key


def interval_range(attention_mask: Tensor | None) -> tuple[bool, Tensor | None]:
    """Tell whether every row of a padding mask is one interval, and which.

    The choice between the fused prefill and SDPA is the host's: this waits for a GPU, once.

    Args:
        attention_mask: ``[B, S]``, non-zero = a real token; None = all are.

    Returns:
        Whether it is, and int32 ``[B, 2]`` first and one-past-last valid key (None where all keys
        are valid).

    Example:
        >>> import torch
        >>> interval_range(torch.tensor([[0, 1, 1], [1, 1, 1]]))
        (True, tensor([[1, 3],
                [0, 3]], dtype=torch.int32))
        >>> interval_range(torch.tensor([[1, 0, 1]]))[0]
        False
    """
    if attention_mask is None:
        return True, None
    if attention_mask.ndim != 2:
        return False, None
    if attention_mask.numel() == 0:
        return True, None
    valid = attention_mask != 0
    length = valid.shape[1]
    count = valid.sum(1)
    first = valid.int().argmax(1)
    end = torch.where(count > 0, length - valid.flip(1).int().argmax(1), first)
    intervals, full = (end - first == count).all(), (count == length).all()
    is_interval, is_full = torch.stack([intervals, full]).tolist()
    if not is_interval or is_full:
        return bool(is_interval), None
    return True, torch.stack([first, end], dim=1).to(torch.int32)
