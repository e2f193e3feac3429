"""A mixin in front of a loaded module's class: how a module changes without being replaced."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache
from typing import Any, cast


@cache
def with_mixin(mixin: Any, original: Any) -> Any:
    """Return a class with a mixin in front, made once for each pair, whose instances pickle.

    Args:
        mixin: The class in front.
        original: The class whose name and module it has: libraries look classes up by both.

    Example:
        >>> from torch import nn
        >>> class Doubled:
        ...     def forward(self, x):
        ...         return 2 * super().forward(x)
        >>> layer = nn.Linear(2, 2)
        >>> layer.__class__ = with_mixin(Doubled, nn.Linear)
        >>> type(layer).__name__, isinstance(layer, Doubled)
        ('Linear', True)
    """
    body: Mapping[str, Any] = {
        "__module__": original.__module__,
        "__doc__": original.__doc__,
        "__reduce_ex__": _reduce_ex(mixin, original),
    }
    return type(original.__name__, (mixin, original), dict(body))


def _reduce_ex(mixin: type, original: type) -> Callable[[Any, Any], tuple[Any, ...]]:
    """Return what pickles an instance of ``with_mixin``'s class: no module has it by its name."""

    def reduce(self: Any, protocol: Any) -> tuple[Any, ...]:
        parts = cast("tuple[Any, ...]", object.__reduce_ex__(self, max(2, protocol)))
        if type(self) is not with_mixin(mixin, original):  # a subclass, e.g. FSDP's
            return parts
        return (instance_with_mixin, (mixin, original), *parts[2:])

    return reduce


def instance_with_mixin(mixin: type, original: type) -> Any:
    """Return an instance of ``with_mixin``'s class without state: what a pickle starts from.

    Args:
        mixin: The class in front.
        original: The class behind it.
    """
    made = with_mixin(mixin, original)
    return made.__new__(made)
