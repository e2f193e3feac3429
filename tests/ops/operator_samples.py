"""Samples of all operators, made-up ones included, and what tests over them share."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import pytest
import torch
import toy_operators
from torch import Tensor

from collavo_kernels import info
from collavo_kernels._register import AnyOperator
from collavo_kernels.testing import (
    cases,
)

OPERATORS: dict[str, AnyOperator] = {
    **info.operators(),
    "toy_fill": toy_operators.FILL,
    "toy_scale": toy_operators.SCALE,
    "toy_cube": toy_operators.CUBE,
}
DIFFERENTIABLE = {name: each for name, each in OPERATORS.items() if each.derivative is not None}


class Sample(NamedTuple):
    operator: AnyOperator
    inputs: Any


def samples(operators: dict[str, AnyOperator]) -> Iterator[Any]:
    for name, operator in operators.items():
        found = toy_operators.samples if name.startswith("toy") else cases.samples
        for case, inputs in found(name):
            yield pytest.param(Sample(operator, inputs), id=f"{name}-{case}")


every_sample = pytest.mark.parametrize("sample", list(samples(OPERATORS)))
differentiable = pytest.mark.parametrize("sample", list(samples(DIFFERENTIABLE)))


def changed(bundle: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """Return a bundle with every tensor replaced."""

    def one(value: Any) -> Any:
        if isinstance(value, list):
            return [one(each) for each in value]
        return change(value) if isinstance(value, Tensor) else value

    return type(bundle)(*map(one, bundle))


def with_gradients(sample: Sample) -> tuple[Any, list[Tensor]]:
    """Return the inputs with leaves of their own that ask for gradients, and these leaves."""
    derivative = sample.operator.derivative
    wanting = {id(x) for x in derivative.leaves(sample.inputs) if x is not None}

    def leaf(x: Tensor) -> Tensor:
        own = x.detach().clone()
        return own.requires_grad_(id(x) in wanting and x.is_floating_point())

    inputs = changed(sample.inputs, leaf)
    return inputs, leaves_of(sample, inputs)


def leaves_of(sample: Sample, inputs: Any) -> list[Tensor]:
    found = sample.operator.derivative.leaves(inputs)
    return [x for x in found if x is not None and x.requires_grad]


def copied(inputs: Any) -> Any:
    return changed(inputs, lambda x: x.detach().clone().requires_grad_(x.requires_grad))


def outputs(operator: AnyOperator, inputs: Any, **options: Any) -> list[Tensor]:
    """Call the operator as ``torch.ops`` does."""
    found = operator.op(*inputs, **options)
    return [found] if isinstance(found, Tensor) else list(found)


def loss(found: list[Tensor]) -> Tensor:
    """A number that depends on every output that has a gradient, each in another way."""
    wanted = [x for x in found if x.requires_grad]
    total = torch.zeros((), dtype=torch.float64)
    for i, x in enumerate(wanted, start=1):
        wide = x.double() if x.dtype == torch.float64 else x.float()
        total = total + (wide * (i + wide)).sum()
    return total


def assert_same(found: list[Any], expected: list[Any]) -> None:
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        assert one is other is None or torch.equal(one, other)


def double(inputs: Any) -> Any:
    return changed(inputs, lambda x: x.detach().double() if x.is_floating_point() else x)
