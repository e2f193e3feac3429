"""The NF4 weight format: 4-bit codes in blocks, with plain or double-quantised scales.

Blocks follow the flattened matrix. The bytes are those of bitsandbytes (Dettmers et al., QLoRA,
arXiv 2305.14314, sections 2 and 3), so weights go from one library to the other without loss. An
``NF4Weight`` is two uint8 tensors: the packed codes, and one blob that holds every scale. Nothing
that moves or casts a module can touch bytes, and FSDP shards them like any parameter.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils import _pytree as pytree

from collavo_kernels._validation import REFERENCE_DTYPES, describe, expect_tensor
from collavo_kernels.ops.qlora_linear import nf4_panels

if TYPE_CHECKING:
    import bitsandbytes

BLOCK_SIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)
NESTED_BLOCK = 256
NF4_CODE = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)
_FLOAT_BYTES = 4
_codes: dict[torch.device, Tensor] = {}


class ScaleParts(NamedTuple):
    """The scale blob taken apart; every tensor is a view of its bytes.

    Attributes:
        absmax: float32 ``[blocks]``, or uint8 ``[blocks]`` when double-quantised.
        offset: float32 ``[1]``, the mean that was taken off before the second quantisation; None
            when plain.
        nested_absmax: float32 ``[ceil(blocks / 256)]``; None when plain.
        nested_code: float32 ``[256]``, the second quantisation's values; None when plain.
    """

    absmax: Tensor
    offset: Tensor | None = None
    nested_absmax: Tensor | None = None
    nested_code: Tensor | None = None


def block_count(shape: tuple[int, int], block_size: int) -> int:
    """Return how many blocks a matrix has; the last one may be short."""
    return -(-shape[0] * shape[1] // block_size)


def packed_bytes(shape: tuple[int, int]) -> int:
    """Return how many bytes the codes of a matrix take: two codes a byte."""
    return -(-shape[0] * shape[1] // 2)


def scale_bytes(shape: tuple[int, int], block_size: int, double_quant: bool) -> int:
    """Return how many bytes the scale blob of a matrix takes."""
    blocks = block_count(shape, block_size)
    if not double_quant:
        return blocks * _FLOAT_BYTES
    return (1 + -(-blocks // NESTED_BLOCK) + 256) * _FLOAT_BYTES + blocks


def join_scales(parts: ScaleParts) -> Tensor:
    """Join scales into one uint8 blob: offset, nested absmax, nested code, absmax.

    Plain scales are absmax alone.
    """
    if parts.offset is None or parts.nested_absmax is None or parts.nested_code is None:
        return parts.absmax.contiguous().view(torch.uint8).clone()
    floats = torch.cat([parts.offset.reshape(1), parts.nested_absmax, parts.nested_code])
    return torch.cat([floats.view(torch.uint8), parts.absmax])


def split_scales(scales: Tensor, blocks: int, double_quant: bool) -> ScaleParts:
    """Take a scale blob apart; the inverse of ``join_scales``."""
    if scales.storage_offset() % _FLOAT_BYTES or not scales.is_contiguous():
        scales = scales.clone(memory_format=torch.contiguous_format)
    if not double_quant:
        return ScaleParts(scales.view(torch.float32))
    nested = -(-blocks // NESTED_BLOCK)
    head = (1 + nested + 256) * _FLOAT_BYTES
    floats = scales[:head].view(torch.float32)
    return ScaleParts(scales[head:], floats[:1], floats[1 : 1 + nested], floats[1 + nested :])


def block_scales(scales: Tensor, blocks: int, double_quant: bool) -> Tensor:
    """Return one float32 scale per block, ``[blocks]``, undoing the second quantisation."""
    parts = split_scales(scales, blocks, double_quant)
    if parts.nested_absmax is None or parts.nested_code is None or parts.offset is None:
        return parts.absmax
    outer = parts.nested_absmax.repeat_interleave(NESTED_BLOCK)[:blocks]
    return parts.nested_code[parts.absmax.int()] * outer + parts.offset


def nf4_code(like: Tensor) -> Tensor:
    """Return the 16 values of NF4, float32, beside a tensor.

    A GPU gets them once, since sending them waits for it.
    """
    device = like.device
    kept = device.type == "cuda" and not torch.compiler.is_compiling()
    if not kept or isinstance(like, FakeTensor):
        return torch.tensor(NF4_CODE, dtype=torch.float32, device=device)
    if device not in _codes:
        with torch.inference_mode(False):
            _codes[device] = torch.tensor(NF4_CODE, dtype=torch.float32, device=device)
    return _codes[device]


def dequantize_rows(
    packed: Tensor,
    scales: Tensor,
    shape: tuple[int, int],
    block_size: int,
    double_quant: bool,
    dtype: torch.dtype,
    rows: tuple[int, int],
) -> Tensor:
    """Return rows ``rows[0]`` to ``rows[1] - 1`` of the dense matrix, ``[rows, K]`` in ``dtype``.

    Each value is ``code * scale`` in float32, rounded once. Only whole blocks that the rows touch
    are decoded, so the memory is bounded by the number of rows.
    """
    first, last = rows[0] * shape[1], rows[1] * shape[1]
    if first == last:
        return packed.new_empty((rows[1] - rows[0], shape[1]), dtype=dtype)
    block_first, block_last = first // block_size, -(-last // block_size)
    absmax = block_scales(scales, block_count(shape, block_size), double_quant)
    absmax = absmax[block_first:block_last]
    codes = packed.reshape(-1)[block_first * block_size // 2 : block_last * block_size // 2].int()
    table = nf4_code(packed)
    values = torch.stack([table[codes >> 4], table[codes & 15]], dim=-1).view(-1)
    start = first - block_first * block_size
    whole = values.numel() // block_size * block_size
    values[:whole].view(-1, block_size).mul_(absmax[: whole // block_size, None])
    values[whole:].mul_(absmax[whole // block_size :])
    return values[start : start + last - first].view(-1, shape[1]).to(dtype)


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
        if self.block_size not in BLOCK_SIZES:
            raise ValueError(
                f"block_size: expected one of {', '.join(map(str, BLOCK_SIZES))}, "
                f"got {self.block_size}"
            )
        if not self.in_panels:
            _expect_bytes("packed", self.packed, packed_bytes(self.shape), self.shape)
        elif tuple(self.packed.shape) != nf4_panels.panels_shape(self.shape):
            raise ValueError(
                f"packed: expected {list(nf4_panels.panels_shape(self.shape))} for an NF4 matrix "
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
        """Return the weight in the order that CPU kernels stream (see ``nf4_panels``).

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
        reason = nf4_panels.cannot_pack(self.shape, self.block_size)
        if reason is None and self.device.type != "cpu":
            reason = f"it is on {self.device}, and panels are for CPU kernels"
        if reason is not None:
            raise ValueError(f"weight: cannot lie in panels: {reason}")
        blocks = block_count(self.shape, self.block_size)
        scales = block_scales(self.scales, blocks, self.double_quant)
        packed = nf4_panels.to_panels(self.packed, scales, self.shape, self.block_size)
        return replace(self, packed=packed)

    def to_rows(self) -> NF4Weight:
        """Return the weight in bitsandbytes' order; the inverse of :meth:`to_panels`."""
        if not self.in_panels:
            return self
        return replace(self, packed=nf4_panels.to_rows(self.packed, self.shape[0]))

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
        from collavo_kernels.ops.qlora_linear import nf4_interop

        return nf4_interop.to_state_dict(self, prefix)

    @staticmethod
    def from_state_dict(state: Mapping[str, Tensor], prefix: str) -> NF4Weight:
        """Read bitsandbytes' state-dict entries under a prefix such as ``"q_proj.weight"``.

        Raises:
            ValueError: if an entry is missing, has the wrong size, or describes another format; it
                is named.
        """
        from collavo_kernels.ops.qlora_linear import nf4_interop

        return nf4_interop.from_state_dict(state, prefix)

    @staticmethod
    def from_bitsandbytes(weight: Tensor, quant_state: Any = None) -> NF4Weight:
        """Take over a bitsandbytes NF4 tensor without loss.

        Args:
            weight: A ``Params4bit``, or the packed uint8 tensor beside its ``QuantState``.
            quant_state: The ``QuantState``; None takes the parameter's own.

        Raises:
            ValueError: if the format is not NF4 in uint8 storage, or the weight is not quantised
                yet.
        """
        from collavo_kernels.ops.qlora_linear import nf4_interop

        return nf4_interop.from_bitsandbytes(weight, quant_state)

    def to_bitsandbytes(self) -> bitsandbytes.nn.Params4bit:
        """Return a bitsandbytes ``Params4bit`` with a ``QuantState`` of the same bytes.

        Raises:
            ImportError: if bitsandbytes is not installed, or is older than 0.43.
        """
        from collavo_kernels.ops.qlora_linear import nf4_interop

        return nf4_interop.to_bitsandbytes(self)


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
