"""The operator's arguments as one bundle each for the forward and the backward."""

from __future__ import annotations

import math
from typing import NamedTuple

from torch import Tensor

LARGEST_HEAD_DIM = 256  # of kernels for a GPU, and of FlashAttention


class AttentionInputs(NamedTuple):
    """What every backend's forward takes; shapes as in ``crayon_attention``."""

    q: Tensor
    k: Tensor
    v: Tensor
    cos: Tensor | None
    sin: Tensor | None
    crayon_q: Tensor | None
    crayon_k: Tensor | None
    crayon_v: Tensor | None
    row_index: Tensor | None
    key_range: Tensor | None
    causal: bool
    window: int | None
    scale: float | None

    @property
    def tables(self) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """The tables of q, k and v."""
        return self.crayon_q, self.crayon_k, self.crayon_v

    @property
    def table_rows(self) -> int | None:
        """T, the rows of every table; None without tables."""
        return next((t.shape[0] for t in self.tables if t is not None), None)

    @property
    def changes_key(self) -> bool:
        """Whether the prepared key is another tensor than k."""
        return self.cos is not None or self.crayon_k is not None

    @property
    def changes_value(self) -> bool:
        """Whether the prepared value is another tensor than v."""
        return self.crayon_v is not None

    @property
    def softmax_scale(self) -> float:
        """The factor on the scores: ``scale``, or ``D ** -0.5`` where none is given."""
        return self.scale if self.scale is not None else 1.0 / math.sqrt(self.q.shape[-1])


class ForwardResult(NamedTuple):
    """What every backend's forward returns.

    Attributes:
        out: ``[B, S, H, D]``, q's dtype.
        key: ``[B, S, G, D]``, k's dtype: crayon added, rotated; empty ``[0]`` where neither is
            asked for.
        value: ``[B, S, G, D]``, v's dtype: crayon added; empty ``[0]`` without ``crayon_v``.
        lse: ``[B, H, S]`` float32 (float64 for float64 inputs): natural logarithm of the sum of
            exponentials of the scaled scores; minus infinity for query rows with no key.
    """

    out: Tensor
    key: Tensor
    value: Tensor
    lse: Tensor


class BackwardInputs(NamedTuple):
    """What every backend's backward takes: gradients, the forward's bundle, and its results.

    Attributes:
        grad_out: ``[B, S, H, D]``.
        grad_key: ``[B, S, G, D]`` or None; always None where the forward returned no key.
        grad_value: ``[B, S, G, D]`` or None; always None without ``crayon_v``.
        inputs: The forward's bundle. ``inputs.k`` holds the *prepared* key and ``inputs.v`` the
            prepared value: the backward needs no more of k and v than that.
        out: The forward's ``out``.
        lse: The forward's ``lse``.
        mask: Which of the gradients for q, k, v, crayon_q, crayon_k, crayon_v are wanted.
    """

    grad_out: Tensor
    grad_key: Tensor | None
    grad_value: Tensor | None
    inputs: AttentionInputs
    out: Tensor
    lse: Tensor
    mask: tuple[bool, bool, bool, bool, bool, bool]


Gradients = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]
