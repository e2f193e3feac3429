"""What came in an argument's place: swapped arguments and paths are named before they are used."""

from __future__ import annotations

from collections.abc import Sequence
from os import PathLike


def expect_like(
    argument: str, value: object, expected: str, *, has: Sequence[str] = (), hint: str = ""
) -> None:
    """Check that an argument has what is used of it; whoever made its class is all the same.

    Args:
        argument: Its name.
        value: What came.
        expected: What is expected, for the message.
        has: Attributes that are used.
        hint: What to do, appended to the message.

    Raises:
        TypeError: if it lacks one, or is a path or a class.
    """
    wrong = isinstance(value, (str, bytes, PathLike, type))
    if wrong or any(not hasattr(value, name) for name in has):
        came = f"the class {value.__name__}" if isinstance(value, type) else type(value).__name__
        advice = f"; {hint}" if hint else ""
        raise TypeError(f"{argument}: expected {expected}, got {came}{advice}")


def expect_path(argument: str, value: object, expected: str) -> None:
    """Check that an argument is a path.

    Raises:
        TypeError: if it is not.
    """
    if not isinstance(value, (str, PathLike)):
        raise TypeError(f"{argument}: expected the path of {expected}, got {type(value).__name__}")
