"""Device functions that the Triton kernels share: rows, ranges, rotation, spans of blocks.

A head's columns are held as two halves, because the rotation pairs them. Each half is padded to a
power of two in registers, never in memory, so every even head dim takes the same code.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators
from __future__ import annotations

import triton
import triton.language as tl

from collavo_kernels._flags import KEY_RANGE_INVERTED, ROW_INDEX_OUT_OF_RANGE

_BAD_ROW = tl.constexpr(ROW_INDEX_OUT_OF_RANGE)
_BAD_RANGE = tl.constexpr(KEY_RANGE_INVERTED)


@triton.jit
def checked_rows(row_index, offsets, mask, rows, flags):
    """Load row indices; one outside the tables counts as -1 and is flagged."""
    row = tl.load(row_index + offsets, mask=mask, other=-1)
    bad = (row < -1) | (row >= rows)
    if tl.max(bad.to(tl.int32), 0) > 0:
        tl.atomic_or(flags, _BAD_ROW)
    return tl.where(bad, -1, row)


@triton.jit
def valid_range(key_range, batch, length, flags, HAS_RANGE: tl.constexpr):
    """Load a key range; one that is inverted or leaves the sequence is clipped and flagged."""
    if HAS_RANGE:
        first = tl.load(key_range + 2 * batch)
        end = tl.load(key_range + 2 * batch + 1)
        if (first < 0) | (end > length) | (first > end):
            tl.atomic_or(flags, _BAD_RANGE)
        first, end = tl.maximum(first, 0), tl.minimum(end, length)
    else:
        first, end = length * 0, length
    return first, end


@triton.jit
def columns(D: tl.constexpr, HALF: tl.constexpr):
    """Return where a head's columns lie, each half padded to HALF, and which of them exist."""
    d = tl.arange(0, 2 * HALF)
    return (d // HALF) * (D // 2) + d % HALF, d % HALF < D // 2


@triton.jit
def joined(low, high, ROWS: tl.constexpr, HALF: tl.constexpr):
    """Put two halves ``[ROWS, HALF]`` side by side."""
    return tl.reshape(tl.permute(tl.join(low, high), (0, 2, 1)), (ROWS, 2 * HALF))


@triton.jit
def halves(x, ROWS: tl.constexpr, HALF: tl.constexpr):
    """Take ``[ROWS, 2 HALF]`` apart."""
    return tl.split(tl.permute(tl.reshape(x, (ROWS, 2, HALF)), (0, 2, 1)))


@triton.jit
def angles(table, at, half, inside, ROTATE: tl.constexpr):
    """Load the low and the high half of a cosine or sine table in float32; 0 without rotation."""
    if ROTATE:
        low = tl.load(table + at, mask=inside, other=0.0).to(tl.float32)
        high = tl.load(table + at + half, mask=inside, other=0.0).to(tl.float32)
    else:
        low, high = 0.0, 0.0
    return low, high


@triton.jit
def with_row(x, at, table, row, row_stride, d, half, inside, ADD: tl.constexpr):
    """Load the halves of a block of tokens in float32 and add their table rows."""
    low = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
    high = tl.load(x + at + half, mask=inside, other=0.0).to(tl.float32)
    if ADD:
        used = inside & (row[:, None] >= 0)
        chosen = table + row[:, None].to(tl.int64) * row_stride + d
        low += tl.load(chosen, mask=used, other=0.0).to(tl.float32)
        high += tl.load(chosen + half, mask=used, other=0.0).to(tl.float32)
    return low, high


@triton.jit
def turned(low, high, cos_low, cos_high, sin_low, sin_high, ROTATE: tl.constexpr):
    """Rotate a pair of halves."""
    if ROTATE:
        low, high = low * cos_low - high * sin_low, high * cos_high + low * sin_high
    return low, high


@triton.jit
def turned_back(low, high, cos_low, cos_high, sin_low, sin_high, ROTATE: tl.constexpr):
    """Apply the rotation's transpose to a pair of halves: what a gradient goes through."""
    if ROTATE:
        low, high = low * cos_low + high * sin_high, high * cos_high - low * sin_low
    return low, high


@triton.jit
def store_turned_back(
    out,
    low,  # [ROWS, HALF]
    high,
    row,  # of the head in out: [ROWS, 1]
    token,  # [ROWS]
    known,
    angle,
    cos,
    sin,
    D: tl.constexpr,
    HALF: tl.constexpr,
    ROTATE: tl.constexpr,
):
    """Undo the rotation and store."""
    d = tl.arange(0, HALF)[None, :]
    inside = known[:, None] & (d < D // 2)
    at = angle + token[:, None].to(tl.int64) * D + d
    cos_low, cos_high = angles(cos, at, D // 2, inside, ROTATE)
    sin_low, sin_high = angles(sin, at, D // 2, inside, ROTATE)
    low, high = turned_back(low, high, cos_low, cos_high, sin_low, sin_high, ROTATE)
    tl.store(out + row * D + d, low.to(out.dtype.element_ty), mask=inside)
    tl.store(out + row * D + d + D // 2, high.to(out.dtype.element_ty), mask=inside)


@triton.jit
def blocks_between(low, high, whole_low, whole_high, BLOCK: tl.constexpr):
    """Count the blocks that cover ``[low, high)``.

    A block is whole if it lies in ``[whole_low, whole_high)``: no mask cuts it. Whole blocks are
    neighbours.

    Returns:
        The first block; how many come before the whole ones; how many are whole; how many are not.
    """
    begin = low // BLOCK
    stop = tl.maximum((tl.maximum(high, 0) + BLOCK - 1) // BLOCK, begin)
    stop = tl.where(high > low, stop, begin)
    whole_begin = tl.minimum(tl.maximum((whole_low + BLOCK - 1) // BLOCK, begin), stop)
    whole_stop = tl.maximum(tl.minimum(tl.maximum(whole_high, 0) // BLOCK, stop), whole_begin)
    before, whole = whole_begin - begin, whole_stop - whole_begin
    return begin, before, whole, before + stop - whole_stop


@triton.jit
def keys_of(
    start,
    first,
    end,
    window,
    QUERIES: tl.constexpr,
    KEYS: tl.constexpr,
    CAUSAL: tl.constexpr,
    WINDOW: tl.constexpr,
):
    """Count the blocks of keys that the queries from ``start`` see; see ``blocks_between``."""
    low, high, whole_low, whole_high = first, end, first, end
    if CAUSAL:
        high = tl.minimum(end, start + QUERIES)
        whole_high = tl.minimum(end, start + 1)
    if WINDOW:
        low = tl.maximum(first, start - window + 1)
        whole_low = tl.maximum(first, start + QUERIES - window)
        if not CAUSAL:
            high = tl.minimum(end, start + QUERIES + window - 1)
            whole_high = tl.minimum(end, start + window)
    # Queries outside the range see nothing.
    high = tl.where((start < end) & (start + QUERIES > first), high, low)
    return blocks_between(low, high, whole_low, whole_high, KEYS)


@triton.jit
def queries_of(
    start,
    first,
    end,
    window,
    KEYS: tl.constexpr,
    QUERIES: tl.constexpr,
    CAUSAL: tl.constexpr,
    WINDOW: tl.constexpr,
):
    """Count the blocks of queries that see the keys from ``start``; see ``blocks_between``."""
    low, high, whole_low, whole_high = first, end, first, end
    if CAUSAL:
        low = tl.maximum(first, start)
        whole_low = tl.maximum(first, start + KEYS - 1)
    if WINDOW:
        high = tl.minimum(end, start + KEYS + window - 1)
        whole_high = tl.minimum(end, start + window)
        if not CAUSAL:
            low = tl.maximum(first, start - window + 1)
            whole_low = tl.maximum(first, start + KEYS - window)
    # Keys outside the range are seen by none.
    high = tl.where((start < end) & (start + KEYS > first), high, low)
    return blocks_between(low, high, whole_low, whole_high, QUERIES)


@triton.jit
def block_at(t, begin, before, whole, MASKED: tl.constexpr):
    """Return the number of the t-th whole block, or of the t-th that is not."""
    if MASKED:
        return begin + t + tl.where(t < before, 0, whole)
    return begin + before + t


@triton.jit
def visible_to(i, j, window, CAUSAL: tl.constexpr, WINDOW: tl.constexpr):
    """Say which keys j are seen from queries i; their shapes are broadcast."""
    apart = i - j
    if CAUSAL:
        seen = apart >= 0
        if WINDOW:
            seen = seen & (apart < window)
    elif WINDOW:
        seen = (apart < window) & (apart > -window)
    else:
        seen = apart == apart
    return seen


@triton.jit
def rows_at(corner, index, stride, kept, MASKED: tl.constexpr, D: tl.constexpr, HALF: tl.constexpr):
    """Load rows ``[ROWS, 2 HALF]`` of a head; those that are not kept are zeros.

    corner: the address of row 0; index: ``[ROWS]``, counted from there.
    """
    place, exists = columns(D, HALF)
    at = corner + index[:, None] * stride + place[None, :]
    if MASKED:
        x = tl.load(at, mask=kept[:, None] & exists[None, :], other=0.0)
    elif D == 2 * HALF:
        x = tl.load(at)
    else:
        x = tl.load(at, mask=exists[None, :], other=0.0)
    return x
