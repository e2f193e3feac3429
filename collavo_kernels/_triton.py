"""What the launches of all Triton kernels share: constants as one argument.

A kernel takes few arguments: a tuple for a tensor with its strides and what else belongs together,
and ``CONST``, all that the compiler knows. Triton specialises a tuple element by element, as it
does single arguments, and its ``do_not_specialize`` does not reach inside: what must not be
specialised stays an argument of its own.
"""

from __future__ import annotations

from functools import cache

import triton.language as tl


class Constants(str):
    """Values that are known when a kernel is compiled; it reads them as attributes.

    As text because Triton looks a compiled kernel up by its constants at every launch, finds its
    machine code again by them, and hands them to hooks as JSON.
    """

    def __new__(cls, values: tuple[tuple[str, int | str], ...]) -> Constants:
        self = super().__new__(cls, ", ".join(f"{name}={value}" for name, value in values))
        for name, value in values:
            # Triton hands its constant over as it is; what is read from it has to be one too.
            setattr(self, name, tl.constexpr(value))
        return self


def constants(**values: int | str) -> Constants:
    """Return the argument ``CONST`` of a kernel: the same object for the same values."""
    return _constants(tuple(values.items()))


@cache
def _constants(values: tuple[tuple[str, int | str], ...]) -> Constants:
    return Constants(values)
