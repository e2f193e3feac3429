"""One call of the operator as its backends see it: flat tensors, tokens in one dimension."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

MAX_MASKED_ADAPTERS = 8


class LoRAAdapter(NamedTuple):
    """A low-rank branch ``scaling * B A x``.

    Attributes:
        a: ``[R, K]``, the dtype of x or float32.
        b: ``[N, R]``, the dtype of a.
        scaling: ``alpha / rank`` (rsLoRA: ``alpha / sqrt(rank)``).
    """

    a: Tensor
    b: Tensor
    scaling: float = 1.0


@dataclass(frozen=True, slots=True)
class QLoRAInputs:
    """What a backend gets.

    Attributes:
        x: ``[M, K]``, any strides.
        weight: contiguous uint8 NF4 codes when ``scales`` is given, in bitsandbytes' order or in
            panels (three dimensions); else dense ``[N, K]``.
        scales: contiguous uint8 blob of an ``NF4Weight``, or None.
        out_features: N.
        block_size: Elements per scale.
        double_quant: Whether scales are stored in 8 bits.
        a: Per adapter ``[R_i, K]``.
        b: Per adapter ``[N, R_i]``.
        scaling: Per adapter.
        adapter_mask: uint8 ``[M]`` or None.
        row_table: ``[T, N]`` or None.
        row_index: int32 ``[M]`` or None.
        bias: ``[N]`` or None.
        int8_activations: Round x to 8 bits for the product with the weight.
    """

    x: Tensor
    weight: Tensor
    scales: Tensor | None
    out_features: int
    block_size: int
    double_quant: bool
    a: list[Tensor]
    b: list[Tensor]
    scaling: list[float]
    adapter_mask: Tensor | None
    row_table: Tensor | None
    row_index: Tensor | None
    bias: Tensor | None
    int8_activations: bool = False

    @property
    def shape(self) -> tuple[int, int]:
        """The weight's ``(N, K)``."""
        return self.out_features, self.x.shape[1]

    @property
    def in_panels(self) -> bool:
        """Whether the codes lie in panels, the order that CPU kernels stream."""
        return self.scales is not None and self.weight.dim() == 3


@dataclass(frozen=True, slots=True)
class QLoRAGradients:
    """What a backward returns; None where it was not asked for.

    Attributes:
        x: ``[M, K]`` in x's dtype.
        weight: ``[N, K]`` of a dense weight.
        row_table: ``[T, N]``.
        bias: ``[N]``.
        a: Per adapter ``[R_i, K]``.
        b: Per adapter ``[N, R_i]``.
    """

    x: Tensor | None
    weight: Tensor | None
    row_table: Tensor | None
    bias: Tensor | None
    a: list[Tensor | None]
    b: list[Tensor | None]


@dataclass(frozen=True, slots=True)
class GradientMask:
    """Which gradients a backward is asked for, in the order of ``QLoRAGradients``."""

    x: bool
    weight: bool
    row_table: bool
    bias: bool
    a: list[bool]
    b: list[bool]

    @staticmethod
    def from_flags(flags: list[bool], adapters: int) -> GradientMask:
        """Read the schema's flat form: x, weight, row_table, bias, every a, every b."""
        x, weight, row_table, bias, *rest = flags
        return GradientMask(x, weight, row_table, bias, rest[:adapters], rest[adapters:])


def gated(inputs: QLoRAInputs, adapter: int, rows: Tensor) -> Tensor:
    """Return rows of tokens with zeros where an adapter is idle: 0 times a NaN there is a NaN."""
    gate = active(inputs, adapter, torch.bool)
    return rows if gate is None else rows.masked_fill(~gate, 0.0)


def active(inputs: QLoRAInputs, adapter: int, dtype: torch.dtype) -> Tensor | None:
    """Return ``[M, 1]`` of 0 and 1, which tokens an adapter is active for; None means all."""
    if inputs.adapter_mask is None:
        return None
    return ((inputs.adapter_mask >> adapter) & 1).to(dtype)[:, None]
