"""What came in an argument's place: swapped arguments and paths are named before they are used."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from os import PathLike

from huggingface_hub.errors import StrictDataclassError


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


@contextmanager
def fields_read(where: str) -> Iterator[None]:
    """Name the file whose fields are read, where one of another kind makes code fail.

    Args:
        where: The file.

    Raises:
        ValueError: for what such fields raise.
    """
    try:
        yield
    except (AttributeError, KeyError, RuntimeError, StrictDataclassError, TypeError) as error:
        reason = " ".join(str(error).split())[:300]
        raise ValueError(f"{where}: a field is of another kind than expected ({reason})") from error
