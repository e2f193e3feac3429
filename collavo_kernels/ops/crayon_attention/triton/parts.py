"""Device functions that the Triton kernels share: rows, ranges, rotation, spans of blocks.

A head's columns are held as two halves, because the rotation pairs them. Each half is padded to a
power of two in registers, never in memory, so every even head dim takes the same code. ``CONST``
has at least the head dim ``D``, half of it padded ``HALF``, and what a function says that it reads.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators
from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from collavo_kernels._flags import KEY_RANGE_INVERTED, ROW_INDEX_OUT_OF_RANGE

_BAD_ROW = tl.constexpr(ROW_INDEX_OUT_OF_RANGE)
_BAD_RANGE = tl.constexpr(KEY_RANGE_INVERTED)


class Heads(NamedTuple):
    """A tensor ``[B, S, heads, D]`` as kernels take it: columns are dense.

    Attributes:
        data: Its address.
        batch: The stride from a sample to the next.
        token: The stride from a token to the next.
        head: The stride from a head to the next.
    """

    data: Any
    batch: Any
    token: Any
    head: Any


class Angles(NamedTuple):
    """Cosines and sines as kernels take them.

    Attributes:
        cos: The address of ``[B or 1, S, D]``.
        sin: Of the same shape.
        batch: The stride from a sample to the next, 0 where there is one for all.
    """

    cos: Any
    sin: Any
    batch: Any


@triton.jit
def block_of_queries(heads, kv_heads, CONST: tl.constexpr):
    """Return a program's first query, its sample, its head, and the key/value head of that.

    Late queries see most keys under a causal mask. Heads are the grid's first axis, so that the
    longest programs of all of them start first. CONST: QUERIES.
    """
    start = (tl.num_programs(1) - 1 - tl.program_id(1)) * CONST.QUERIES
    batch = (tl.program_id(0) // heads).to(tl.int64)
    head = tl.program_id(0) % heads
    return start, batch, head, head // (heads // kv_heads)


@triton.jit
def checked_rows(row_index, offsets, mask, rows, flags):
    """Load row indices; one outside the tables counts as -1 and is flagged."""
    row = tl.load(row_index + offsets, mask=mask, other=-1)
    bad = (row < -1) | (row >= rows)
    if tl.max(bad.to(tl.int32), 0) > 0:
        tl.atomic_or(flags, _BAD_ROW)
    return tl.where(bad, -1, row)


@triton.jit
def valid_range(key_range, batch, length, flags, CONST: tl.constexpr):
    """Load a key range; one that is inverted or leaves the sequence is clipped and flagged.

    CONST: HAS_RANGE.
    """
    if CONST.HAS_RANGE:
        first = tl.load(key_range + 2 * batch)
        end = tl.load(key_range + 2 * batch + 1)
        if (first < 0) | (end > length) | (first > end):
            tl.atomic_or(flags, _BAD_RANGE)
        first, end = tl.maximum(first, 0), tl.minimum(end, length)
    else:
        first, end = length * 0, length
    return first, end


@triton.jit
def columns(CONST: tl.constexpr):
    """Return where a head's columns lie, each half padded to HALF, and which of them exist."""
    d = tl.arange(0, 2 * CONST.HALF)
    return (d // CONST.HALF) * (CONST.D // 2) + d % CONST.HALF, d % CONST.HALF < CONST.D // 2


@triton.jit
def half_columns(known, CONST: tl.constexpr):
    """Return the columns ``[1, HALF]`` of a half, and which of the known tokens' exist."""
    d = tl.arange(0, CONST.HALF)[None, :]
    return d, known[:, None] & (d < CONST.D // 2)


@triton.jit
def joined(low, high, CONST: tl.constexpr):
    """Put two halves ``[TOKENS, HALF]`` side by side."""
    pair = tl.permute(tl.join(low, high), (0, 2, 1))
    return tl.reshape(pair, (low.shape[0], 2 * CONST.HALF))


@triton.jit
def halves(x, CONST: tl.constexpr):
    """Take ``[TOKENS, 2 HALF]`` apart."""
    return tl.split(tl.permute(tl.reshape(x, (x.shape[0], 2, CONST.HALF)), (0, 2, 1)))


@triton.jit
def load_halves(at, inside, CONST: tl.constexpr):
    """Load both halves in float32 from the addresses of the low one, zeros where not inside."""
    low = tl.load(at, mask=inside, other=0.0).to(tl.float32)
    high = tl.load(at + CONST.D // 2, mask=inside, other=0.0).to(tl.float32)
    return low, high


@triton.jit
def store_halves(at, low, high, inside, CONST: tl.constexpr):
    """Store both halves at the addresses of the low one."""
    tl.store(at, low.to(at.dtype.element_ty), mask=inside)
    tl.store(at + CONST.D // 2, high.to(at.dtype.element_ty), mask=inside)


@triton.jit
def load_angles(angles, batch, token, inside, CONST: tl.constexpr):
    """Load the halves of tokens' cosines and sines; zeros without rotation. CONST: ROTATE."""
    if CONST.ROTATE:
        d = tl.arange(0, CONST.HALF)[None, :]
        at = batch * angles.batch + token[:, None].to(tl.int64) * CONST.D + d
        cos_low, cos_high = load_halves(angles.cos + at, inside, CONST)
        sin_low, sin_high = load_halves(angles.sin + at, inside, CONST)
    else:
        cos_low, cos_high, sin_low, sin_high = 0.0, 0.0, 0.0, 0.0
    return cos_low, cos_high, sin_low, sin_high


@triton.jit
def load_with_row(
    x,  # Heads
    table,  # [T, heads, D]
    head,
    heads,
    batch,
    token,  # [TOKENS], as row, which is -1 where there is none
    row,
    inside,
    ADD: tl.constexpr,
    CONST: tl.constexpr,
):
    """Load the halves of a head's tokens and add their rows of the table."""
    d = tl.arange(0, CONST.HALF)[None, :]
    at = batch * x.batch + head * x.head + token[:, None].to(tl.int64) * x.token + d
    low, high = load_halves(x.data + at, inside, CONST)
    if ADD:
        used = inside & (row[:, None] >= 0)
        chosen = table + head * CONST.D + row[:, None].to(tl.int64) * (heads * CONST.D) + d
        row_low, row_high = load_halves(chosen, used, CONST)
        low += row_low
        high += row_high
    return low, high


@triton.jit
def rotate(low, high, angle, CONST: tl.constexpr):
    """Rotate a pair of halves by what ``load_angles`` loaded. CONST: ROTATE."""
    if CONST.ROTATE:
        cos_low, cos_high, sin_low, sin_high = angle
        low, high = low * cos_low - high * sin_low, high * cos_high + low * sin_high
    return low, high


@triton.jit
def unrotate(low, high, angle, CONST: tl.constexpr):
    """Apply the rotation's transpose: what a gradient goes through. CONST: ROTATE."""
    if CONST.ROTATE:
        cos_low, cos_high, sin_low, sin_high = angle
        low, high = low * cos_low + high * sin_high, high * cos_high - low * sin_low
    return low, high


@triton.jit
def store_unrotated(out, low, high, place, token, known, batch, angles, CONST: tl.constexpr):
    """Unrotate the halves ``[TOKENS, HALF]`` of a gradient and store them. CONST: ROTATE.

    place: of the tokens' head in out, ``[TOKENS, 1]``; token, known: ``[TOKENS]``.
    """
    d, inside = half_columns(known, CONST)
    angle = load_angles(angles, batch, token, inside, CONST)
    low, high = unrotate(low, high, angle, CONST)
    store_halves(out + place * CONST.D + d, low, high, inside, CONST)


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
def keys_of(start, first, end, window, CONST: tl.constexpr):
    """Count the blocks of keys that the queries from ``start`` see; see ``blocks_between``.

    CONST: QUERIES, KEYS, CAUSAL, WINDOW.
    """
    low, high, whole_low, whole_high = first, end, first, end
    if CONST.CAUSAL:
        high = tl.minimum(end, start + CONST.QUERIES)
        whole_high = tl.minimum(end, start + 1)
    if CONST.WINDOW:
        low = tl.maximum(first, start - window + 1)
        whole_low = tl.maximum(first, start + CONST.QUERIES - window)
        if not CONST.CAUSAL:
            high = tl.minimum(end, start + CONST.QUERIES + window - 1)
            whole_high = tl.minimum(end, start + window)
    # Queries outside the range see nothing.
    high = tl.where((start < end) & (start + CONST.QUERIES > first), high, low)
    return blocks_between(low, high, whole_low, whole_high, CONST.KEYS)


@triton.jit
def queries_of(start, first, end, window, CONST: tl.constexpr):
    """Count the blocks of queries that see the keys from ``start``; see ``blocks_between``.

    CONST: QUERIES, KEYS, CAUSAL, WINDOW.
    """
    low, high, whole_low, whole_high = first, end, first, end
    if CONST.CAUSAL:
        low = tl.maximum(first, start)
        whole_low = tl.maximum(first, start + CONST.KEYS - 1)
    if CONST.WINDOW:
        high = tl.minimum(end, start + CONST.KEYS + window - 1)
        whole_high = tl.minimum(end, start + window)
        if not CONST.CAUSAL:
            low = tl.maximum(first, start - window + 1)
            whole_low = tl.maximum(first, start + CONST.KEYS - window)
    # Keys outside the range are seen by none.
    high = tl.where((start < end) & (start + CONST.KEYS > first), high, low)
    return blocks_between(low, high, whole_low, whole_high, CONST.QUERIES)


@triton.jit
def block_at(t, blocks, MASKED: tl.constexpr):
    """Return the number of the t-th whole block, or of the t-th that is not."""
    begin, before, whole, _ = blocks
    if MASKED:
        return begin + t + tl.where(t < before, 0, whole)
    return begin + before + t


@triton.jit
def visible_to(i, j, window, CONST: tl.constexpr):
    """Say which keys j are seen from queries i; shapes are broadcast. CONST: CAUSAL, WINDOW."""
    apart = i - j
    if CONST.CAUSAL:
        seen = apart >= 0
        if CONST.WINDOW:
            seen = seen & (apart < window)
    elif CONST.WINDOW:
        seen = (apart < window) & (apart > -window)
    else:
        seen = apart == apart
    return seen


@triton.jit
def load_tokens(corner, index, stride, kept, MASKED: tl.constexpr, CONST: tl.constexpr):
    """Load tokens ``[TOKENS, 2 HALF]`` of a head; those that are not kept are zeros.

    corner: the address of token 0; index: ``[TOKENS]``, counted from there.
    """
    place, exists = columns(CONST)
    at = corner + index[:, None] * stride + place[None, :]
    if MASKED:
        x = tl.load(at, mask=kept[:, None] & exists[None, :], other=0.0)
    elif CONST.D == 2 * CONST.HALF:
        x = tl.load(at)
    else:
        x = tl.load(at, mask=exists[None, :], other=0.0)
    return x
