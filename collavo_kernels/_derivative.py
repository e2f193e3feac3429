"""The derivative of an operator: an operator of its own, and the functions that lead to it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Generic, NamedTuple, cast

import torch
from torch import Tensor

from collavo_kernels import _library, _schema
from collavo_kernels._autograd import Second, refuse_tangents, runs_directly, wants_gradient
from collavo_kernels._backends import (
    Gradients,
    Inputs,
    OutputGrads,
    Reason,
    Result,
    Saved,
    Table,
    Wanted,
)


class Nothing(NamedTuple):
    """What an operator saves whose backward needs the inputs alone."""


def _none(_: Any) -> tuple[str, ...]:
    return ()


def _differentiable(_: Any) -> Reason:
    return None


@dataclass(frozen=True)
class Derivative(Generic[Inputs, Result, Saved, OutputGrads, Wanted, Gradients]):
    """What the backward of an operator takes and returns.

    Attributes:
        saved: Bundle of what the forward leaves beside the inputs.
        grads: Bundle of the results' gradients; its fields are the results that have one. A field
            that may be None is None where nobody used the result. One that may not is zeros then,
            of the shape of what was saved under its name.
        gradients: Bundle of the inputs' gradients; its fields are the inputs that can get one.
        keep: From inputs and results to what the backward gets. Where it does not need an input,
            something of the same shape that is kept anyway stands in its place.
        validate: Checks the backward's arguments, of which the inputs are checked already.
        empty: Names the results that are empty for these inputs.
        refuses: Says why these inputs have no derivative, or None.
    """

    saved: type[Saved]
    grads: type[OutputGrads]
    gradients: type[Any]
    keep: Callable[[Inputs, Result], tuple[Inputs, Saved]]
    validate: Callable[[Inputs, Saved, OutputGrads, Wanted], None]
    empty: Callable[[Inputs], Sequence[str]] = _none
    refuses: Callable[[Inputs], Reason] = _differentiable

    def leaves(self, inputs: Inputs) -> list[Tensor | None]:
        """Return the inputs that can get a gradient, lists taken apart."""
        return flat(getattr(inputs, name) for name in self.gradients._fields)

    def grouped(self, inputs: Inputs, values: Sequence[Any]) -> Any:
        """Return one value for each leaf as a bundle: lists where the inputs have lists.

        Raises:
            ValueError: if there are more or fewer values than leaves.
        """
        names, left = self.gradients._fields, iter(values)
        count = len(self.leaves(inputs))
        if len(values) != count:
            raise ValueError(
                f"wanted: expected {count} entries, one per input that can get a gradient "
                f"({', '.join(names)}; of lists one per entry), got {len(values)}"
            )
        groups: list[Any] = []
        for name in names:
            field = getattr(inputs, name)
            many = isinstance(field, list)
            groups.append([next(left) for _ in field] if many else next(left))
        return self.gradients(*groups)

    def without_gradient(self, inputs: Inputs, result: Result) -> list[Tensor]:
        """Return the results that never get a gradient."""
        named = cast(Any, result)._asdict()
        alive = set(cast(Any, self.grads)._fields).difference(self.empty(inputs))
        return [each for name, each in named.items() if name not in alive]


class Backward(Generic[Inputs, Result, Saved, OutputGrads, Wanted, Gradients]):
    """The operator ``collavo::<name>_backward``.

    Its arguments are the fields of inputs, saved and grads end to end, and ``bool[] wanted``, one
    flag per leaf; it returns the wanted gradients in the leaves' order.

    Args:
        table: The operator's backends.
        inputs: Bundle of the operator's inputs.
        result: Bundle of its results.
        validate: Checks the inputs.
        derivative: What it is made of.
    """

    def __init__(
        self,
        table: Table[Inputs, Result, Saved, OutputGrads, Wanted, Gradients],
        inputs: Any,
        result: Any,
        validate: Callable[[Inputs], None],
        derivative: Derivative[Inputs, Result, Saved, OutputGrads, Wanted, Gradients],
    ) -> None:
        self.name, self.derivative = table.name, derivative
        self._table, self._validate = table, validate
        self._inputs, self._saved, self._grads = inputs, derivative.saved, derivative.grads
        self._results = result._fields
        saved, grads = cast(Any, self._saved), cast(Any, self._grads)
        self.kept_places = _schema.Places.of(inputs, saved)
        self._places = _schema.Places.of(inputs, saved, grads)
        optional = {key: _schema.is_optional(hint) for key, hint in _schema.hints(grads).items()}
        self._needed = [name for name, maybe in optional.items() if not maybe]
        own = _schema.arguments(inputs, defaults=False)
        own += _schema.arguments(saved, prefix="saved_")
        own += _schema.arguments(grads, prefix="grad_")
        signature = f'({", ".join(own)}, bool[] wanted, *, str backend="") -> Tensor[]'
        name = f"{table.name}_backward"
        self.op = _library.define(name, signature, self._kernel, self._fake)
        _library.LIBRARY.impl(name, self._autograd, "Autograd")

    def kept(self, arguments: Sequence[Any]) -> tuple[Inputs, Saved]:
        """Return the bundles of what ``Derivative.keep`` returned, from their fields end to end."""
        count = len(self._inputs._fields)
        saved: Any = self._saved
        return self._inputs(*arguments[:count]), saved(*arguments[count:])

    def upstream(self, grads: Sequence[Tensor | None], saved: Saved) -> OutputGrads:
        """Return the bundle of the results' gradients from those that autograd brings."""
        named = dict(zip(self._results, grads, strict=True))
        for name in self._needed:
            if named[name] is None:
                named[name] = torch.zeros_like(getattr(saved, name))
        bundle: Any = self._grads
        return cast(OutputGrads, bundle(*[named[name] for name in bundle._fields]))

    def call(
        self, inputs: Any, saved: Any, grads: Any, flags: list[bool], backend: str
    ) -> list[Tensor]:
        """Run the backward, through the dispatcher where something listens there."""
        arguments = (*inputs, *saved, *grads)
        if not torch.is_grad_enabled() and runs_directly(self._places.tensors(arguments)):
            wanted = self.derivative.grouped(inputs, flags)
            return self._run(inputs, saved, grads, wanted, flags, backend)
        return cast("list[Tensor]", self.op(*arguments, flags, backend=backend))

    def _run(
        self,
        inputs: Inputs,
        saved: Saved,
        grads: OutputGrads,
        wanted: Wanted,
        flags: Sequence[bool],
        backend: str,
    ) -> list[Tensor]:
        """Let the backend that serves compute the gradients; the arguments are checked already."""
        chosen = self._table.select(inputs, cast(Any, inputs).device.type, backend)
        backward = chosen.backward or self._table.reference.backward
        if backward is None:
            raise RuntimeError(f"{self.name}: the reference has no backward")
        # A backward inside an autocast region has the same bits as one outside.
        with torch._C._ExcludeDispatchKeyGuard(_library.ANY_AUTOCAST):
            gradients = flat(cast(Any, backward(inputs, saved, grads, wanted)))
        found = [each for each, flag in zip(gradients, flags, strict=True) if flag]
        if any(each is None for each in found):
            raise RuntimeError(f"{self.name}: {chosen.name} left out a gradient that is wanted")
        return found

    def _kernel(self, *arguments: Any, backend: str = "") -> list[Tensor]:
        *values, flags = arguments
        grads_bundle: Any = self._grads
        count = len(values) - len(grads_bundle._fields)
        inputs, saved = self.kept(values[:count])
        grads = grads_bundle(*values[count:])
        self._validate(inputs)
        wanted = self.derivative.grouped(inputs, flags)
        self.derivative.validate(inputs, saved, grads, wanted)
        return self._run(inputs, saved, grads, wanted, flags, backend)

    def _fake(self, *arguments: Any, backend: str = "") -> list[Tensor]:
        *values, flags = arguments
        inputs = self._inputs(*values[: len(self._inputs._fields)])
        leaves = zip(self.derivative.leaves(inputs), flags, strict=True)
        return [
            torch.empty_like(leaf, memory_format=torch.contiguous_format)
            for leaf, flag in leaves
            if flag and leaf is not None
        ]

    def _autograd(self, *arguments: Any, backend: str = "") -> Any:
        tensors = self._places.tensors(arguments)
        refuse_tangents(self.name, tensors)
        if wants_gradient(tensors):
            return list(cast(Any, Second).apply(self, arguments, backend, *tensors))
        with torch._C._AutoDispatchBelowAutograd():
            return self.op(*arguments, backend=backend)


def flat(values: Any) -> list[Any]:
    """Return values with the lists among them taken apart."""
    found: list[Any] = []
    for value in values:
        if isinstance(value, list):
            found += value
        else:
            found.append(value)
    return found
