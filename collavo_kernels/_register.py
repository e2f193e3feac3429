"""What PyTorch is told about an operator, written once: schemas, fakes, autograd, autocast, guards.

An operator is a bundle of inputs, a bundle of results, a fake, a table of backends and, if it has
one, its derivative. ``Operator`` registers ``collavo::<name>`` and ``collavo::<name>_backward``:

- Both are operators of their own, so a compiled graph holds them as two nodes.
- Autograd is the implementation of the Autograd key: direct calls of ``torch.ops`` have gradients.
- A tangent (forward mode), a second derivative and ``vmap`` are refused, never dropped.
- Where nothing listens in between, the operator's code is called in place of the dispatcher, which
  costs as much as all checks.

The way of a call::

    public function -> Operator.__call__ -> dispatcher -> _autocast_on (casts the bundle)
      -> _autograd -> no gradient wanted: call_below_autograd
                   -> else FirstDerivative.forward: call_below_autograd, then saves
    call_below_autograd -> nothing listens: run
                        -> else the dispatcher again (modes, fakes) -> _kernel or _fake -> run
    run -> validate, select a backend, backend.forward
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias, cast

import torch
from torch import Tensor

from collavo_kernels import _library, _schema
from collavo_kernels._autograd import (
    FirstDerivative,
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
    Result,
    Saved,
    Table,
    Wanted,
)
from collavo_kernels._derivative import Backward, Derivative, flat


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
        integral: Whether all tensors are integers, which cannot ask for one: spares looking.
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
        integral: bool = False,
        choose: Callable[[Inputs, str], str] | None = None,
        former: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(name, backends, former)
        self.inputs, self.result = cast(Any, inputs), cast(Any, result)
        self.derivative, self.choose = derivative, choose
        self.validate, self.fake, self.autocast = validate, fake, autocast
        self._places = _schema.Places.of(self.inputs)
        kinds = _schema.hints(self.inputs)
        self._written = [key for key, hint in kinds.items() if _schema.is_written(hint)]
        self._single = len(self.result._fields) == 1
        own = ", ".join(_schema.arguments(self.inputs))
        signature = f'({own}, *, str backend="") -> {_schema.results(self.result)}'
        self.op = _library.define(name, signature, self._kernel, self._fake)
        for device, key in _library.AUTOCAST.items() if autocast else ():
            _library.LIBRARY.impl(name, self._autocast_on(device, key), key.name)
        self.backward = None
        if derivative is not None:
            if self._written:
                raise TypeError(
                    f"{name}: expected no derivative, since {self._written[0]} is written to"
                )
            self._function = FirstDerivative.named(name)
            self.backward = Backward(self, self.inputs, self.result, validate, derivative)
            self._leaf_fields = [
                self.inputs._fields.index(name) for name in derivative.gradients._fields
            ]
            tensors = (*self._places.single, *self._places.lists)
            self._fixed = [i for i in tensors if i not in self._leaf_fields]
        if not integral:
            _library.LIBRARY.impl(name, self._autograd, "Autograd")

    def __call__(self, inputs: Inputs, backend: str = "") -> Result:
        """Call the operator through PyTorch."""
        try:
            return self.bundled(self._dispatch(inputs, backend))
        except NotImplementedError:  # the dispatcher has no words for a tensor's kind
            self.validate(inputs)
            raise

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

    def bundled(self, outputs: Any) -> Result:
        """Return what the dispatcher returned as the bundle of results."""
        return cast(Result, self.result(outputs) if self._single else self.result(*outputs))

    def call_below_autograd(self, inputs: Any, tensors: Sequence[Tensor], backend: str) -> Any:
        """Run the operator, through the dispatcher where something listens there."""
        if runs_directly(tensors):
            return self._outputs(self.run(inputs, backend))
        with torch._C._AutoDispatchBelowAutograd():
            return self._dispatch(inputs, backend)

    def _dispatch(self, inputs: Any, backend: str) -> Any:
        # A keyword costs the dispatcher a microsecond.
        return self.op(*inputs, backend=backend) if backend else self.op(*inputs)

    def _outputs(self, result: Result) -> Any:
        return cast(Any, result)[0] if self._single else result

    # The kernels. The dispatcher leaves out trailing arguments that equal their defaults, which the
    # bundle has too.

    def _kernel(self, *arguments: Any, backend: str = "") -> Any:
        return self._outputs(self.run(self.inputs(*arguments), backend))

    def _fake(self, *arguments: Any, backend: str = "") -> Any:
        inputs = self.inputs(*arguments)
        self.validate(inputs)
        return self._outputs(self.fake(inputs))

    def _autograd(self, *arguments: Any, backend: str = "") -> Any:
        inputs = self.inputs(*arguments)
        tensors = self._places.tensors(inputs)
        refuse_tangents(self.name, tensors)
        if not wants_gradient(tensors):
            return self.call_below_autograd(inputs, tensors, backend)
        leaves = self._checked_leaves(inputs)
        return cast(Any, self._function).apply(self, inputs, tensors, backend, *leaves)

    def _autocast_on(self, device: str, key: torch._C.DispatchKey) -> Callable[..., Any]:
        keys = torch._C.DispatchKeySet(key)

        def kernel(*arguments: Any, backend: str = "") -> Any:
            lower = cast(Any, self.autocast)
            inputs = lower(self.inputs(*arguments), torch.get_autocast_dtype(device))
            with torch._C._ExcludeDispatchKeyGuard(keys):
                return self._dispatch(inputs, backend)

        return kernel

    def _checked_leaves(self, inputs: Any) -> list[Tensor | None]:
        """Return the leaves; refuse whatever asks for a gradient and will not get one."""
        derivative = self.derivative
        if derivative is None:
            raise RuntimeError(
                f"{self.name}: it has no derivative, but an argument asks for a gradient; detach "
                "it or call under torch.no_grad()"
            )
        refuse_functorch(self.name)
        reason = derivative.refuses(inputs)
        if reason is not None:
            raise ValueError(reason)
        for i in self._fixed:
            value = inputs[i]
            for tensor in value if isinstance(value, list) else (value,):
                if tensor is not None and tensor.requires_grad:
                    name = inputs._fields[i]
                    raise ValueError(f"{name}: gradients are not computed for it; detach it")
        return flat(inputs[i] for i in self._leaf_fields)


AnyBackend: TypeAlias = Backend[Any, Any, Any, Any, Any, Any]
AnyOperator: TypeAlias = Operator[Any, Any, Any, Any, Any, Any]
