"""The two functions behind ``attn_implementation="crayon"``; importing this imports transformers.

The mask function sees what the attention function cannot: the padding mask, the cache's length and
the pattern. So it decides, and says with the mask what it decided: None or a ``prefill_mask`` is
for the operator, a mask of S x S elements is for SDPA.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, causal_mask_function, sdpa_mask
from transformers.modeling_utils import AttentionInterface
from transformers.utils.import_utils import is_tracing

from collavo_kernels._sdpa import sdpa_without_plans
from collavo_kernels.nn.attention.masks import (
    interval_range,
    is_prefill_mask,
    prefill_mask,
    read_prefill_mask,
    visible_keys,
)
from collavo_kernels.ops.crayon_attention import crayon_attention
from collavo_kernels.ops.crayon_attention.inputs import LARGEST_HEAD_DIM

NAME = "crayon"
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# transformers' SDPA function ignores some of these, or fails on them without naming the cure.
_UNSERVED = ("softcap", "s_aux", "head_mask")


def register() -> None:
    """Put both functions under their name; transformers reads them when a model runs."""
    AttentionInterface.register(NAME, crayon_attention_forward)
    AttentionMaskInterface.register(NAME, crayon_mask)


def crayon_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    mask_function: Callable[..., Any] = causal_mask_function,
    attention_mask: Tensor | None = None,
    local_size: int | None = None,
    allow_is_causal_skip: bool = True,
    config: Any = None,
    **kwargs: Any,
) -> Tensor | None:
    """Return the mask of a forward pass, as short as the operator can take it.

    Args:
        batch_size: B.
        q_length: S.
        kv_length: Number of keys, those of the cache included.
        q_offset: Position of the first query: the tokens in the cache.
        kv_offset: Position of the first key.
        mask_function: transformers' description of the pattern.
        attention_mask: bool ``[B, tokens]``: the padding; None = there is none.
        local_size: The window (or chunk) of the pattern.
        allow_is_causal_skip: Whether the pattern is a plain one: causal or sliding, nothing added.
        config: The model's configuration.
        **kwargs: As ``sdpa_mask`` takes them.

    Returns:
        None (causal, or by the module's ``is_causal``), ``prefill_mask``, or ``sdpa_mask``.
    """
    fits, window = _window_of(mask_function, local_size, config)
    if fits and allow_is_causal_skip and kv_offset == 0 and 1 < q_length <= kv_length:
        of_prefill, key_range = _padding_of(attention_mask, q_length, kwargs.get("device"))
        if of_prefill and _is_empty(q_offset):
            # A window as long as the prefill hides nothing.
            window = window if window is not None and window < q_length else None
            if window is None and key_range is None:
                return None
            if key_range is None:
                device = kwargs.get("device", "cpu")
                # Made on the device: a copy from the host would wait for it.
                whole = torch.arange(2, dtype=torch.int32, device=device) * q_length
                key_range = whole.expand(batch_size, 2)
            return prefill_mask(key_range, window)
    return sdpa_mask(
        batch_size=batch_size,
        q_length=q_length,
        kv_length=kv_length,
        q_offset=q_offset,  # type: ignore[arg-type]
        kv_offset=kv_offset,
        mask_function=mask_function,
        attention_mask=attention_mask,
        local_size=local_size,
        allow_is_causal_skip=allow_is_causal_skip,
        config=config,
        **kwargs,
    )


def _window_of(
    mask_function: Callable[..., Any], local_size: int | None, config: Any
) -> tuple[bool, int | None]:
    """Tell whether the pattern is causal or a sliding window, and the window.

    A local size is a window or a chunk (Llama 4). Only the configuration tells which.
    """
    if local_size is None:
        return mask_function is causal_mask_function, None
    window = getattr(config, "sliding_window", None)
    chunk = getattr(config, "attention_chunk_size", None)
    return window == local_size and chunk is None, window


def _padding_of(
    attention_mask: Tensor | None, length: int, device: Any
) -> tuple[bool, Tensor | None]:
    if attention_mask is None:
        return True, None
    # A mask of other tokens than these (prefix tuning), or values that cannot be read.
    if attention_mask.shape[-1] != length or is_tracing(attention_mask):
        return False, None
    is_interval, key_range = interval_range(attention_mask)
    return is_interval, key_range if key_range is None else key_range.to(device)


def _is_empty(q_offset: int | Tensor) -> bool:
    """Tell whether the cache had no tokens; a static cache says so with a tensor."""
    if isinstance(q_offset, Tensor) and is_tracing(q_offset):
        return False
    return bool(q_offset == 0)


def crayon_attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attend with ``crayon_attention`` where it applies, else with transformers' SDPA function.

    Args:
        module: The attention module; its ``is_causal`` counts where no mask is given.
        query: ``[B, H, S, D]``, rotated.
        key: ``[B, G, keys, D]``, rotated, from the cache where there is one.
        value: ``[B, G, keys, D]``.
        attention_mask: What ``crayon_mask`` returned, or a ready-made mask of S x S elements.
        dropout: Dropout on the weights.
        scaling: Factor on the scores; None = ``D ** -0.5``.
        is_causal: Overrides the module's.
        **kwargs: As transformers' SDPA function takes them.

    Returns:
        ``[B, S, H, D]`` and None: the weights are not made.

    Raises:
        ValueError: if the model asks for soft-capped scores, attention sinks or a head mask.
    """
    for name in _UNSERVED:
        if kwargs.get(name) is not None:
            raise ValueError(
                f'{name}: expected None with attn_implementation="{NAME}", got '
                f'{type(kwargs[name]).__name__}; use attn_implementation="eager" for this model'
            )
    causal = bool(getattr(module, "is_causal", True) if is_causal is None else is_causal)
    length, keys = query.shape[2], key.shape[2]
    planned = is_prefill_mask(attention_mask)
    key_range, window = read_prefill_mask(attention_mask) if planned else (None, None)  # type: ignore[arg-type]
    # A causal prefill without a mask sees the first S places of a static cache: the rest is empty.
    prefill = planned or (
        attention_mask is None and length > 1 and (keys == length or (causal and keys > length))
    )
    extras = kwargs.get("position_bias") is not None or kwargs.get("cache") is not None
    if prefill and dropout == 0.0 and not extras and _serves(query, key, value):
        result = crayon_attention(
            query.transpose(1, 2),
            key[:, :, :length].transpose(1, 2),
            value[:, :, :length].transpose(1, 2),
            key_range=key_range,
            causal=planned or causal,
            window=window,
            scale=scaling,
        )
        return result.out, None
    if planned:
        attention_mask = visible_keys(
            length, keys, window=window, key_range=key_range, device=query.device
        )
    with sdpa_without_plans(query):
        out, _ = sdpa_attention_forward(
            module,
            query,
            key,
            value,
            attention_mask,
            dropout=dropout,
            scaling=scaling,
            is_causal=is_causal,
            **kwargs,
        )
    return out, None


def _serves(query: Tensor, key: Tensor, value: Tensor) -> bool:
    """Tell whether the operator takes these; the shapes of q and k fit where a model made them."""
    head_dim = query.shape[3]
    if key.shape != value.shape or head_dim % 2 or not 0 < head_dim <= LARGEST_HEAD_DIM:
        return False
    if query.dtype not in _DTYPES:
        return False
    if torch.is_autocast_enabled(query.device.type):  # the operator brings all three to one dtype
        return True
    return query.dtype == key.dtype == value.dtype
