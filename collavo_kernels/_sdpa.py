"""PyTorch's ``scaled_dot_product_attention`` where queries share keys, on every torch served."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

# Before 2.9 a CPU makes scores of S x S elements for ``enable_gqa``. A version compares itself with
# a string.
_TAKES_GQA = torch.__version__ >= "2.9"


def grouped_attention(query: Tensor, key: Tensor, value: Tensor, **options: Any) -> Tensor:
    """Return ``softmax(scale q k^T) v``, H query heads on G heads of keys and values.

    Args:
        query: ``[B, H, S, D]``.
        key: ``[B, G, keys, D]``; G divides H.
        value: ``[B, G, keys, D]``.
        **options: As ``scaled_dot_product_attention`` takes them.

    Returns:
        ``[B, H, S, D]``.
    """
    shared = query.shape[1] // key.shape[1]
    if shared > 1 and _TAKES_GQA:
        options["enable_gqa"] = True
    elif shared > 1:
        key, value = (x.repeat_interleave(shared, dim=1) for x in (key, value))
    return F.scaled_dot_product_attention(query, key, value, **options)
