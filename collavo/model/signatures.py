"""Functions that stand before others and have their signatures: transformers reads those."""

from __future__ import annotations

import inspect
import types
from collections.abc import Callable, Sequence
from typing import Any, cast


def parameter_names(function: Callable[..., Any]) -> tuple[str, ...]:
    """Return the names of what can be given to a method by position, after ``self``.

    Args:
        function: A method as its class has it.
    """
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    parameters = inspect.signature(function).parameters.values()
    return tuple(p.name for p in parameters if p.kind in kinds)[1:]


def with_signature(
    function: Any, behind: Callable[..., Any], more: Sequence[str] = (), hidden: Sequence[str] = ()
) -> Any:
    """Return a copy of a method that has the signature of the one that it stands before.

    ``generate`` refuses inputs, and Trainer drops columns, that a forward's signature lacks.

    Args:
        function: The method; it takes what the other one takes.
        behind: The method behind it.
        more: Parameters beside its own, None by default.
        hidden: Parameters of it to leave out.

    Example:
        >>> def behind(self, x, **kwargs): ...
        >>> def front(self, *args, crayon=None, **kwargs): ...
        >>> inspect.signature(with_signature(front, behind, ["crayon"]))
        <Signature (self, x, crayon=None, **kwargs)>
    """
    signature = inspect.signature(behind)
    parameters = [p for p in signature.parameters.values() if p.name not in hidden]
    at = len(parameters)
    while at and parameters[at - 1].kind in (
        inspect.Parameter.KEYWORD_ONLY,
        inspect.Parameter.VAR_KEYWORD,
    ):
        at -= 1
    kind = inspect.Parameter.KEYWORD_ONLY
    if not any(p.kind is inspect.Parameter.VAR_POSITIONAL for p in parameters[:at]):
        kind = inspect.Parameter.POSITIONAL_OR_KEYWORD  # type: ignore[assignment]
    parameters[at:at] = [inspect.Parameter(name, kind, default=None) for name in more]
    made = cast(
        Any,
        types.FunctionType(
            function.__code__,
            function.__globals__,
            function.__name__,
            function.__defaults__,
            function.__closure__,
        ),
    )
    made.__kwdefaults__ = function.__kwdefaults__
    made.__doc__, made.__qualname__ = function.__doc__, function.__qualname__
    made.__annotations__ = function.__annotations__
    made.__signature__ = signature.replace(parameters=parameters)
    return made
