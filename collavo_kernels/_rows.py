"""Tables of rows that tokens refer to: an index checked, rows added, values summed by row.

``index`` is int32 ``[B, S]`` or ``[tokens]``, -1 = the token has no row; a table is ``[T, ...]``.
Operators' references and plain PyTorch paths share this code; kernels do the same in one pass.
"""

from __future__ import annotations

import torch
from torch import Tensor

from collavo_kernels._flags import (
    CRAYON_INDEX_OUT_OF_RANGE,
    ROW_INDEX_OUT_OF_RANGE,
    error_word,
)

# By the argument that an index is: what has the rows, what an entry is of, the bit on a device.
_WORDS = {
    "row_index": ("the table", "token", ROW_INDEX_OUT_OF_RANGE),
    "crayon_index": ("a sample", "image token", CRAYON_INDEX_OUT_OF_RANGE),
}


def checked_index(index: Tensor, count: int, argument: str = "row_index") -> Tensor:
    """Return the index with no entry outside a table of ``count`` rows.

    Args:
        index: int32 or int64 ``[B, S]`` or ``[tokens]``.
        count: T.
        argument: What the caller calls it: ``"row_index"`` or ``"crayon_index"``.

    Raises:
        ValueError: on the CPU, naming the first bad entry; elsewhere, where raising would wait for
            the device, a bad entry becomes -1 and ``collavo_kernels.check()`` reports it.
            Compiled code and tensors without values make it -1 in silence.
    """
    if index.numel() == 0:
        return index
    owner, entry, bit = _WORDS[argument]
    bad = (index < -1) | (index >= count)
    if torch.compiler.is_compiling() or index.is_meta or type(index) is not Tensor:
        return index.masked_fill(bad, -1)
    if index.device.type != "cpu":
        error_word(index.device).bitwise_or_(bad.any().int() * bit)
        return index.masked_fill(bad, -1)
    if bool(bad.any()):
        place = bad.nonzero()[0].tolist()
        names = ("sample", entry)[-len(place) :] if len(place) in (1, 2) else ()
        where = ", ".join(f"{name} {i}" for name, i in zip(names, place, strict=False))
        where = where or f"place {place}"
        raise ValueError(
            f"{argument}: expected entries from -1 to {count - 1} ({owner} has {count} rows), "
            f"got {int(index[tuple(place)])} at {where}"
        )
    return index


def add_rows(x: Tensor, table: Tensor, index: Tensor) -> Tensor:
    """Return ``x + table[index]`` as a new tensor of x's dtype; x's values where there is no row.

    Args:
        x: ``[*index.shape, ...]``.
        table: ``[T, ...]``; rounded to x's dtype before it is added.
        index: Checked. What other rows hold reaches no token.
    """
    if table.shape[0] == 0:
        return x.clone()
    chosen = table.to(x.dtype)[index.clamp_min(0).long()]
    has_row = (index >= 0).reshape(*index.shape, *[1] * (table.dim() - 1))
    return torch.where(has_row, x + chosen, x)


def sum_rows(x: Tensor, index: Tensor, count: int) -> Tensor:
    """Sum x over the tokens of each row, in token order on every device.

    Rows that no token has get exact zeros, whatever the other tokens hold.

    Args:
        x: ``[*index.shape, ...]``.
        index: Checked.
        count: T.

    Returns:
        ``[T, ...]`` in x's dtype.
    """
    shape = (count, *x.shape[index.dim() :])
    if x.numel() == 0 or count == 0:
        return x.new_zeros(shape)
    ordered, order = torch.sort(index.reshape(-1).long(), stable=True)
    offsets = torch.searchsorted(ordered, torch.arange(count + 1, device=index.device))
    tokens = x.reshape(index.numel(), -1).index_select(0, order)
    sums = torch.segment_reduce(tokens, "sum", offsets=offsets, axis=0, unsafe=True)
    return sums.reshape(shape)
