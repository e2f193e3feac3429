"""What the launches of all Triton kernels share: constants as one argument.

A kernel takes few arguments: a tuple for a tensor with its strides and what else belongs together,
and ``CONST``, all that the compiler knows. Triton specialises a tuple element by element, as it
does single arguments, and its ``do_not_specialize`` does not reach inside: what must not be
specialised stays an argument of its own.
"""

from __future__ import annotations

from functools import cache

import triton.language as tl


class Constants:
    """Values that are known when a kernel is compiled; it reads them as attributes.

    Triton hands a kernel its constant as it is, and what is read from it has to be a constant too.
    """

    def __init__(self, values: tuple[tuple[str, int | str], ...]) -> None:
        for name, value in values:
            setattr(self, name, tl.constexpr(value))
        # Triton looks a compiled kernel up by its constants at every launch, and names code by it.
        self._values = values
        self._hash = hash(values)
        self._text = f"Constants({', '.join(f'{name}={value}' for name, value in values)})"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Constants) and self._values == other._values

    def __hash__(self) -> int:
        return self._hash

    def __repr__(self) -> str:
        return self._text


def constants(**values: int | str) -> Constants:
    """Return the argument ``CONST`` of a kernel: the same object for the same values."""
    return _constants(tuple(values.items()))


@cache
def _constants(values: tuple[tuple[str, int | str], ...]) -> Constants:
    return Constants(values)
