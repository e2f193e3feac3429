"""What PyTorch is told about an operator, written once: schemas, fakes, autograd, autocast, guards.

An operator is a bundle of inputs, a bundle of results, a fake, a table of backends and, if it has a
derivative, what that is made of. ``Operator`` registers ``collavo::<name>`` and, with a derivative,
``collavo::<name>_backward`` with ``torch.library``:

- Both are operators of their own, so a compiled graph holds them as two nodes.
- Autograd is the implementation of the Autograd key: direct calls of ``torch.ops`` have gradients.
- A tangent (forward mode), a second derivative and ``vmap`` are refused, never dropped.
- Where nothing listens in between, the operator's code is called in place of the dispatcher, which
  costs as much as all checks.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic, NamedTuple, TypeAlias, cast

import torch
from torch import Tensor

from collavo_kernels import _schema
from collavo_kernels._autograd import (
    First,
    Second,
    flat,
    refuse_functorch,
    refuse_tangents,
    runs_directly,
    wants_gradient,
)
from collavo_kernels._backends import (
    Backend,
    Gradients,
    Inputs,
    OutputGrads,
    Reason,
    Result,
    Saved,
    Table,
    Wanted,
)

_LIBRARY: Any = cast(Any, torch.library).Library("collavo", "FRAGMENT")
_AUTOCAST = {"cpu": torch._C.DispatchKey.AutocastCPU, "cuda": torch._C.DispatchKey.AutocastCUDA}
_ANY_AUTOCAST = torch._C.DispatchKeySet(_AUTOCAST["cpu"]) | torch._C.DispatchKeySet(
    _AUTOCAST["cuda"]
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
        """Return one value for each leaf as a bundle: lists where the inputs have lists."""
        names, left = self.gradients._fields, iter(values)
        count = len(self.leaves(inputs))
        if len(values) != count:
            raise ValueError(
                f"wanted: expected {count} entries, one per input that can get a gradient "
                f"({', '.join(names)}; of lists one per entry), got {len(values)}"
            )
        fields = (getattr(inputs, name) for name in names)
        return self.gradients(
            *(
                [next(left) for _ in each] if isinstance(each, list) else next(left)
                for each in fields
            )
        )

    def without_gradient(self, inputs: Inputs, result: Result) -> list[Tensor]:
        """Return the results that never get a gradient."""
        named = cast(Any, result)._asdict()
        alive = set(cast(Any, self.grads)._fields).difference(self.empty(inputs))
        return [each for name, each in named.items() if name not in alive]


class Operator(Table[Inputs, Result, Saved, OutputGrads, Wanted, Gradients]):
    """An operator of ``torch.ops.collavo`` and its table of backends.

    Args:
        name: Its name, a noun phrase.
        inputs: Bundle of its arguments (``_schema`` says what fields may be), with a property
            ``device``. ``str backend`` comes behind them by itself.
        result: Bundle of its results.
        backends: In order of preference, the reference last.
        validate: Checks shapes, dtypes, devices and options, so that native code can trust them.
        fake: Results without values, of checked inputs.
        autocast: The inputs in autocast's dtype; None: they stay as they are.
        derivative: None: inputs that ask for a gradient are refused.
        choose: From the inputs and the backend named in the call (or ``""``) to the one that they
            need; None: the one named.
        former: What backends were once called, with their present names.
    """

    def __init__(
        self,
        name: str,
        *,
        inputs: type[Inputs],
        result: type[Result],
        backends: Sequence[Backend[Inputs, Result, Saved, OutputGrads, Wanted, Gradients]],
        validate: Callable[[Inputs], None],
        fake: Callable[[Inputs], Result],
        autocast: Callable[[Inputs, torch.dtype], Inputs] | None = None,
        derivative: Derivative[Inputs, Result, Saved, OutputGrads, Wanted, Gradients] | None = None,
        choose: Callable[[Inputs, str], str] | None = None,
        former: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(name, backends, former)
        self.inputs = cast(Any, inputs)
        self.result = cast(Any, result)
        self.derivative, self.choose = derivative, choose
        self.validate, self.fake, self.autocast = validate, fake, autocast
        self._places = _schema.Places.of(self.inputs)
        kinds = _schema.hints(self.inputs)
        self._written = [key for key, hint in kinds.items() if _schema.is_written(hint)]
        self._single = len(self.result._fields) == 1
        self.op = self._register(name, self._signature(), self._forward, self._forward_fake)
        for device, key in _AUTOCAST.items() if autocast else ():
            _LIBRARY.impl(name, self._autocast_on(device, key), key.name)
        if derivative is not None:
            _LIBRARY.impl(name, self._autograd, "Autograd")
            saved, grads = cast(Any, derivative.saved), cast(Any, derivative.grads)
            self.kept_places = _schema.Places.of(self.inputs, saved)
            self._backward_places = _schema.Places.of(self.inputs, saved, grads)
            self._needed = [
                k for k, h in _schema.hints(grads).items() if not _schema.is_optional(h)
            ]
            name, signature = f"{name}_backward", self._signature_of_backward(derivative)
            self.op_backward = self._register(name, signature, self._backward, self._backward_fake)
            _LIBRARY.impl(name, self._autograd_backward, "Autograd")

    def __call__(self, inputs: Inputs, backend: str = "") -> Result:
        """Call the operator through PyTorch."""
        return self.bundled(self._dispatch(inputs, backend))

    def run(self, inputs: Inputs, backend: str = "") -> Result:
        """Check the inputs and let the backend that serves compute."""
        self.validate(inputs)
        if self.choose is not None:
            backend = self.choose(inputs, backend)
        chosen = self.select(inputs, cast(Any, inputs).device.type, backend)
        result = chosen.forward(inputs)
        for name in self._written:
            written = getattr(inputs, name)
            if not written.is_inference():
                torch.autograd.graph.increment_version(written)
        return result

    def run_backward(
        self, inputs: Inputs, saved: Saved, grads: OutputGrads, wanted: Wanted, backend: str = ""
    ) -> Gradients:
        """Let the backend that serves compute the gradients; the arguments are checked already."""
        chosen = self.select(inputs, cast(Any, inputs).device.type, backend)
        backward = chosen.backward or self.reference.backward
        if backward is None:
            raise RuntimeError(f"{self.name}: the reference has no backward")
        # A backward inside an autocast region has the same bits as one outside.
        with torch._C._ExcludeDispatchKeyGuard(_ANY_AUTOCAST):
            return backward(inputs, saved, grads, wanted)

    def bundled(self, outputs: Any) -> Result:
        """Return what the dispatcher returned as the bundle of results."""
        return cast(Result, self.result(outputs) if self._single else self.result(*outputs))

    def kept(self, arguments: list[Any]) -> tuple[Inputs, Saved]:
        """Return the bundles of what ``Derivative.keep`` returned, from their fields in a row."""
        count = len(self.inputs._fields)
        saved = cast(Any, self._need_derivative().saved)
        return self.inputs(*arguments[:count]), saved(*arguments[count:])

    def upstream(self, grads: Sequence[Tensor | None], saved: Saved) -> OutputGrads:
        """Return the bundle of the results' gradients from those that autograd brings."""
        named = dict(zip(self.result._fields, grads, strict=True))
        for name in self._needed:
            if named[name] is None:
                named[name] = torch.zeros_like(getattr(saved, name))
        bundle = cast(Any, self._need_derivative().grads)
        return cast(OutputGrads, bundle(*[named[name] for name in bundle._fields]))

    def call_below_autograd(self, inputs: Any, tensors: Sequence[Tensor], backend: str) -> Any:
        """Run the operator, through the dispatcher where something listens there."""
        if runs_directly(tensors):
            return self._outputs(self.run(inputs, backend))
        with torch._C._AutoDispatchBelowAutograd():
            return self._dispatch(inputs, backend)

    def call_backward(
        self, inputs: Any, saved: Any, grads: Any, flags: list[bool], backend: str
    ) -> list[Tensor]:
        """Run the backward, through the dispatcher where something listens there."""
        arguments = (*inputs, *saved, *grads)
        if not torch.is_grad_enabled() and runs_directly(self._backward_places.tensors(arguments)):
            wanted = self._need_derivative().grouped(inputs, flags)
            return self._only(self.run_backward(inputs, saved, grads, wanted, backend), flags)
        return cast("list[Tensor]", self.op_backward(*arguments, flags, backend=backend))

    def _dispatch(self, inputs: Any, backend: str) -> Any:
        # A keyword costs the dispatcher a microsecond.
        return self.op(*inputs, backend=backend) if backend else self.op(*inputs)

    def _need_derivative(
        self,
    ) -> Derivative[Inputs, Result, Saved, OutputGrads, Wanted, Gradients]:
        if self.derivative is None:
            raise RuntimeError(
                f"{self.name}: it has no derivative, but an argument asks for a gradient; detach "
                "it or call under torch.no_grad()"
            )
        return self.derivative

    def _register(self, name: str, signature: str, kernel: Any, fake: Any) -> Any:
        _LIBRARY.define(name + signature)
        _LIBRARY.impl(name, kernel, "CompositeExplicitAutograd")
        _LIBRARY.impl(name, self._refuse_vmap, "FuncTorchBatched")
        torch.library.register_fake(f"collavo::{name}", fake, lib=_LIBRARY)
        return getattr(torch.ops.collavo, name).default

    def _signature(self) -> str:
        own = ", ".join(_schema.arguments(self.inputs))
        return f'({own}, *, str backend="") -> {_schema.results(self.result)}'

    def _signature_of_backward(self, derivative: Any) -> str:
        own = _schema.arguments(self.inputs, defaults=False)
        own += _schema.arguments(derivative.saved, prefix="saved_")
        own += _schema.arguments(derivative.grads, prefix="grad_")
        return f'({", ".join(own)}, bool[] wanted, *, str backend="") -> Tensor[]'

    def _only(self, gradients: Gradients, flags: Sequence[bool]) -> list[Tensor]:
        """Return the gradients that are wanted, in the order of the leaves."""
        found = []
        for gradient, flag in zip(flat(cast(Any, gradients)), flags, strict=True):
            if flag and gradient is None:
                raise RuntimeError(f"{self.name}: a backend left out a gradient that is wanted")
            if flag:
                found.append(gradient)
        return found

    def _outputs(self, result: Result) -> Any:
        return cast(Any, result)[0] if self._single else result

    # The kernels. The dispatcher leaves out trailing arguments that equal their defaults, which the
    # bundle has too.

    def _forward(self, *arguments: Any, backend: str = "") -> Any:
        inputs = self.inputs(*arguments)
        if self.derivative is None:
            tensors = self._places.tensors(inputs)
            refuse_tangents(self.name, tensors)
            if wants_gradient(tensors):
                self._need_derivative()
        return self._outputs(self.run(inputs, backend))

    def _forward_fake(self, *arguments: Any, backend: str = "") -> Any:
        inputs = self.inputs(*arguments)
        self.validate(inputs)
        return self._outputs(self.fake(inputs))

    def _autograd(self, *arguments: Any, backend: str = "") -> Any:
        inputs = self.inputs(*arguments)
        tensors = self._places.tensors(inputs)
        refuse_tangents(self.name, tensors)
        if wants_gradient(tensors):
            refuse_functorch(self.name)
            derivative = self._need_derivative()
            reason = derivative.refuses(inputs)
            if reason is not None:
                raise ValueError(reason)
            leaves = derivative.leaves(inputs)
            return cast(Any, First).apply(self, inputs, tensors, backend, *leaves)
        return self.call_below_autograd(inputs, tensors, backend)

    def _autocast_on(self, device: str, key: torch._C.DispatchKey) -> Callable[..., Any]:
        keys = torch._C.DispatchKeySet(key)

        def kernel(*arguments: Any, backend: str = "") -> Any:
            lower = cast(Any, self.autocast)
            inputs = lower(self.inputs(*arguments), torch.get_autocast_dtype(device))
            with torch._C._ExcludeDispatchKeyGuard(keys):
                return self._dispatch(inputs, backend)

        return kernel

    def _backward(self, *arguments: Any, backend: str = "") -> list[Tensor]:
        *values, flags = arguments
        grads: Any = self._need_derivative().grads
        count = len(values) - len(grads._fields)
        inputs, saved = self.kept(values[:count])
        upstream = grads(*values[count:])
        derivative = self._need_derivative()
        self.validate(inputs)
        wanted = derivative.grouped(inputs, flags)
        derivative.validate(inputs, saved, upstream, wanted)
        return self._only(self.run_backward(inputs, saved, upstream, wanted, backend), flags)

    def _backward_fake(self, *arguments: Any, backend: str = "") -> list[Tensor]:
        *values, flags = arguments
        inputs = self.inputs(*values[: len(self.inputs._fields)])
        leaves = zip(self._need_derivative().leaves(inputs), flags, strict=True)
        return [
            torch.empty_like(leaf, memory_format=torch.contiguous_format)
            for leaf, flag in leaves
            if flag and leaf is not None
        ]

    def _autograd_backward(self, *arguments: Any, backend: str = "") -> Any:
        tensors = self._backward_places.tensors(arguments)
        refuse_tangents(self.name, tensors)
        if wants_gradient(tensors):
            return list(cast(Any, Second).apply(self, arguments, backend, *tensors))
        with torch._C._AutoDispatchBelowAutograd():
            return self.op_backward(*arguments, backend=backend)

    def _refuse_vmap(self, *_: Any, **__: Any) -> Any:
        raise NotImplementedError(
            f"{self.name}: torch.vmap is not supported; call the operator on the whole batch"
        )


AnyBackend: TypeAlias = Backend[Any, Any, Any, Any, Any, Any]
AnyOperator: TypeAlias = Operator[Any, Any, Any, Any, Any, Any]
