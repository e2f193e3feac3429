"""The operator's bundles: its inputs, its result, and what its backward takes and returns."""

from __future__ import annotations

from typing import Generic, NamedTuple, TypeVar

import torch
from torch import Tensor

from collavo_kernels._derivative import Nothing
from collavo_kernels._schema import SymInt
from collavo_kernels._validation import lowered

T = TypeVar("T")
MAX_MASKED_ADAPTERS = 8
# Why a GPU's backends decline a weight in the order that CPU kernels stream.
PANELS_DECLINE = "the weight lies in panels, for CPU kernels: to_rows()"


class LoRAAdapter(NamedTuple):
    """A low-rank branch ``scaling * B A x``.

    Attributes:
        a: ``[R, K]``, the dtype of x or float32.
        b: ``[N, R]``, the dtype of a.
        scaling: ``alpha / rank`` (rsLoRA: ``alpha / sqrt(rank)``).

    Example:
        >>> import torch
        >>> from collavo_kernels import qlora_linear
        >>> adapter = LoRAAdapter(torch.ones(1, 64), torch.ones(32, 1), scaling=0.5)
        >>> qlora_linear(torch.ones(1, 64), torch.zeros(32, 64), [adapter])[0, :2].tolist()
        [32.0, 32.0]
    """

    a: Tensor
    b: Tensor
    scaling: float = 1.0


class QLoRAInputs(NamedTuple):
    """What a backend's forward takes; backends get it with tokens in one dimension, ``[M, K]``.

    Attributes:
        x: ``[..., K]``, any strides.
        weight: uint8 NF4 codes when ``scales`` is given, in bitsandbytes' order or in panels (three
            dimensions); else dense ``[N, K]``. Contiguous for backends.
        scales: uint8 blob of an ``NF4Weight``, or None. Contiguous for backends.
        out_features: N.
        block_size: Elements per scale.
        double_quant: Whether scales are stored in 8 bits.
        a: Per adapter ``[R_i, K]``.
        b: Per adapter ``[N, R_i]``.
        scaling: Per adapter.
        adapter_mask: uint8 ``[...]`` or None.
        row_table: ``[T, N]`` or None.
        row_index: int32 ``[...]`` or None.
        bias: ``[N]`` or None.
        int8_activations: Round x to 8 bits for the product with the weight.
    """

    x: Tensor
    weight: Tensor
    scales: Tensor | None
    out_features: SymInt
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
    def device(self) -> torch.device:
        """Where everything is."""
        return self.x.device

    @property
    def shape(self) -> tuple[int, int]:
        """The weight's ``(N, K)``."""
        return self.out_features, self.x.shape[-1]

    @property
    def tokens(self) -> int:
        """M, the number of tokens."""
        return self.x.numel() // max(1, self.x.shape[-1])

    @property
    def adapters(self) -> list[LoRAAdapter]:
        """The adapters, which the schema has as three lists."""
        return list(map(LoRAAdapter, self.a, self.b, self.scaling))

    @property
    def in_panels(self) -> bool:
        """Whether the codes lie in panels, the order that CPU kernels stream."""
        return self.scales is not None and self.weight.dim() == 3

    def flattened(self) -> QLoRAInputs:
        """Return the inputs as backends take them."""
        x, weight, scales = self.x, self.weight, self.scales
        dense = scales is None or (scales.is_contiguous() and weight.is_contiguous())
        if dense and x.dim() == 2:
            return self
        mask, index = self.adapter_mask, self.row_index
        return self._replace(
            x=x.reshape(-1, x.shape[-1]),
            # Kernels read the bytes one after the other.
            weight=weight if scales is None else weight.contiguous(),
            scales=None if scales is None else scales.contiguous(),
            adapter_mask=None if mask is None else mask.reshape(-1),
            row_index=None if index is None else index.reshape(-1),
        )


class QLoRAResult(NamedTuple):
    """What a backend's forward returns: ``out``, ``[M, N]`` in x's dtype."""

    out: Tensor


class QLoRAOutputGrads(NamedTuple):
    """The gradient of the result: ``out``, ``[M, N]`` in x's dtype."""

    out: Tensor


class QLoRAGradients(NamedTuple, Generic[T]):
    """One entry for each input that can get a gradient, of the lists one per adapter.

    ``QLoRAGradients[bool]`` says which are wanted; a backward returns
    ``QLoRAGradients[Tensor | None]``, None where one is not.
    """

    x: T
    weight: T
    a: list[T]
    b: list[T]
    row_table: T
    bias: T


Wanted = QLoRAGradients[bool]
Gradients = QLoRAGradients[Tensor | None]


def fake(inputs: QLoRAInputs) -> QLoRAResult:
    """Return the result without values."""
    return QLoRAResult(inputs.x.new_empty((*inputs.x.shape[:-1], inputs.out_features)))


def keep(inputs: QLoRAInputs, result: QLoRAResult) -> Nothing:
    """Return what is saved beside the inputs."""
    return Nothing()


def without_derivative(inputs: QLoRAInputs) -> str | None:
    """Say why these inputs have no derivative, or None."""
    if not inputs.int8_activations:
        return None
    return (
        "int8_activations: it is for inference, but an argument asks for gradients; call under "
        "torch.no_grad()"
    )


def in_dtype(inputs: QLoRAInputs, dtype: torch.dtype) -> QLoRAInputs:
    """Return the inputs in autocast's dtype, but float32 adapters, which go with any x."""

    def factors(given: list[Tensor]) -> list[Tensor]:
        return [x if x.dtype == torch.float32 else lowered(x, dtype) for x in given]

    return inputs._replace(
        x=lowered(inputs.x, dtype),
        weight=lowered(inputs.weight, dtype),
        a=factors(inputs.a),
        b=factors(inputs.b),
        row_table=lowered(inputs.row_table, dtype),
        bias=lowered(inputs.bias, dtype),
    )


def scaled(inputs: QLoRAInputs, adapter: int, hidden: Tensor) -> Tensor:
    """Scale an adapter's hidden values, in place; exact zeros where the adapter is idle."""
    if inputs.scaling[adapter] != 1.0:
        hidden.mul_(inputs.scaling[adapter])
    # Not a product with 0, here and below: 0 times a NaN is a NaN.
    tokens = idle(inputs, adapter)
    return hidden if tokens is None else hidden.masked_fill_(tokens, 0.0)


def gated(inputs: QLoRAInputs, adapter: int, values: Tensor) -> Tensor:
    """Return values of tokens with exact zeros where an adapter is idle."""
    tokens = idle(inputs, adapter)
    return values if tokens is None else values.masked_fill(tokens, 0.0)


def idle(inputs: QLoRAInputs, adapter: int) -> Tensor | None:
    """Return bool ``[M, 1]``, which tokens an adapter is idle for; None means none."""
    if inputs.adapter_mask is None:
        return None
    return ((inputs.adapter_mask >> adapter) & 1).eq(0)[:, None]
