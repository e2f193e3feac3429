"""The crayon of the forward pass that is running: how it reaches layers whose callers know none."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

from collavo_kernels.nn.attention.projections import CrayonInputs

# Of this thread's forward alone, and no module holds it: several threads may run one model.
_BOUND: ContextVar[CrayonInputs | None] = ContextVar("bound_crayon", default=None)


@contextmanager
def bound_crayon(crayon: CrayonInputs | None) -> Iterator[None]:
    """Let what runs inside see a crayon; None hides one that is bound outside.

    Args:
        crayon: The forward pass's crayon, or None.

    Example:
        >>> with bound_crayon(CrayonInputs()):
        ...     current_crayon() is None
        False
        >>> current_crayon() is None
        True
    """
    token = _BOUND.set(crayon)
    try:
        yield
    finally:
        _BOUND.reset(token)


def current_crayon() -> CrayonInputs | None:
    """Return the crayon that is bound in this thread, or None."""
    return _BOUND.get()
