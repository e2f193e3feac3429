"""Cuts masked attention into pieces that PyTorch's fused CPU attention takes without a full mask.

A key range is a slice of the sample, so padding is never read. A sliding window is a band of
blocks, each with a small mask of its own: no S x S mask is ever made.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from collavo_kernels.ops.crayon_attention.inputs import AttentionInputs

_SMALLEST_BLOCK, _LARGEST_BLOCK = 64, 512


class Piece(NamedTuple):
    """Samples, queries and keys that are attended in one call.

    Attributes:
        samples: Slice of the batch.
        queries: Slice of the sequence.
        keys: Slice of the sequence that holds every key those queries see.
        causal: Whether the call masks the upper triangle; then queries and keys are one slice.
        mask: ``[1, 1, queries, keys]`` of zeros and minus infinities in q's dtype, or None.
    """

    samples: slice
    queries: slice
    keys: slice
    causal: bool
    mask: Tensor | None


def pieces(inputs: AttentionInputs) -> list[Piece]:
    """Cut the attention into pieces; queries outside every piece see no key.

    The key ranges must have been checked.
    """
    batch, length = inputs.q.shape[:2]
    found: list[Piece] = []
    for samples, first, end in _equal_ranges(inputs.key_range, batch, length):
        if end <= first:
            continue
        if inputs.window is None or inputs.window >= end - first:
            whole = slice(first, end)
            found.append(Piece(samples, whole, whole, inputs.causal, None))
        else:
            found += _band(inputs, samples, first, end, inputs.window)
    return found


def covers_all(found: list[Piece], inputs: AttentionInputs) -> bool:
    """Say whether one piece without a mask is the entire attention."""
    batch, length = inputs.q.shape[:2]
    whole = slice(0, length)
    return [each[:3] for each in found] == [(slice(0, batch), whole, whole)] and (
        found[0].mask is None
    )


def _equal_ranges(
    ranges: Tensor | None, batch: int, length: int
) -> Iterator[tuple[slice, int, int]]:
    """Yield runs of neighbouring samples with the same key range."""
    if ranges is None:
        if batch and length:
            yield slice(0, batch), 0, length
        return
    listed = ranges.tolist()
    start = 0
    for i in range(1, batch + 1):
        if i == batch or listed[i] != listed[start]:
            yield slice(start, i), listed[start][0], listed[start][1]
            start = i


def _band(
    inputs: AttentionInputs, samples: slice, first: int, end: int, window: int
) -> Iterator[Piece]:
    size = max(_SMALLEST_BLOCK, min(_LARGEST_BLOCK, window))
    for start in range(first, end, size):
        stop = min(start + size, end)
        low = max(first, start - window + 1)
        high = stop if inputs.causal else min(end, stop + window - 1)
        i = torch.arange(start, stop)[:, None]
        j = torch.arange(low, high)[None, :]
        hidden = (i - j).abs() >= window
        if inputs.causal:
            hidden |= j > i
        mask = torch.zeros(stop - start, high - low, dtype=inputs.q.dtype)
        mask.masked_fill_(hidden, float("-inf"))
        yield Piece(samples, slice(start, stop), slice(low, high), False, mask[None, None])
