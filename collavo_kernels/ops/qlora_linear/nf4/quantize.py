"""Quantisation to NF4, bit for bit what bitsandbytes' CPU code makes with one thread."""

from __future__ import annotations

import functools
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from collavo_kernels._validation import FLOAT_DTYPES, expect_tensor
from collavo_kernels.ops.qlora_linear.nf4.format import (
    BLOCK_SIZES,
    NESTED_BLOCK,
    NF4_CODE,
    ScaleParts,
    join_scales,
)
from collavo_kernels.ops.qlora_linear.nf4.weight import NF4Weight

# An all-zero block has the code of 0 everywhere; the short last block has this scale instead of 0.
_ZERO_CODE = 7
_SMALLEST_TAIL_SCALE = 1e-38
# The second quantisation finds codes through a table over [-1, 1] of this many entries.
_LOOKUP_ENTRIES = 65536
_STRIP = 1 << 20
_ONE_AT_A_TIME = threading.Lock()


def quantize_nf4(weight: Tensor, block_size: int = 64, double_quant: bool = True) -> NF4Weight:
    r"""Quantise a matrix to NF4 (QLoRA, arXiv 2305.14314, section 3).

    ``scale[b] = max |W| over block b``, ``code = nearest NF4 value to W / scale`` (a tie goes
    down); with ``double_quant`` the scales, less their mean, are stored in 8 bits with one float32
    per 256 of them.

    Args:
        weight: ``[N, K]``, float32, bfloat16 or float16, on any device.
        block_size: Neighbours in the flattened matrix that share a scale: 32, 64, 128, ... 4096.
        double_quant: Store scales in 8 bits (0.127 bits a weight in place of 0.5 at block size 64).

    Returns:
        The weight; its bytes equal bitsandbytes' (CPU, one thread) and do not depend on the number
        of threads.

    Raises:
        TypeError: if the weight is no tensor of these dtypes.
        ValueError: if it is no matrix, has no elements, or the block size is not supported.

    Example:
        >>> import torch
        >>> weight = quantize_nf4(torch.linspace(-1, 1, 128).view(2, 64))
        >>> bool((weight.dequantize() - torch.linspace(-1, 1, 128).view(2, 64)).abs().max() < 0.16)
        True
    """
    expect_tensor("weight", weight, shape=("N", "K"), dtypes=FLOAT_DTYPES)
    if weight.numel() == 0:
        raise ValueError(f"weight: expected at least one element, got shape {list(weight.shape)}")
    if weight.is_meta:
        raise ValueError("weight: expected values to quantise, got a meta tensor; load it first")
    if block_size not in BLOCK_SIZES:
        choices = ", ".join(map(str, BLOCK_SIZES))
        raise ValueError(f"block_size: expected one of {choices}, got {block_size}")
    with torch.no_grad():
        codes, absmax = _quantize_blocks(weight.detach().reshape(-1), block_size)
        if codes.numel() % 2:
            codes = torch.cat([codes, codes.new_full((1,), _ZERO_CODE)])
        packed = ((codes[0::2] << 4) | codes[1::2]).view(-1, 1)
        parts = _quantize_scales(absmax) if double_quant else ScaleParts(absmax)
        scales = join_scales(parts)
    shape = (weight.shape[0], weight.shape[1])
    return NF4Weight(packed, scales, shape, block_size, double_quant, weight.dtype)


def _quantize_blocks(flat: Tensor, block_size: int) -> tuple[Tensor, Tensor]:
    whole = flat.numel() // block_size * block_size
    blocks = flat[:whole].view(-1, block_size)
    codes = torch.empty(flat.numel(), dtype=torch.uint8, device=flat.device)
    absmax = torch.empty(
        blocks.shape[0] + (whole < flat.numel()), dtype=torch.float32, device=flat.device
    )
    # A strip at a time: float32 copies and indices of a whole weight are six times its bytes.
    taken = max(1, _STRIP // block_size)
    for start in range(0, blocks.shape[0], taken):
        strip = blocks[start : start + taken].float()
        scale = strip.abs().amax(dim=1)
        absmax[start : start + len(strip)] = scale
        # Full blocks multiply by the reciprocal, the short last one divides: both round as the
        # original does.
        first = start * block_size
        codes[first : first + strip.numel()] = _nearest(strip * (1 / scale)[:, None]).view(-1)
    if whole < flat.numel():
        tail = flat[whole:].float()
        absmax[-1] = tail.abs().amax().clamp_min(_SMALLEST_TAIL_SCALE)
        codes[whole:] = _nearest(tail / absmax[-1])
    return codes, absmax


def _nearest(scaled: Tensor) -> Tensor:
    code = torch.tensor(NF4_CODE, dtype=torch.float32, device=scaled.device)
    midpoints = (code[1:] + code[:-1]) / 2
    indices = torch.bucketize(scaled.contiguous(), midpoints, out_int32=True)
    # 0 * (1 / 0) in an all-zero block
    return indices.masked_fill_(scaled.isnan(), _ZERO_CODE).to(torch.uint8)


def _quantize_scales(absmax: Tensor) -> ScaleParts:
    # On the CPU for the same bytes from every device.
    with _one_thread():
        offset = absmax.cpu().mean().to(absmax.device)
    centred = absmax - offset
    missing = -centred.numel() % NESTED_BLOCK
    groups = torch.nn.functional.pad(centred, (0, missing)).view(-1, NESTED_BLOCK)
    nested_absmax = groups.abs().amax(dim=1)
    scaled = (groups / nested_absmax[:, None]).view(-1)[: centred.numel()]
    position = ((scaled + 1) * ((_LOOKUP_ENTRIES - 1) / 2) + 0.5).floor()
    # A group of equal scales has nested_absmax 0 and takes the first code; its value, times 0, is
    # the mean.
    position = position.nan_to_num(0.0).clamp_(0, _LOOKUP_ENTRIES - 1).int()
    codes = _scale_lookup().to(absmax.device)[position]
    nested_code = dynamic_code().to(absmax.device)
    return ScaleParts(codes, offset.reshape(1), nested_absmax, nested_code)


@functools.cache
def dynamic_code() -> Tensor:
    """Return the 256 values of the 8-bit dynamic format, float32 ascending (arXiv 2110.02861).

    Decade ``10**(e - 6)`` for ``e`` in 0 .. 6 has ``2**e`` evenly spaced values of each sign; 0
    and 1 complete it.
    """
    values = [0.0, 1.0]
    for exponent in range(7):
        edges = torch.linspace(0.1, 1, 2**exponent + 1, dtype=torch.float32)
        centres = (edges[:-1] + edges[1:]) / 2.0
        decade = 10 ** (exponent - 6)
        values += (decade * centres).tolist() + (-decade * centres).tolist()
    return torch.tensor(sorted(values), dtype=torch.float32)


@functools.cache
def _scale_lookup() -> Tensor:
    code = dynamic_code()
    grid = torch.arange(_LOOKUP_ENTRIES, dtype=torch.float64) * (2 / (_LOOKUP_ENTRIES - 1)) - 1
    midpoints = (code[1:].double() + code[:-1].double()) / 2
    return torch.bucketize(grid, midpoints).to(torch.uint8)


@contextmanager
def _one_thread() -> Iterator[None]:
    # The order of a parallel sum depends on the number of threads, and bytes must not. The number
    # is the process's: two of these at once would put back the other's 1.
    with _ONE_AT_A_TIME:
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            yield
        finally:
            torch.set_num_threads(threads)
