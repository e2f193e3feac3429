"""The operator's bundles: its inputs, its results, and what its backward takes and returns."""

from __future__ import annotations

import math
from typing import Generic, NamedTuple, TypeVar

import torch
from torch import Tensor

T = TypeVar("T")


class AttentionInputs(NamedTuple):
    """What a backend's forward takes; shapes as in ``crayon_attention``."""

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
    causal: bool = True
    window: int | None = None
    scale: float | None = None

    @property
    def device(self) -> torch.device:
        """Where everything is."""
        return self.q.device

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


class AttentionResult(NamedTuple):
    """What a backend's forward returns.

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


class AttentionSaved(NamedTuple):
    """What the backward needs of the forward.

    Attributes:
        key: ``[B, S, G, D]``: the key that was attended to, k itself where nothing changed it.
        value: ``[B, S, G, D]``: the value alike.
        out: The forward's ``out``.
        lse: The forward's ``lse``.
    """

    key: Tensor
    value: Tensor
    out: Tensor
    lse: Tensor


class AttentionOutputGrads(NamedTuple):
    """The gradients of the results.

    Attributes:
        out: ``[B, S, H, D]``.
        key: ``[B, S, G, D]`` or None; always None where the forward returned no key.
        value: ``[B, S, G, D]`` or None; always None without ``crayon_v``.
    """

    out: Tensor
    key: Tensor | None
    value: Tensor | None


class AttentionGradients(NamedTuple, Generic[T]):
    """One entry for each input that can get a gradient.

    ``AttentionGradients[bool]`` says which are wanted; a backward returns
    ``AttentionGradients[Tensor | None]``, None where one is not.
    """

    q: T
    k: T
    v: T
    crayon_q: T
    crayon_k: T
    crayon_v: T


Wanted = AttentionGradients[bool]
Gradients = AttentionGradients[Tensor | None]
