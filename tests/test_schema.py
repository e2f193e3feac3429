"""From a bundle's annotations to a schema, and what a bundle may not have."""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
from torch import Tensor

from collavo_kernels import _schema
from collavo_kernels._backends import Backend
from collavo_kernels._derivative import Derivative, Nothing
from collavo_kernels._register import Operator
from collavo_kernels._schema import SymInt, Written


class Everything(NamedTuple):
    buffer: Written
    x: Tensor
    maybe: Tensor | None
    parts: list[Tensor]
    counts: list[SymInt]
    size: SymInt
    other: Written
    flag: bool = True
    scale: float | None = None
    eps: float = 1e-5
    name: str = "nearest"
    text: str = ""


def test_names_types_and_defaults() -> None:
    assert ", ".join(_schema.arguments(Everything)) == (
        "Tensor(a!) buffer, Tensor x, Tensor? maybe, Tensor[] parts, SymInt[] counts, SymInt size, "
        'Tensor(b!) other, bool flag=True, float? scale=None, float eps=1e-05, str name="nearest", '
        'str text=""'
    )
    assert _schema.Places.of(Everything) == ((0, 1, 2, 6), (3,), (4, 5, 7, 8, 9, 10, 11))


def test_values_go_apart_and_together_again() -> None:
    places = _schema.Places.of(Everything, without=["x"])
    values = [object() if i != 3 else [object(), object()] for i in range(12)]
    taken, lengths = places.take(values)
    found = places.put(taken, places.rest(values), lengths, 12)
    assert found == [None if i == 1 else value for i, value in enumerate(values)]


def bundle(hint: Any, *default: Any, name: str = "field") -> Any:
    made: Any = NamedTuple("made", [(name, hint)])
    made._field_defaults = dict.fromkeys([name], *default) if default else {}
    return made


@pytest.mark.parametrize(
    ("made", "message"),
    [
        (bundle(Written | None), "made.field: expected Tensor"),
        (bundle(list[Written]), "made.field: expected Tensor"),
        (bundle(list[Tensor | None]), "made.field: expected Tensor"),
        (bundle(list[Tensor] | None), "made.field: expected Tensor"),
        (bundle(int | float | None), "made.field: expected Tensor"),
        (bundle(dict), "made.field: expected Tensor"),
        (bundle(Tensor, name="wanted"), "made.wanted: the name is the core's own"),
        (bundle(Tensor, name="backend"), "made.backend: the name is the core's own"),
        (bundle(str, 'a"b'), "made.field: expected letters and digits"),
        (bundle(float, float("inf")), "made.field: expected None, a number or a string"),
        (bundle(list[int], []), "made.field: expected None, a number or a string"),
    ],
)
def test_what_a_schema_cannot_say_is_refused(made: Any, message: str) -> None:
    with pytest.raises(TypeError, match=message):
        _schema.arguments(made)


class Values(NamedTuple):
    y: Tensor
    z: Tensor


class Leaves(NamedTuple):
    x: Tensor


class Wrong(NamedTuple):
    nothing: Tensor


class WrittenTo(NamedTuple):
    x: Written


@pytest.mark.parametrize(
    ("inputs", "parts", "message"),
    [
        (Leaves, {"output_grads": Wrong}, "output_grads: 'nothing' is none of y, z"),
        (Leaves, {"gradients": Wrong}, "gradients: 'nothing' is none of x"),
        (Leaves, {"replaced": {"nothing": "y"}}, "replaced: 'nothing' is none of x"),
        (Leaves, {"replaced": {"x": "y"}}, "what replaces inputs: 'y' is none of"),
        (Leaves, {"output_grads": Values}, "may not be None: 'y' is none of"),
        (WrittenTo, {}, "expected no derivative, since x is written to"),
    ],
)
def test_bundles_that_do_not_fit_are_refused(
    inputs: Any, parts: dict[str, Any], message: str, request: pytest.FixtureRequest
) -> None:
    def nothing(*_: Any) -> Any:
        return None

    given: dict[str, Any] = {"saved": Nothing, "output_grads": Values, "gradients": Leaves}
    if "may not" not in message:
        given["output_grads"] = OptionalGrads
    name = f"toy_{abs(hash(request.node.name))}"
    with pytest.raises(TypeError, match=message):
        Operator(
            name,
            inputs=inputs,
            result=Values,
            backends=[Backend("reference", nothing, nothing)],
            validate=nothing,
            fake=nothing,
            derivative=Derivative(keep=nothing, validate=nothing, **(given | parts)),
        )


class OptionalGrads(NamedTuple):
    y: Tensor | None
