"""Which backend serves an operator: one ordered table each, and every backend says why it declines.

The table is tried in order and the first backend that takes the device, runs on this machine and
accepts the inputs serves the call. ``backend="..."`` on a call, or the environment variable
``COLLAVO_BACKEND`` (a name for all operators, or ``operator=name`` pairs separated by commas), asks
for one by name; a named backend that cannot serve is an error, never a silent fallback.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeAlias, TypeVar, cast

import torch
from torch import Tensor

from collavo_kernels._requirements import shortfall

ENVIRONMENT_VARIABLE = "COLLAVO_BACKEND"
# The oldest whose compiler and interpreter the kernels are tested with; 3.3 refuses some of them.
_TRITON = "3.6"

Inputs = TypeVar("Inputs")
Result = TypeVar("Result")
Saved = TypeVar("Saved")
OutputGrads = TypeVar("OutputGrads")
Wanted = TypeVar("Wanted")
Gradients = TypeVar("Gradients")
_Inputs = TypeVar("_Inputs", contravariant=True)
_Result = TypeVar("_Result", covariant=True)
_Saved = TypeVar("_Saved", contravariant=True)
_OutputGrads = TypeVar("_OutputGrads", contravariant=True)
_Wanted = TypeVar("_Wanted", contravariant=True)
_Gradients = TypeVar("_Gradients", covariant=True)
Reason = str | None
_operators: set[str] = set()
_said_slow: set[str] = set()


def _never(*_: Any) -> Reason:
    return None


@functools.cache
def triton_reason() -> Reason:
    """Say why Triton kernels cannot run here, or None."""
    return shortfall("triton", _TRITON)


def device_of(x: Tensor) -> contextlib.AbstractContextManager[object]:
    """Make x's GPU the current one, which Triton launches on; nothing for other devices."""
    if not x.is_cuda:
        return contextlib.nullcontext()
    # What torch.cuda.device is made of, without reading the device's name again at every call.
    return cast(
        "contextlib.AbstractContextManager[object]", torch.cuda._DeviceGuard(x.get_device())
    )


class LazyModule:
    """A backend's module that is imported when it is asked for more than why it is unavailable.

    Type checkers are shown the module itself::

        if TYPE_CHECKING:
            from package import module
        else:
            module = LazyModule("package.module", reason)

    Args:
        name: The module.
        unavailable: Its ``unavailable``, which answers without it.
    """

    def __init__(self, name: str, unavailable: Callable[[], Reason]) -> None:
        self._name = name
        self.unavailable = unavailable

    def __getattr__(self, function: str) -> Callable[..., Any]:
        if function not in ("forward", "backward", "declines", "yields"):
            raise AttributeError(f"a backend has no {function!r}")

        def call(*arguments: Any) -> Any:
            return getattr(importlib.import_module(self._name), function)(*arguments)

        return call


class BackendModule(Protocol[_Inputs, _Result, _Saved, _OutputGrads, _Wanted, _Gradients]):
    """What a module has that is a backend with a derivative; ``Backend`` says what each is."""

    def forward(self, inputs: _Inputs, /) -> _Result: ...

    def backward(
        self, inputs: _Inputs, saved: _Saved, grads: _OutputGrads, wanted: _Wanted, /
    ) -> _Gradients: ...

    def unavailable(self) -> Reason: ...

    def declines(self, inputs: _Inputs, /) -> Reason: ...


@dataclass(frozen=True)
class Backend(Generic[Inputs, Result, Saved, OutputGrads, Wanted, Gradients]):
    """One implementation of one operator.

    Attributes:
        name: What ``backend="..."`` calls it.
        forward: ``forward(inputs) -> result``.
        backward: ``backward(inputs, saved, grads, wanted) -> gradients``, None for what is not
            wanted. Without one the reference's serves.
        devices: Device types it runs on; empty means any.
        unavailable: Says why it cannot run on this machine at all, or None.
        declines: Says why it cannot take these inputs, or None.
        opt_in: Serves only when asked for by name: code that has not yet run on its hardware, or
            has a cost that not every program should pay.
        yields: Says why a later backend serves these inputs better, or None. It is not asked where
            this one was asked for by name, and serves where no later one but the reference does.
    """

    name: str
    forward: Callable[[Inputs], Result]
    backward: Callable[[Inputs, Saved, OutputGrads, Wanted], Gradients] | None = None
    devices: tuple[str, ...] = ()
    unavailable: Callable[[], Reason] = _never
    declines: Callable[[Inputs], Reason] = _never
    opt_in: bool = False
    yields: Callable[[Inputs], Reason] = _never

    @staticmethod
    def of(
        name: str,
        module: BackendModule[Inputs, Result, Saved, OutputGrads, Wanted, Gradients],
        *,
        devices: tuple[str, ...],
        opt_in: bool = False,
        yields: Callable[[Inputs], Reason] = _never,
    ) -> Backend[Inputs, Result, Saved, OutputGrads, Wanted, Gradients]:
        """Make a backend of a module that has its four functions under their names."""
        return Backend(
            name,
            module.forward,
            module.backward,
            devices,
            module.unavailable,
            module.declines,
            opt_in,
            yields,
        )

    def reason_against(self, device_type: str) -> Reason:
        """Why this backend does not serve a device type on this machine, or None if it does."""
        if self.devices and device_type not in self.devices:
            return f"runs on {' and '.join(self.devices)}, not on {device_type}"
        return self.unavailable()


