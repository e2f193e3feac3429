"""A stand-in for an NVIDIA GPU: Triton compiles for it and launches nothing.

The launch code of the operators then runs on CPU tensors as it would on the GPU: it chooses that
GPU's tiles, and every kernel that it launches is compiled for the GPU and kept in Triton's cache.
What the operators return holds no results. It serves to look at launches and machine code, and to
fill a cache for a machine that has the GPU (``scripts/gpu_prebuild.py``).
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch

from collavo_kernels import _gpu

# Triton keeps loaded kernels by the number of their device. No real one has these, and no two
# stand-ins share one: nothing that was "loaded" here is ever launched for real.
_numbers = itertools.count(1 << 20)


class Launch(NamedTuple):
    """A launch that would have been.

    Attributes:
        kernel: The kernel's name.
        grid: Programs along each of the three axes; the first one's neighbours start together.
    """

    kernel: str
    grid: tuple[int, int, int]


class Compilation(NamedTuple):
    """A kernel that was compiled, or found in Triton's cache.

    Attributes:
        kernel: The kernel's name.
        cached: Whether it was found.
        seconds: What compiling took.
        files: Where the cache keeps its parts, by their names' ends: ``ptx``, ``cubin``, ...
    """

    kernel: str
    cached: bool
    seconds: float
    files: Mapping[str, Path]


@dataclass
class StandIn:
    """What happened on a stand-in.

    Attributes:
        launches: All launches, in order.
        compilations: All kernels that were compiled or found compiled, in order.
    """

    launches: list[Launch] = field(default_factory=list)
    compilations: list[Compilation] = field(default_factory=list)


@contextmanager
def gpu_stand_in(
    architecture: int = 90, kind: str = "hopper", processors: int = 132
) -> Iterator[StandIn]:
    """Let CPU tensors pass for tensors on an NVIDIA GPU that is not there.

    Inside, the operators' Triton backend takes CPU tensors when it is asked for by name, or by
    ``COLLAVO_BACKEND=triton``. At the end everything is as it was. For one thread.

    Args:
        architecture: The compute capability as Triton counts it, 90 for 9.0.
        kind: What ``collavo_kernels._gpu.kind_of`` calls such a GPU; decides its tiles.
        processors: Its multiprocessors.

    Returns:
        What is launched and compiled inside, filled as it happens.

    Raises:
        RuntimeError: if ``TRITON_INTERPRET`` is set, since then there is nothing to compile.

    Example:
        >>> import torch
        >>> from collavo_kernels import panoptic_lookup
        >>> maps = torch.ones(1, 4, 4, dtype=torch.int32)
        >>> ids = classes = [torch.ones(1, dtype=torch.int32)]
        >>> with gpu_stand_in() as gpu:  # doctest: +SKIP
        ...     _ = panoptic_lookup(maps, ids, classes, grid=(2, 2), backend="triton")
        >>> gpu.launches[0].grid  # doctest: +SKIP
        (4, 1, 1)
    """
    from triton import knobs

    if knobs.runtime.interpret:
        raise RuntimeError("gpu_stand_in: TRITON_INTERPRET is set; run it in a process without it")
    seen = StandIn()
    with ExitStack() as undo:
        undo.enter_context(_driver(_Driver(architecture, processors, seen.launches)))
        undo.enter_context(_listener(seen.compilations))
        undo.enter_context(_instead(_gpu.kind_of, lambda device: kind))
        undo.enter_context(_instead(_gpu.processors, lambda device: processors))
        undo.enter_context(_triton_for_every_device())
        yield seen


class _Utilities:
    """What Triton asks of a GPU when it loads a kernel."""

    def __init__(self, architecture: int, processors: int) -> None:
        from collavo_kernels.testing.aot import SHARED_LIMITS

        self._properties = {
            "max_shared_mem": SHARED_LIMITS.get(f"cuda:{architecture}", 101376),
            "multiprocessor_count": processors,
            "warpSize": 32,
            "max_num_regs": 65536,
        }

    def get_device_properties(self, device: int) -> dict[str, int]:
        return self._properties

    def load_binary(
        self, name: str, kernel: bytes, shared: int, device: int
    ) -> tuple[object, object, int, int, int]:
        """Return a module, a function, registers, spills and the most threads of a block."""
        return object(), object(), 0, 0, 1024


class _Driver:
    """The part of Triton's driver that compiling and launching ask for."""

    def __init__(self, architecture: int, processors: int, launches: list[Launch]) -> None:
        from triton.backends.compiler import GPUTarget

        self.utils = _Utilities(architecture, processors)
        self._target = GPUTarget("cuda", architecture, 32)
        self._number = next(_numbers)
        self._launches = launches

    def launcher_cls(self, source: Any, metadata: Any) -> Callable[..., None]:
        """Return what notes launches of a kernel: Triton calls it as it would start the kernel."""

        def launch(x: int, y: int, z: int, *rest: Any) -> None:
            self._launches.append(Launch(metadata.name, (x, y, z)))

        return launch

    def get_current_device(self) -> int:
        return self._number

    def set_current_device(self, device: int) -> None:
        pass

    def get_current_stream(self, device: int | None = None) -> int:
        return 0

    def get_current_target(self) -> Any:
        return self._target

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")


@contextmanager
def _driver(driver: _Driver) -> Iterator[None]:
    from triton.runtime import driver as config

    # Not through "active", which would look for a GPU.
    before = config._active
    config.set_active(driver)
    try:
        yield
    finally:
        config._active = before


@contextmanager
def _listener(compilations: list[Compilation]) -> Iterator[None]:
    from triton import knobs

    def note(*, src: Any, metadata: Any, metadata_group: Any, times: Any, cache_hit: bool) -> None:
        files = {name.rpartition(".")[2]: Path(path) for name, path in metadata_group.items()}
        compilations.append(Compilation(metadata["name"], cache_hit, times.total / 1e6, files))

    before = knobs.compilation.listener
    knobs.compilation.listener = note
    try:
        yield
    finally:
        knobs.compilation.listener = before


@contextmanager
def _instead(function: Callable[..., object], other: Callable[..., object]) -> Iterator[None]:
    """Put another function in a function's place wherever this package's modules name it."""

    def exchange(old: object, new: object) -> None:
        for name, module in list(sys.modules.items()):
            if name.partition(".")[0] == "collavo_kernels":
                for key in [k for k, value in vars(module).items() if value is old]:
                    setattr(module, key, new)

    exchange(function, other)
    try:
        yield
    finally:
        # Modules that were first imported in between named the other one.
        exchange(other, function)


@contextmanager
def _triton_for_every_device() -> Iterator[None]:
    from collavo_kernels.info import operators

    before = {operator: operator.backends for operator in operators().values()}

    def put(tables: Mapping[Any, Any]) -> None:
        for operator, backends in tables.items():
            operator.backends = backends
            operator._by_name = {each.name: each for each in backends}

    put(
        {
            operator: tuple(replace(b, devices=()) if b.name == "triton" else b for b in backends)
            for operator, backends in before.items()
        }
    )
    try:
        yield
    finally:
        put(before)
