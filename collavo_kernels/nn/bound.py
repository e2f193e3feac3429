"""The crayon of the forward pass that is running: how it reaches layers whose callers know none."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import NamedTuple

from torch import Tensor, nn

from collavo_kernels.nn.attention.projections import CrayonInputs


class _Bound(NamedTuple):
    crayon: CrayonInputs | None = None
    tables: Mapping[nn.Module, Tensor] = {}


# Of this thread's forward alone, and no module holds it: several threads may run one model.
_BOUND: ContextVar[_Bound] = ContextVar("bound_crayon", default=_Bound())  # noqa: B039


@contextmanager
def bound_crayon(
    crayon: CrayonInputs | None, tables: Mapping[nn.Module, Tensor] | None = None
) -> Iterator[None]:
    """Let linear layers that run inside see a crayon; None hides one that is bound outside.

    Those are layers that ``add_crayon_to_linears`` has seen. ``CrayonAttention`` takes its crayon
    as an argument, and reads none that is bound.

    Args:
        crayon: The forward pass's crayon, or None.
        tables: ``[T, N]`` by linear layer: rows that join its output as they are (projection mode).

    Example:
        >>> with bound_crayon(CrayonInputs()):
        ...     current_crayon() is None
        False
        >>> current_crayon() is None
        True
    """
    token = _BOUND.set(_Bound(crayon, tables or {}))
    try:
        yield
    finally:
        _BOUND.reset(token)


def current_crayon() -> CrayonInputs | None:
    """Return the crayon that is bound in this thread, or None."""
    return _BOUND.get().crayon


def current_table(layer: nn.Module) -> Tensor | None:
    """Return the rows that are bound for a linear layer's output in this thread, or None.

    Args:
        layer: The linear layer.
    """
    return _BOUND.get().tables.get(layer)
