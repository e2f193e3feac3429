"""From a bundle's annotations to a schema of ``torch.library``: one name for an argument.

A bundle is a ``NamedTuple`` whose fields are the operator's arguments or results in order, such as
``class Inputs(NamedTuple): x: Tensor; rows: SymInt; bias: Tensor | None = None``. Its fields are
the schema's names, types and defaults, so the dispatcher's flat arguments make a bundle again by
``Inputs(*arguments)``.
"""

from __future__ import annotations

import types
from collections.abc import Sequence
from typing import Annotated, Any, NamedTuple, Union, get_args, get_origin, get_type_hints

from torch import Tensor

_SYMBOLIC, _WRITTEN = "SymInt", "!"
SymInt = Annotated[int, _SYMBOLIC]
"""An integer that may be symbolic while a graph with dynamic shapes is made."""
Written = Annotated[Tensor, _WRITTEN]
"""A tensor that the operator writes to: ``Tensor(a!)``."""

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
    written = (letter for letter in "abcdefgh")
    texts = []
    for name, hint in hints(bundle).items():
        text = _type_of(hint, f"{bundle.__name__}.{name}")
        if is_written(hint):
            text = f"Tensor({next(written)}!)"
        text = f"{text} {prefix}{name}"
        if defaults and name in bundle._field_defaults:
            text += f"={_literal(bundle._field_defaults[name])}"
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
    """

    single: tuple[int, ...]
    lists: tuple[int, ...]

    @staticmethod
    def of(*bundles: type[NamedTuple]) -> Places:
        """Find the tensors among the fields of these bundles."""
        kinds = [_type_of(h, each.__name__) for each in bundles for h in hints(each).values()]
        single = tuple(i for i, kind in enumerate(kinds) if kind in ("Tensor", "Tensor?"))
        return Places(single, tuple(i for i, kind in enumerate(kinds) if kind == "Tensor[]"))

    def tensors(self, values: Sequence[Any]) -> list[Tensor]:
        """Return the tensors among the values of all fields."""
        found: list[Tensor] = [x for i in self.single if (x := values[i]) is not None]
        for i in self.lists:
            found += values[i]
        return found


def is_written(hint: Any) -> bool:
    """Tell whether a field is a tensor that the operator writes to."""
    return get_origin(hint) is Annotated and _WRITTEN in get_args(hint)[1:]


def is_optional(hint: Any) -> bool:
    """Tell whether a field may be None."""
    return get_origin(hint) in (Union, types.UnionType) and type(None) in get_args(hint)


def _type_of(hint: Any, field: str) -> str:
    if get_origin(hint) is Annotated:
        base, *marks = get_args(hint)
        return _SYMBOLIC if _SYMBOLIC in marks else _type_of(base, field)
    if is_optional(hint):
        (base,) = (each for each in get_args(hint) if each is not type(None))
        return f"{_type_of(base, field)}?"
    if get_origin(hint) is list:
        return f"{_type_of(get_args(hint)[0], field)}[]"
    if hint not in _NAMES:
        raise TypeError(
            f"{field}: expected Tensor, bool, int, SymInt, float, str, a list or an optional of "
            f"these, got {hint!r}"
        )
    return _NAMES[hint]


def _literal(value: Any) -> str:
    return f'"{value}"' if isinstance(value, str) else str(value)