ForwardOnly: TypeAlias = Backend[Inputs, Result, None, None, None, None]
"""A backend of an operator that has no derivative."""


class Table(Generic[Inputs, Result, Saved, OutputGrads, Wanted, Gradients]):
    """An operator's backends in order of preference; the last is the reference.

    Args:
        name: The operator's name.
        backends: Its backends.
        former: What backends were once called, with their present names: for the error message.
    """

    def __init__(
        self,
        name: str,
        backends: Sequence[Backend[Inputs, Result, Saved, OutputGrads, Wanted, Gradients]],
        former: Mapping[str, str] | None = None,
    ) -> None:
        if not backends or backends[-1].name != "reference":
            raise ValueError(f"backends of {name}: the last one must be the reference")
        _operators.add(name)
        self.name = name
        self.backends = tuple(backends)
        self._former = former or {}
        self._by_name = {backend.name: backend for backend in backends}

    @property
    def reference(self) -> Backend[Inputs, Result, Saved, OutputGrads, Wanted, Gradients]:
        """The backend that is the specification and takes everything."""
        return self.backends[-1]

    def select(
        self, inputs: Inputs, device_type: str, requested: str = ""
    ) -> Backend[Inputs, Result, Saved, OutputGrads, Wanted, Gradients]:
        """Return the backend that serves these inputs' forward on this device type.

        Raises:
            ValueError: if ``requested`` (or ``COLLAVO_BACKEND``) is unknown, or cannot serve.
        """
        requested = self.requested(requested)
        if requested:
            return self._named(inputs, device_type, requested)
        missing: Reason = None
        yielding = None
        for backend in self.backends[:-1]:
            if backend.opt_in:
                continue
            reason = backend.reason_against(device_type)
            if reason is not None:
                if device_type in backend.devices and _might_take(backend, inputs):
                    missing = reason
            elif backend.declines(inputs) is None:
                if backend.yields(inputs) is None:
                    return backend
                yielding = yielding or backend
        if yielding is not None:
            return yielding
        if missing and self.reference.declines(inputs) is None:
            _say_slow_once(self.name, device_type, missing)
        return self.reference

    def requested(self, name: str = "") -> str:
        """Return the backend asked for: by name, else by the environment variable, else ``""``."""
        return name or environment_choice(self.name)

    def explain(
        self, device_type: str
    ) -> list[tuple[Backend[Inputs, Result, Saved, OutputGrads, Wanted, Gradients], Reason]]:
        """List every backend with why it does not serve this device type here (None: it can)."""
        rows = []
        for backend in self.backends:
            reason = backend.reason_against(device_type)
            if reason is None and backend.opt_in:
                reason = f"serves only when asked for by name (backend={backend.name!r})"
            rows.append((backend, reason))
        return rows

    def _named(
        self, inputs: Inputs, device_type: str, requested: str
    ) -> Backend[Inputs, Result, Saved, OutputGrads, Wanted, Gradients]:
        backend = self._by_name.get(requested)
        if backend is None:
            now = self._former.get(requested)
            hint = f"what was {requested!r} is {now!r} now; " if now else ""
            raise ValueError(
                f"backend: expected one of {', '.join(self._by_name)} for {self.name}, "
                f"got {requested!r}; {hint}run 'collavo info' to see which backends serve here"
            )
        reason = backend.reason_against(device_type) or backend.declines(inputs)
        if reason is not None:
            raise ValueError(
                f"backend: {requested!r} cannot serve this call of {self.name}: {reason}"
            )
        return backend


def _say_slow_once(operator: str, device_type: str, reason: str) -> None:
    """Warn that calls are slow, once for a device type: pip hides what a build prints."""
    if device_type in _said_slow:
        return
    _said_slow.add(device_type)
    warnings.warn(
        f"{operator} runs on its reference backend, slower with the same results, since on "
        f"{device_type} {reason}; 'collavo info' shows every operator's backend",
        RuntimeWarning,
        stacklevel=2,
    )


def _might_take(backend: Any, inputs: Any) -> bool:
    """Tell whether a backend that is not here would take inputs; where it cannot say, yes."""
    try:
        return backend.declines(inputs) is None
    except ImportError:
        return True


def environment_choice(operator: str) -> str:
    """Return what ``COLLAVO_BACKEND`` asks for, for one operator; ``""`` if nothing.

    Raises:
        ValueError: if the variable is neither a name nor ``operator=name`` pairs of operators that
            there are.
    """
    value = os.environ.get(ENVIRONMENT_VARIABLE, "").strip()
    if "=" not in value:
        return value
    choice = ""
    for pair in value.split(","):
        name, separator, backend = (part.strip() for part in pair.partition("="))
        if not separator or not backend or name not in _operators:
            raise ValueError(
                f"{ENVIRONMENT_VARIABLE}: expected a backend, or operator=backend pairs with "
                f"commas for operators among {', '.join(sorted(_operators))}, got {pair.strip()!r}"
            )
        if name == operator:
            choice = backend
    return choice
