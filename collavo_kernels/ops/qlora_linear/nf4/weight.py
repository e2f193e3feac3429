"""A matrix in NF4: 4-bit codes in blocks, with plain or double-quantised scales.

An ``NF4Weight`` is two uint8 tensors: the packed codes, and one blob that holds every scale.
Nothing that moves or casts a module can touch bytes, and FSDP shards them like any parameter.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from collavo_kernels._validation import (
    REFERENCE_DTYPES,
    describe,
    expect_int,
    expect_list,
    expect_tensor,
)
from collavo_kernels.ops.qlora_linear.nf4 import panels
from collavo_kernels.ops.qlora_linear.nf4.format import (
    BLOCK_SIZES,
    ScaleParts,
    block_count,
    block_scales,
    dequantize_rows,
    packed_bytes,
    scale_bytes,
    split_scales,
)

if TYPE_CHECKING:
    import bitsandbytes


@dataclass(frozen=True, eq=False)
class NF4Weight:
    r"""A matrix in NF4: ``W[n, k] = code[n, k] * scale[(n * K + k) // block_size]``.

    Make one with :func:`quantize_nf4` or :meth:`from_bitsandbytes`.

    Attributes:
        packed: uint8 ``[ceil(N * K / 2), 1]``; of two neighbours in the flattened matrix the first
            is the high half. Or in panels, ``[ceil(N / 16), K / 64, 576]``: :meth:`to_panels`.
        scales: uint8, the bytes of all scales (:func:`join_scales` has the layout).
        shape: ``(N, K)``.
        block_size: Elements that share a scale, one of 32 .. 4096.
        double_quant: Whether the scales are themselves stored in 8 bits.
        dtype: The dtype that the matrix had, which bitsandbytes records and dequantises to.

    Raises:
        TypeError: if a tensor is not uint8.
        ValueError: if a tensor has the wrong number of bytes, or the block size is not supported.

    Example:
        >>> import torch
        >>> from collavo_kernels import quantize_nf4
        >>> weight = quantize_nf4(torch.eye(64))
        >>> weight.shape, weight.packed.shape, weight.dequantize()[0, :2].tolist()
        ((64, 64), torch.Size([2048, 1]), [1.0, 0.0])
    """

    packed: Tensor
    scales: Tensor
    shape: tuple[int, int]
    block_size: int = 64
    double_quant: bool = True
    dtype: torch.dtype = torch.float32

    def __post_init__(self) -> None:
        expect_tensor("packed", self.packed)
        shape = expect_list("shape", self.shape, "two sizes, (N, K)")
        if len(shape) != 2:
            raise ValueError(f"shape: expected (N, K), got {shape!r}")
        for size in shape:
            expect_int("shape", size, minimum=0)
        if self.block_size not in BLOCK_SIZES:
            raise ValueError(
                f"block_size: expected one of {', '.join(map(str, BLOCK_SIZES))}, "
                f"got {self.block_size}"
            )
        if not self.in_panels:
            _expect_bytes("packed", self.packed, packed_bytes(self.shape), self.shape)
        elif tuple(self.packed.shape) != panels.panels_shape(self.shape):
            raise ValueError(
                f"packed: expected {list(panels.panels_shape(self.shape))} for an NF4 matrix "
                f"{list(self.shape)} in panels, got {describe(self.packed)}"
            )
        size = scale_bytes(self.shape, self.block_size, self.double_quant)
        _expect_bytes("scales", self.scales, size, self.shape)

    @property
    def device(self) -> torch.device:
        """The device that holds the bytes."""
        return self.packed.device

    @property
    def parts(self) -> ScaleParts:
        """The scales as typed tensors, views of the blob."""
        return split_scales(
            self.scales, block_count(self.shape, self.block_size), self.double_quant
        )

    @property
    def in_panels(self) -> bool:
        """Whether the codes lie in panels, the order that CPU kernels stream."""
        return self.packed.dim() == 3

    def to(self, device: torch.device | str) -> NF4Weight:
        """Return the weight on another device, in bitsandbytes' order; the same bytes."""
        rows = self.to_rows() if torch.device(device).type != self.device.type else self
        return replace(rows, packed=rows.packed.to(device), scales=rows.scales.to(device))

    def to_panels(self) -> NF4Weight:
        """Return the weight in the order that CPU kernels stream (see ``panels``).

        Codes lie beside their float32 scales, so it takes 0.5625 bytes per weight. Nothing is
        lost: :meth:`to_rows` gives the bytes back, and state dicts have them.

        Raises:
            ValueError: if the weight is not on the CPU, K is no multiple of 64, or a block has
                fewer than 64 elements.

        Example:
            >>> import torch
            >>> from collavo_kernels import quantize_nf4
            >>> weight = quantize_nf4(torch.randn(32, 128))
            >>> panels = weight.to_panels()
            >>> panels.packed.shape, torch.equal(panels.to_rows().packed, weight.packed)
            (torch.Size([2, 2, 576]), True)
        """
        if self.in_panels:
            return self
        reason = panels.cannot_pack(self.shape, self.block_size)
        if reason is None and self.device.type != "cpu":
            reason = f"it is on {self.device}, and panels are for CPU kernels"
        if reason is not None:
            raise ValueError(f"weight: cannot lie in panels: {reason}")
        blocks = block_count(self.shape, self.block_size)
        scales = block_scales(self.scales, blocks, self.double_quant)
        packed = panels.to_panels(self.packed, scales, self.shape, self.block_size)
        return replace(self, packed=packed)

    def to_rows(self) -> NF4Weight:
        """Return the weight in bitsandbytes' order; the inverse of :meth:`to_panels`."""
        if not self.in_panels:
            return self
        return replace(self, packed=panels.to_rows(self.packed, self.shape[0]))

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """Return the dense matrix.

        Args:
            dtype: float32, bfloat16, float16 or float64; None takes the dtype that the matrix had.

        Returns:
            ``[N, K]``: code times scale in float32, rounded once to ``dtype``.

        Raises:
            TypeError: if the dtype is another.
        """
        dtype = self.dtype if dtype is None else dtype
        if dtype not in REFERENCE_DTYPES:
            names = ", ".join(str(d).removeprefix("torch.") for d in REFERENCE_DTYPES)
            raise TypeError(f"dtype: expected one of {names}, got {dtype}")
        return dequantize_rows(
            self.to_rows().packed,
            self.scales,
            self.shape,
            self.block_size,
            self.double_quant,
            dtype,
            (0, self.shape[0]),
        )

    def state_dict(self, prefix: str = "") -> dict[str, Tensor]:
        """Return bitsandbytes' state-dict entries: codes at ``prefix``, scales below it."""
        from collavo_kernels.ops.qlora_linear.nf4 import interop

        return interop.to_state_dict(self, prefix)

    @staticmethod
    def from_state_dict(state: Mapping[str, Tensor], prefix: str) -> NF4Weight:
        """Read bitsandbytes' state-dict entries under a prefix such as ``"q_proj.weight"``.

        Raises:
            ValueError: if an entry is missing, has the wrong size, or describes another format; it
                is named.
        """
        from collavo_kernels.ops.qlora_linear.nf4 import interop

        return interop.from_state_dict(state, prefix)

    @staticmethod
    def from_bitsandbytes(weight: Tensor, quant_state: Any = None) -> NF4Weight:
        """Take over a bitsandbytes NF4 tensor without loss.

        Args:
            weight: A ``Params4bit``, or the packed tensor beside its ``QuantState``; uint8, or the
                same bytes seen as another dtype (``bnb_4bit_quant_storage``).
            quant_state: The ``QuantState``; None takes the parameter's own.

        Raises:
            ValueError: if the format is not NF4, or the weight is not quantised yet.
        """
        from collavo_kernels.ops.qlora_linear.nf4 import interop

        return interop.from_bitsandbytes(weight, quant_state)

    def to_bitsandbytes(self) -> bitsandbytes.nn.Params4bit:
        """Return a bitsandbytes ``Params4bit`` with a ``QuantState`` of the same bytes.

        Raises:
            ImportError: if bitsandbytes is not installed, or is older than 0.43.
        """
        from collavo_kernels.ops.qlora_linear.nf4 import interop

        return interop.to_bitsandbytes(self)


def _expect_bytes(argument: str, value: Tensor, size: int, shape: tuple[int, int]) -> None:
    expect_tensor(argument, value, dtypes=(torch.uint8,))
    if value.numel() != size:
        raise ValueError(
            f"{argument}: expected {size} bytes for an NF4 matrix {list(shape)}, "
            f"got {describe(value)}; the tensor is truncated or belongs to another weight"
        )


def _flatten(weight: NF4Weight) -> tuple[list[Any], Any]:
    context = (weight.shape, weight.block_size, weight.double_quant, weight.dtype)
    return [weight.packed, weight.scales], context


def _unflatten(leaves: Iterable[Any], context: Any) -> NF4Weight:
    # Leaves can be anything while a tree is mapped, so they are not checked again.
    weight = object.__new__(NF4Weight)
    names = ("packed", "scales", "shape", "block_size", "double_quant", "dtype")
    for name, value in zip(names, (*leaves, *context), strict=True):
        object.__setattr__(weight, name, value)
    return weight


pytree.register_pytree_node(
    NF4Weight, _flatten, _unflatten, serialized_type_name="collavo_kernels.NF4Weight"
)
