"""Checks of shapes, dtypes and devices that every public operator makes before anything runs.

Messages name the argument, what was expected and what came. Values (row indices, key ranges) are
checked inside the operators, where no host synchronisation is needed.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar, overload

import numpy as np
import torch
from torch import Tensor

_Entry = TypeVar("_Entry")
FLOAT_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
REFERENCE_DTYPES = (*FLOAT_DTYPES, torch.float64)


def describe(value: object) -> str:
    """Say what came: a tensor as its dtype, shape and device, anything else as its type."""
    if isinstance(value, Tensor):
        dtype = str(value.dtype).removeprefix("torch.")
        shape = "of unequal shapes" if value.is_nested else list(value.shape)
        return f"{dtype} {shape} on {value.device}"
    return type(value).__name__


def expect_tensor(
    argument: str,
    value: object,
    *,
    shape: Sequence[int | str | torch.SymInt] | None = None,
    dtypes: Sequence[torch.dtype] | None = None,
    device: torch.device | None = None,
    hint: str = "",
) -> Tensor:
    """Check one tensor argument and return it.

    Args:
        argument: Its name, as the caller wrote it.
        value: What came.
        shape: One entry per dimension: a size that must match, or a name for a size that may be
            anything.
        dtypes: The dtypes that are taken.
        device: The device that it must be on.
        hint: What to do, appended to the message.

    Returns:
        The tensor itself.

    Raises:
        TypeError: if it is no dense tensor or has another dtype.
        ValueError: if its shape or device is another.
    """
    if not isinstance(value, Tensor):
        raise TypeError(f"{argument}: expected a tensor, got {describe(value)}{_suffix(hint)}")
    if not is_dense(value):
        raise TypeError(f"{argument}: expected a dense tensor, got {_layout_of(value)}")
    if dtypes is not None and value.dtype not in dtypes:
        names = " or ".join(str(d).removeprefix("torch.") for d in dtypes)
        raise TypeError(f"{argument}: expected dtype {names}, got {describe(value)}{_suffix(hint)}")
    if shape is not None and not _shape_matches(value, shape):
        wanted = ", ".join(str(size) for size in shape)
        raise ValueError(
            f"{argument}: expected shape [{wanted}], got {describe(value)}{_suffix(hint)}"
        )
    if device is not None and value.device != device:
        raise ValueError(
            f"{argument}: expected a tensor on {device}, got {describe(value)}{_suffix(hint)}"
        )
    return value


def is_dense(value: Tensor) -> bool:
    """Say whether a tensor's elements lie in memory at strides, which all that reads them needs."""
    return value.layout is torch.strided and not value.is_nested


def _layout_of(value: Tensor) -> str:
    if value.is_nested:
        return f"a nested one, {describe(value)}; torch.nested.to_padded_tensor makes it dense"
    layout = str(value.layout).removeprefix("torch.").removeprefix("_")
    return f"one of layout {layout}, {describe(value)}; to_dense() makes it dense"


def _shape_matches(value: Tensor, shape: Sequence[int | str | torch.SymInt]) -> bool:
    # A plain loop: this runs several times in every call of an operator.
    found = value.shape
    if len(found) != len(shape):
        return False
    for size, want in zip(found, shape):  # noqa: B905, SIM110
        if size != want and not isinstance(want, str):
            return False
    return True


def _suffix(hint: str) -> str:
    return f"; {hint}" if hint else ""


def expect_number(argument: str, value: float) -> float:
    """Check that an argument is a real number and return it.

    Raises:
        TypeError: if it is not.
    """
    if not isinstance(value, (int, float, torch.SymInt, torch.SymFloat, np.number)):
        raise TypeError(f"{argument}: expected a number, got {describe(value)}")
    return value


def expect_list(argument: str, value: Sequence[_Entry], of: str) -> Sequence[_Entry]:
    """Check that an argument is a list or tuple, no bundle of its own, and return it.

    Args:
        argument: Its name.
        value: What came.
        of: What its entries are, for the message.

    Raises:
        TypeError: if it is not.
    """
    if type(value) is list or type(value) is tuple:
        return value
    if not isinstance(value, Sequence) or isinstance(value, str) or hasattr(value, "_fields"):
        raise TypeError(f"{argument}: expected a list of {of}, got {describe(value)}")
    return value


def expect_choice(argument: str, value: str, choices: Sequence[str]) -> str:
    """Check that a string argument is one of its choices and return it.

    Raises:
        ValueError: if it is not.
    """
    if value not in choices:
        raise ValueError(f"{argument}: expected one of {', '.join(choices)}, got {value!r}")
    return value


def expect_int(argument: str, value: int, *, minimum: int, maximum: int | None = None) -> int:
    """Check that an integer argument lies in its range and return it.

    Raises:
        TypeError: if it is no integer.
        ValueError: if it is out of range.
    """
    if not isinstance(value, (int, torch.SymInt, np.integer)):
        raise TypeError(f"{argument}: expected an integer, got {describe(value)}")
    if value < minimum or (maximum is not None and value > maximum):
        upper = "" if maximum is None else f" and at most {maximum}"
        raise ValueError(f"{argument}: expected at least {minimum}{upper}, got {value}")
    return value


@overload
def lowered(value: Tensor, dtype: torch.dtype) -> Tensor: ...


@overload
def lowered(value: Tensor | None, dtype: torch.dtype) -> Tensor | None: ...


def lowered(value: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """Return a tensor in autocast's dtype; float64, integers and None stay as they are."""
    return value.to(dtype) if value is not None and value.dtype in FLOAT_DTYPES else value
