"""The derivative of an operator: an operator of its own, and the functions that lead to it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, NamedTuple, cast

import torch
from torch import Tensor

from collavo_kernels import _library, _schema
from collavo_kernels._autograd import (
    NoSecondDerivative,
    refuse_tangents,
    runs_directly,
    wants_gradient,
)
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

    The *leaves* of an operator are the inputs that can get a gradient, lists taken apart: of
    ``Gradients(x=..., parts=[..., ...])`` they are x and the two parts, in this order.

    Attributes:
        saved: Bundle of what the forward leaves beside the inputs, tensors all.
        output_grads: Bundle of the results' gradients; its fields are the results that have one. A
            field that may be None is None where nobody used the result. One that may not is zeros
            then, of the shape of what was saved under its name.
        gradients: Bundle of the inputs' gradients; its fields are the inputs that have leaves.
        keep: From inputs and results to what is saved.
        validate: Checks the backward's arguments, of which the inputs are checked already.
        replaced: Inputs that are not saved, and what of ``saved`` the backward gets in their place:
            it must have their shape, and the backward must not read it as the input.
        empty: Names the results that are empty for these inputs.
        refuses: Says why these inputs have no derivative, or None.
    """

    saved: type[Saved]
    output_grads: type[OutputGrads]
    gradients: type[Any]
    keep: Callable[[Inputs, Result], Saved]
    validate: Callable[[Inputs, Saved, OutputGrads, Wanted], None]
    replaced: Mapping[str, str] = field(default_factory=dict)
    empty: Callable[[Inputs], Sequence[str]] = _none
    refuses: Callable[[Inputs], Reason] = _differentiable

    def leaves(self, inputs: Inputs) -> list[Tensor | None]:
        """Return the leaves among the inputs; None for one that is not given."""
        return flat(getattr(inputs, name) for name in self.gradients._fields)

    def grouped(self, inputs: Inputs, values: Sequence[Any]) -> Any:
        """Return one value for each leaf as a bundle of ``gradients``.

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
            value = getattr(inputs, name)
            many = isinstance(value, list)
            groups.append([next(left) for _ in value] if many else next(left))
        return self.gradients(*groups)


class Backward(Generic[Inputs, Result, Saved, OutputGrads, Wanted, Gradients]):
    """The operator ``collavo::<name>_backward``.

    Its arguments are the fields of inputs, saved and output gradients end to end, and ``bool[]
    wanted``, one flag per leaf; it returns the wanted gradients in the leaves' order.

    Args:
        table: The operator's backends.
        inputs: Bundle of the operator's inputs.
        result: Bundle of its results.
        validate: Checks the inputs.
        derivative: What it is made of.

    Raises:
        TypeError: if the bundles do not fit together; the field is named.
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
        self._inputs, self._saved, self._grads = inputs, derivative.saved, derivative.output_grads
        self._results = result._fields
        saved, grads = cast(Any, self._saved), cast(Any, self._grads)
        optional = {key: _schema.is_optional(hint) for key, hint in _schema.hints(grads).items()}
        self._needed = [name for name, maybe in optional.items() if not maybe]
        self._dead = [name for name in self._results if name not in optional]
        self._check_bundles(saved._fields, tuple(optional))
        self.places = _schema.Places.of(inputs, without=tuple(derivative.replaced))
        self._all = _schema.Places.of(inputs, saved, grads)
        own = _schema.arguments(inputs, defaults=False)
        own += _schema.arguments(saved, prefix="saved_")
        own += _schema.arguments(grads, prefix="grad_")
        signature = f'({", ".join(own)}, bool[] wanted, *, str backend="") -> Tensor[]'
        name = f"{table.name}_backward"
        self.op = _library.define(name, signature, self._kernel, self._fake)
        _library.LIBRARY.impl(name, self._autograd, "Autograd")

    def _check_bundles(self, saved: Sequence[str], grads: Sequence[str]) -> None:
        derivative, name = self.derivative, self.name
        known = {
            "output_grads": (grads, self._results),
            "gradients": (derivative.gradients._fields, self._inputs._fields),
            "replaced": (derivative.replaced, self._inputs._fields),
            "what replaces inputs": (derivative.replaced.values(), saved),
        }
        if len(self._results) > 1:
            known["output_grads that may not be None"] = (self._needed, saved)
        for what, (names, among) in known.items():
            for each in names:
                if each not in among:
                    raise TypeError(f"{name}: {what}: {each!r} is none of {', '.join(among)}")

    def without_gradient(self, inputs: Inputs, result: Any) -> list[Tensor]:
        """Return the results that never get a gradient."""
        return [getattr(result, name) for name in (*self._dead, *self.derivative.empty(inputs))]

    def restored(
        self, tensors: Sequence[Any], rest: Sequence[tuple[int, Any]], lengths: Sequence[int]
    ) -> tuple[Inputs, Saved]:
        """Return the bundles of inputs and saved from what autograd kept."""
        saved_bundle: Any = self._saved
        count = len(tensors) - len(saved_bundle._fields)
        saved = saved_bundle(*tensors[count:])
        values = self.places.put(tensors[:count], rest, lengths, len(self._inputs._fields))
        for name, stand_in in self.derivative.replaced.items():
            values[self._inputs._fields.index(name)] = getattr(saved, stand_in)
        return self._inputs(*values), saved

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
        tensors = self._all.tensors(arguments)
        refuse_tangents(self.name, tensors)
        if torch.is_grad_enabled():
            return self._once((*arguments, flags), backend, tensors)
        if runs_directly(tensors):
            wanted = self.derivative.grouped(inputs, flags)
            return self._run(inputs, saved, grads, wanted, flags, backend)
        return cast("list[Tensor]", self.op(*arguments, flags, backend=backend))

    def _once(
        self, arguments: Sequence[Any], backend: str, tensors: Sequence[Tensor]
    ) -> list[Tensor]:
        # Whatever the arguments ask for, results must ask for a gradient to be refused one.
        anchor = torch.empty(0, requires_grad=True)
        apply = cast(Any, NoSecondDerivative).apply
        return list(apply(self, arguments, backend, anchor, *tensors))

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
        inputs, saved, grads, flags = self._split(arguments)
        self._validate(inputs)
        wanted = self.derivative.grouped(inputs, flags)
        self.derivative.validate(inputs, saved, grads, wanted)
        return self._run(inputs, saved, grads, wanted, flags, backend)

    def _fake(self, *arguments: Any, backend: str = "") -> list[Tensor]:
        inputs, _, _, flags = self._split(arguments)
        self.derivative.grouped(inputs, flags)
        return [
            torch.empty_like(leaf, memory_format=torch.contiguous_format)
            for leaf, flag in zip(self.derivative.leaves(inputs), flags, strict=True)
            if flag and leaf is not None
        ]

    def _split(self, arguments: Sequence[Any]) -> tuple[Inputs, Saved, OutputGrads, list[bool]]:
        saved, grads = cast(Any, self._saved), cast(Any, self._grads)
        values, flags = iter(arguments[:-1]), arguments[-1]
        bundles = [
            bundle(*[next(values) for _ in bundle._fields])
            for bundle in (self._inputs, saved, grads)
        ]
        return bundles[0], bundles[1], bundles[2], flags

    def _autograd(self, *arguments: Any, backend: str = "") -> Any:
        tensors = self._all.tensors(arguments)
        refuse_tangents(self.name, tensors)
        if wants_gradient(tensors):
            return self._once(arguments, backend, tensors)
        with torch._C._AutoDispatchBelowAutograd():
            return self.op(*arguments, backend=backend)


def flat(values: Any) -> list[Any]:
    """Return values with the lists among them taken apart."""
    found: list[Any] = []
    for value in values:
        if type(value) is list:
            found += value
        else:
            found.append(value)
    return found
