"""The bytes of NF4: sizes, the scale blob, and the code; an ``NF4Weight`` is made of them.

Blocks follow the flattened matrix. The bytes are those of bitsandbytes (Dettmers et al., QLoRA,
arXiv 2305.14314, sections 2 and 3), so weights go from one library to the other without loss.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

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
    places = scale_places(blocks)
    floats = scales[: places.absmax].view(torch.float32)
    first, code = (place // _FLOAT_BYTES for place in (places.nested_absmax, places.nested_code))
    return ScaleParts(scales[places.absmax :], floats[:first], floats[first:code], floats[code:])


class ScalePlaces(NamedTuple):
    """Where the parts of a double-quantised blob begin, in bytes; the fields are its parts."""

    absmax: int
    offset: int
    nested_absmax: int
    nested_code: int


def scale_places(blocks: int) -> ScalePlaces:
    """Return where the parts of the scale blob of so many blocks begin."""
    nested = 1 - (-blocks // NESTED_BLOCK)
    return ScalePlaces(
        absmax=(nested + 256) * _FLOAT_BYTES,
        offset=0,
        nested_absmax=_FLOAT_BYTES,
        nested_code=nested * _FLOAT_BYTES,
    )


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
