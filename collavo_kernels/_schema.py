"""From a bundle's annotations to a schema of ``torch.library``: one name for an argument.

A bundle is a ``NamedTuple`` whose fields are the operator's arguments or results in order, such as
``class Inputs(NamedTuple): x: Tensor; rows: SymInt; bias: Tensor | None = None``. Its fields are
the schema's names, types and defaults, so the dispatcher's flat arguments make a bundle again by
``Inputs(*arguments)``.
"""

from __future__ import annotations

import math
import types
from collections.abc import Sequence
from typing import Annotated, Any, NamedTuple, Union, get_args, get_origin, get_type_hints

from torch import Tensor

_SYMBOLIC, _WRITTEN = "SymInt", "!"
SymInt = Annotated[int, _SYMBOLIC]
"""An integer that may be symbolic while a graph with dynamic shapes is made."""
Written = Annotated[Tensor, _WRITTEN]
"""A tensor that the operator writes to: ``Tensor(a!)``."""

RESERVED = ("backend", "wanted")
"""Arguments that every operator, or its backward, has beside the fields of its bundles."""
_NAMES = {Tensor: "Tensor", bool: "bool", int: "int", float: "float", str: "str"}


def hints(bundle: type[NamedTuple]) -> dict[str, Any]:
    """Return the annotations of a bundle's fields, in order."""
    found = get_type_hints(bundle, include_extras=True)
    return {name: found[name] for name in bundle._fields}


def arguments(bundle: type[NamedTuple], *, prefix: str = "", defaults: bool = True) -> list[str]:
    """Return the schema's arguments for the fields of a bundle.

    Args:
        bundle: The class.
        prefix: Put before every name.
        defaults: Whether to write the fields' defaults.

    Raises:
        TypeError: for a field of a type that a schema cannot have; the field is named.
    """
    written = iter("abcdefgh")
    texts = []
    for name, hint in hints(bundle).items():
        field = f"{bundle.__name__}.{name}"
        text = _type_of(hint, field)
        if name in RESERVED:
            raise TypeError(f"{field}: the name is the core's own; call it otherwise")
        if is_written(hint):
            letter = next(written, None)
            if letter is None:
                raise TypeError(f"{field}: expected at most eight tensors that are written to")
            text = f"Tensor({letter}!)"
        text = f"{text} {prefix}{name}"
        if defaults and name in bundle._field_defaults:
            text += f"={_literal(bundle._field_defaults[name], field)}"
        texts.append(text)
    return texts


def results(bundle: type[NamedTuple]) -> str:
    """Return the schema's returns for a bundle of results; one field is returned by itself."""
    texts = arguments(bundle, defaults=False)
    return "Tensor" if len(texts) == 1 else f"({', '.join(texts)})"


class Places(NamedTuple):
    """Where tensors are among the fields of bundles that are laid end to end.

    Attributes:
        single: Fields that are a tensor or None.
        lists: Fields that are a list of tensors.
        others: Fields that hold no tensor.
    """

    single: tuple[int, ...]
    lists: tuple[int, ...]
    others: tuple[int, ...]

    @staticmethod
    def of(*bundles: type[NamedTuple], without: Sequence[str] = ()) -> Places:
        """Find the tensors among the fields of these bundles, but for some by name."""
        fields = [(name, hint) for each in bundles for name, hint in hints(each).items()]
        kinds = ["left out" if name in without else _type_of(hint, name) for name, hint in fields]
        single = tuple(i for i, kind in enumerate(kinds) if kind in ("Tensor", "Tensor?"))
        lists = tuple(i for i, kind in enumerate(kinds) if kind == "Tensor[]")
        apart = {*single, *lists, *(i for i, kind in enumerate(kinds) if kind == "left out")}
        return Places(single, lists, tuple(i for i in range(len(kinds)) if i not in apart))

    def tensors(self, values: Sequence[Any]) -> list[Tensor]:
        """Return the tensors among the values of all fields."""
        found: list[Tensor] = [x for i in self.single if (x := values[i]) is not None]
        for i in self.lists:
            found += values[i]
        return found

    def take(self, values: Sequence[Any]) -> tuple[list[Tensor | None], list[int]]:
        """Return what stands in every tensor's place, and how long the lists are."""
        found: list[Tensor | None] = [values[i] for i in self.single]
        for i in self.lists:
            found += values[i]
        return found, [len(values[i]) for i in self.lists]

    def rest(self, values: Sequence[Any]) -> list[tuple[int, Any]]:
        """Return the values that are no tensors, with their places."""
        return [(i, values[i]) for i in self.others]

    def put(
        self, taken: Sequence[Any], rest: Sequence[tuple[int, Any]], lengths: Sequence[int], n: int
    ) -> list[Any]:
        """Return n values again from what ``take`` and ``rest`` gave; left-out ones are None."""
        values: list[Any] = [None] * n
        for i, value in rest:
            values[i] = value
        for i, value in zip(self.single, taken, strict=False):
            values[i] = value
        start = len(self.single)
        for i, length in zip(self.lists, lengths, strict=True):
            values[i] = list(taken[start : start + length])
            start += length
        return values


def is_written(hint: Any) -> bool:
    """Tell whether a field is a tensor that the operator writes to."""
    return get_origin(hint) is Annotated and _WRITTEN in get_args(hint)[1:]


def is_optional(hint: Any) -> bool:
    """Tell whether a field may be None."""
    return get_origin(hint) in (Union, types.UnionType) and type(None) in get_args(hint)


def _type_of(hint: Any, field: str) -> str:
    origin, inner = get_origin(hint), get_args(hint)
    if origin is list:
        return f"{_plain(inner[0], field)}[]"
    if is_optional(hint) and len(inner) == 2:
        return f"{_plain(next(each for each in inner if each is not type(None)), field)}?"
    return _plain(Tensor if is_written(hint) else hint, field)


def _plain(hint: Any, field: str) -> str:
    if hint == SymInt:
        return _SYMBOLIC
    if not isinstance(hint, type) or hint not in _NAMES:
        raise TypeError(
            f"{field}: expected Tensor, Written, bool, int, SymInt, float or str, or a list or an "
            f"optional of one of these but Written, got {hint!r}"
        )
    return _NAMES[hint]


def _literal(value: Any, field: str) -> str:
    if isinstance(value, str):
        if value and not (value.isascii() and value.replace("_", "").isalnum()):
            raise TypeError(f"{field}: expected letters and digits by default, got {value!r}")
        return f'"{value}"'
    if value is None or isinstance(value, int) or (type(value) is float and math.isfinite(value)):
        return str(value)
    raise TypeError(f"{field}: expected None, a number or a string by default, got {value!r}")
