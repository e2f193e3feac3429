"""Operators made up for tests: one that writes to its argument, two with a derivative.

They take the place of a fourth operator: what the core promises holds for it without a line of its
own. They are registered once, when this module is imported.
"""

from __future__ import annotations

from typing import Generic, NamedTuple, TypeVar

import torch
from torch import Tensor

from collavo_kernels._backends import Backend, ForwardOnly
from collavo_kernels._derivative import Derivative
from collavo_kernels._register import Operator
from collavo_kernels._schema import Written
from collavo_kernels._validation import FLOAT_DTYPES, expect_tensor, lowered

T = TypeVar("T")


class FillInputs(NamedTuple):
    """A buffer ``[n, k]`` to write to, and ``values`` ``[m, k]`` for its rows from ``start`` on."""

    buffer: Written
    values: Tensor
    start: int = 0

    @property
    def device(self) -> torch.device:
        return self.buffer.device


class FillResult(NamedTuple):
    filled: Tensor


def _validate_fill(inputs: FillInputs) -> None:
    rows, columns = inputs.buffer.shape
    expect_tensor("values", inputs.values, shape=("m", columns), dtypes=(inputs.buffer.dtype,))
    if not 0 <= inputs.start <= rows - inputs.values.shape[0]:
        raise ValueError(f"start: expected values to fit in {rows} rows, got {inputs.start}")


def _fill(inputs: FillInputs) -> FillResult:
    stop = inputs.start + inputs.values.shape[0]
    inputs.buffer[inputs.start : stop] = inputs.values
    return FillResult(inputs.values.new_tensor(stop, dtype=torch.int64))


FILL = Operator(
    "toy_fill",
    inputs=FillInputs,
    result=FillResult,
    backends=(ForwardOnly[FillInputs, FillResult]("reference", _fill),),
    validate=_validate_fill,
    fake=lambda inputs: FillResult(inputs.values.new_empty((), dtype=torch.int64)),
)


class ScaleInputs(NamedTuple):
    """``y = factor * x`` and its sum."""

    x: Tensor
    parts: list[Tensor]
    factor: float = 2.0

    @property
    def device(self) -> torch.device:
        return self.x.device


class ScaleResult(NamedTuple):
    y: Tensor
    total: Tensor


class ScaleGrads(NamedTuple):
    y: Tensor
    total: Tensor | None


class ScaleSaved(NamedTuple):
    y: Tensor


class ScaleGradients(NamedTuple, Generic[T]):
    x: T
    parts: list[T]


def _scale(inputs: ScaleInputs) -> ScaleResult:
    y = inputs.factor * sum(inputs.parts, inputs.x)
    return ScaleResult(y, y.sum())


def _scale_backward(
    inputs: ScaleInputs, saved: ScaleSaved, grads: ScaleGrads, wanted: ScaleGradients[bool]
) -> ScaleGradients[Tensor | None]:
    total = grads.y if grads.total is None else grads.y + grads.total
    found = inputs.factor * total
    return ScaleGradients(
        x=found if wanted.x else None,
        parts=[found.clone() if want else None for want in wanted.parts],
    )


def _keep(inputs: ScaleInputs, result: ScaleResult) -> ScaleSaved:
    return ScaleSaved(result.y)


def _validate_scale(inputs: ScaleInputs) -> None:
    for i, part in enumerate(inputs.parts):
        expect_tensor(f"parts[{i}]", part, shape=inputs.x.shape, dtypes=(inputs.x.dtype,))


def _validate_backward(
    inputs: ScaleInputs, saved: ScaleSaved, grads: ScaleGrads, wanted: ScaleGradients[bool]
) -> None:
    expect_tensor("grad_y", grads.y, shape=inputs.x.shape)


def _autocast(inputs: ScaleInputs, dtype: torch.dtype) -> ScaleInputs:
    parts = [lowered(each, dtype) for each in inputs.parts]
    return inputs._replace(x=lowered(inputs.x, dtype), parts=parts)


def _unfit(inputs: ScaleInputs) -> str | None:
    return None if inputs.x.dtype in FLOAT_DTYPES else "takes 32 and 16 bits"


SCALE = Operator(
    "toy_scale",
    inputs=ScaleInputs,
    result=ScaleResult,
    backends=(
        # Its backward is missing on purpose: the reference's serves.
        Backend("picky", _scale, devices=("cpu",), declines=_unfit),
        Backend("reference", _scale, _scale_backward),
    ),
    validate=_validate_scale,
    fake=lambda inputs: ScaleResult(torch.empty_like(inputs.x), inputs.x.new_empty(())),
    autocast=_autocast,
    derivative=Derivative(
        saved=ScaleSaved,
        output_grads=ScaleGrads,
        gradients=ScaleGradients,
        keep=_keep,
        validate=_validate_backward,
    ),
    former={"fast": "picky"},
)


class CubeInputs(NamedTuple):
    """``y = x ** 3``."""

    x: Tensor

    @property
    def device(self) -> torch.device:
        return self.x.device


class CubeResult(NamedTuple):
    y: Tensor
    square: Tensor


class CubeSaved(NamedTuple):
    square: Tensor


class CubeGrads(NamedTuple):
    y: Tensor | None


class CubeGradients(NamedTuple, Generic[T]):
    x: T


def _cube(inputs: CubeInputs) -> CubeResult:
    square = inputs.x * inputs.x
    return CubeResult(square * inputs.x, square)


def _cube_backward(
    inputs: CubeInputs, saved: CubeSaved, grads: CubeGrads, wanted: CubeGradients[bool]
) -> CubeGradients[Tensor | None]:
    return CubeGradients(None if grads.y is None else 3 * saved.square * grads.y)


CUBE = Operator(
    "toy_cube",
    inputs=CubeInputs,
    result=CubeResult,
    backends=(Backend("reference", _cube, _cube_backward),),
    validate=lambda inputs: None,
    fake=lambda inputs: CubeResult(torch.empty_like(inputs.x), torch.empty_like(inputs.x)),
    derivative=Derivative(
        saved=CubeSaved,
        output_grads=CubeGrads,
        gradients=CubeGradients,
        keep=lambda inputs, result: CubeSaved(result.square),
        validate=lambda inputs, saved, grads, wanted: None,
        # Nothing that asks for a gradient is left, and the guard must hold all the same.
        replaced={"x": "square"},
    ),
)


def samples(name: str) -> list[tuple[str, NamedTuple]]:
    """Inputs of a toy operator, by the name of the case."""
    if name == "toy_fill":
        return [("rows", FillInputs(torch.zeros(4, 3), torch.randn(2, 3), 1))]
    x, one, two = torch.randn(3, 2, 4).unbind()
    if name == "toy_cube":
        return [("three", CubeInputs(x))]
    return [("parts", ScaleInputs(x, [one, two])), ("alone", ScaleInputs(x, [], 0.5))]
