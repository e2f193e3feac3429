"""Which backend serves an operator: one ordered table each, and every backend says why it declines.

A backend is a file in an operator's folder. The table is tried in order and the first backend that
takes the device, runs on this machine and accepts the inputs serves the call. ``backend="..."`` on
a call, or the environment variable ``COLLAVO_BACKEND`` (a name for all operators, or
``operator=name`` pairs separated by commas), asks for one by name; a named backend that cannot
serve is an error, never a silent fallback.
"""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

from collavo_kernels._requirements import shortfall

ENVIRONMENT_VARIABLE = "COLLAVO_BACKEND"
BACKEND_NAMES = ("reference", "cpu", "triton", "cuda")
# The oldest whose compiler and interpreter the kernels are tested with; 3.3 refuses some of them.
_TRITON = "3.6"

Inputs = TypeVar("Inputs")
Reason = str | None


def _never(*_: Any) -> Reason:
    return None


@functools.cache
def triton_reason() -> Reason:
    """Say why Triton kernels cannot run here, or None."""
    return shortfall("triton", _TRITON)


def device_of(x: Tensor) -> contextlib.AbstractContextManager[object]:
    """Make x's GPU the current one, which Triton launches on; nothing for other devices."""
    return torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext()


@dataclass(frozen=True)
class Backend(Generic[Inputs]):
    """One implementation of one operator.

    Attributes:
        name: One of ``BACKEND_NAMES``.
        forward: Takes the operator's inputs bundle and returns the operator's outputs.
        backward: The hand-written backward, or None: then the reference's backward serves.
        devices: Device types it runs on; empty means any.
        unavailable: Says why it cannot run on this machine at all, or None.
        declines: Says why it cannot take these inputs, or None.
        declines_backward: The same for the backward; the reference then serves the backward.
        opt_in: Serves only when asked for by name (code that has not yet run on its hardware).
    """

    name: str
    forward: Callable[..., Any]
    backward: Callable[..., Any] | None = None
    devices: tuple[str, ...] = ()
    unavailable: Callable[[], Reason] = _never
    declines: Callable[[Inputs], Reason] = _never
    declines_backward: Callable[[Inputs], Reason] = _never
    opt_in: bool = False

    def reason_against(self, device_type: str) -> Reason:
        """Why this backend does not serve a device type on this machine, or None if it does."""
        if self.devices and device_type not in self.devices:
            return f"runs on {' and '.join(self.devices)}, not on {device_type}"
        return self.unavailable()


class Operator(Generic[Inputs]):
    """An operator's name and its backends in order of preference; the last is the reference."""

    def __init__(self, name: str, backends: tuple[Backend[Inputs], ...]) -> None:
        if not backends or backends[-1].name != "reference":
            raise ValueError(f"backends of {name}: the last one must be the reference")
        self.name = name
        self.backends = backends
        self._by_name = {backend.name: backend for backend in backends}

    @property
    def reference(self) -> Backend[Inputs]:
        """The backend that is the specification and takes everything."""
        return self.backends[-1]

    def select(self, inputs: Inputs, device_type: str, requested: str = "") -> Backend[Inputs]:
        """Return the backend that serves these inputs' forward on this device type.

        Raises:
            ValueError: if ``requested`` (or ``COLLAVO_BACKEND``) is unknown, or cannot serve.
        """
        requested = self.requested(requested)
        if requested:
            return self._named(inputs, device_type, requested)
        for backend in self.backends:
            if backend.opt_in or backend.reason_against(device_type) is not None:
                continue
            if backend.declines(inputs) is None:
                return backend
        return self.reference

    def requested(self, name: str = "") -> str:
        """Return the backend asked for: by name, else by the environment variable, else ``""``."""
        return name or _environment_choice(self.name)

    def select_backward(
        self, inputs: Inputs, device_type: str, requested: str = ""
    ) -> Backend[Inputs]:
        """Return the backend whose backward serves; the reference if the forward's has none."""
        chosen = self.select(inputs, device_type, requested)
        if chosen.backward is None or chosen.declines_backward(inputs) is not None:
            return self.reference
        return chosen

    def explain(self, device_type: str) -> list[tuple[Backend[Inputs], Reason]]:
        """List every backend with why it does not serve this device type here (None: it can)."""
        rows: list[tuple[Backend[Inputs], Reason]] = []
        for backend in self.backends:
            reason = backend.reason_against(device_type)
            if reason is None and backend.opt_in:
                reason = f"serves only when asked for by name (backend={backend.name!r})"
            rows.append((backend, reason))
        return rows

    def _named(self, inputs: Inputs, device_type: str, requested: str) -> Backend[Inputs]:
        backend = self._by_name.get(requested)
        if backend is None:
            raise ValueError(
                f"backend: expected one of {', '.join(self._by_name)} for {self.name}, "
                f"got {requested!r}; run 'collavo info' to see which backends serve here"
            )
        reason = backend.reason_against(device_type) or backend.declines(inputs)
        if reason is not None:
            raise ValueError(
                f"backend: {requested!r} cannot serve this call of {self.name}: {reason}"
            )
        return backend


def _environment_choice(operator: str) -> str:
    value = os.environ.get(ENVIRONMENT_VARIABLE, "")
    if "=" not in value:
        return value
    for pair in value.split(","):
        name, _, backend = pair.partition("=")
        if name.strip() == operator:
            return backend.strip()
    return ""
