"""Memory that shows mistakes: poisoned allocations and views with odd offsets and strides."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

_ALLOCATORS = (
    (torch, "empty"),
    (torch, "empty_like"),
    (torch, "empty_strided"),
    (Tensor, "new_empty"),
)


def _poison(tensor: Tensor) -> Tensor:
    if tensor.is_meta or type(tensor) is not Tensor:
        return tensor
    if tensor.is_floating_point():
        return tensor.fill_(float("nan"))
    if tensor.dtype in (torch.int32, torch.int64):
        return tensor.fill_(-(2**30))
    if tensor.dtype == torch.uint8:
        return tensor.fill_(0xFF)  # NaN in any float that scratch is used as
    return tensor


@contextmanager
def poisoned_empty() -> Iterator[None]:
    """Fill what ``torch.empty`` and its relatives return with NaN (integers with an absurd value).

    A kernel that leaves a part of its output unwritten then fails its test instead of passing on
    recycled memory.

    Example:
        >>> import torch
        >>> with poisoned_empty():
        ...     bool(torch.empty(3).isnan().all())
        True
    """

    def wrap(original: Callable[..., Tensor]) -> Callable[..., Tensor]:
        @functools.wraps(original)
        def allocate(*args: Any, **kwargs: Any) -> Tensor:
            with torch.no_grad():
                return _poison(original(*args, **kwargs))

        return allocate

    originals = [(owner, name, getattr(owner, name)) for owner, name in _ALLOCATORS]
    try:
        for owner, name, original in originals:
            setattr(owner, name, wrap(original))
        yield
    finally:
        for owner, name, original in originals:
            setattr(owner, name, original)


def offset_view(tensor: Tensor) -> Tensor:
    """Return a non-contiguous view with an odd storage offset that holds the same values.

    It catches kernels that assume alignment or contiguity. The memory around the values holds NaN
    (floats) or an absurd value (integers), so a read outside the view shows.

    Args:
        tensor: Any shape with at least one dimension, any dtype.

    Example:
        >>> import torch
        >>> view = offset_view(torch.ones(2, 3))
        >>> view.is_contiguous(), view.storage_offset() % 2, bool((view == 1).all())
        (False, 1, True)
    """
    shape = list(tensor.shape)
    padded = [*shape[:-1], 2 * shape[-1] + 3]
    buffer = _poison(torch.zeros(padded, dtype=tensor.dtype, device=tensor.device))
    view = buffer[..., 1 : 1 + 2 * shape[-1] : 2]
    with torch.no_grad():
        view.copy_(tensor)
    return view
