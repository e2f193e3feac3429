"""The operator's bundles: inputs, results, what the backward takes and returns; and their fakes."""

from __future__ import annotations

import math
from typing import Generic, NamedTuple, TypeVar

import torch
from torch import Tensor

from collavo_kernels._validation import lowered

T = TypeVar("T")
LARGEST_HEAD_DIM = 256  # that every backend takes; the C++ kernels' own is ``kLargestHeadDim``


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


def lse_dtype(q: Tensor) -> torch.dtype:
    """Return the log-sum-exp's dtype: float64 for float64 inputs, else float32."""
    return torch.float64 if q.dtype == torch.float64 else torch.float32


def fake(inputs: AttentionInputs) -> AttentionResult:
    """Return results without values."""
    q, k, v = inputs.q, inputs.k, inputs.v
    batch, length, heads, _ = q.shape
    return AttentionResult(
        out=q.new_empty(q.shape),
        key=k.new_empty(k.shape if inputs.changes_key else 0),
        value=v.new_empty(v.shape if inputs.changes_value else 0),
        lse=q.new_empty((batch, heads, length), dtype=lse_dtype(q)),
    )


def keep(inputs: AttentionInputs, result: AttentionResult) -> AttentionSaved:
    """Return what is saved: the prepared key and value, for which the backward needs no k and v."""
    key = result.key if inputs.changes_key else inputs.k
    value = result.value if inputs.changes_value else inputs.v
    return AttentionSaved(key, value, result.out, result.lse)


def empty(inputs: AttentionInputs) -> tuple[str, ...]:
    """Name the results that are empty: those that nothing changes."""
    key = () if inputs.changes_key else ("key",)
    return key if inputs.changes_value else (*key, "value")


def in_dtype(inputs: AttentionInputs, dtype: torch.dtype) -> AttentionInputs:
    """Return the inputs in autocast's dtype; cos and sin keep their precision."""
    # All fields by name: _replace() costs three times as much.
    return AttentionInputs(
        q=lowered(inputs.q, dtype),
        k=lowered(inputs.k, dtype),
        v=lowered(inputs.v, dtype),
        cos=inputs.cos,
        sin=inputs.sin,
        crayon_q=lowered(inputs.crayon_q, dtype),
        crayon_k=lowered(inputs.crayon_k, dtype),
        crayon_v=lowered(inputs.crayon_v, dtype),
        row_index=inputs.row_index,
        key_range=inputs.key_range,
        causal=inputs.causal,
        window=inputs.window,
        scale=inputs.scale,
    )
