"""Everything that is measured here, in one table.

A benchmark is a pair of modules in ``ops/``. ``<op>_cases.py`` is *what*: sizes, inputs, the work
there is, exact results, and ``rows``, which lists every row of the benchmark's table with the
selections that it belongs to. ``<op>_providers.py`` is *who*: ``PROVIDERS``, a table from a name to
what makes the provider's call, and ``prepare``, which makes the call of a row. The file
``bench_<op>.py`` asks for the rows; nothing is measured that is not listed here.

The modules are imported when they are asked for: a process that measures one operator, of this
commit or another, needs nothing of the others.
"""

from __future__ import annotations

import importlib
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol, cast

import torch


class Unavailable(Exception):
    """A provider cannot be measured here, or not in this case; the message says why."""


@dataclass(frozen=True)
class Row:
    """One row of a table before it is measured: who does what.

    Attributes:
        op: The benchmark.
        mode: What is done with the case, such as ``fwd+bwd``.
        case: The sizes in words, such as ``4096x4096/m1/r64``.
        provider: Who does it; this package's begin with ``ours``.
        dtype: Where a case comes in several, which.
        quick: Whether it is measured without ``--full``.
        quick_gpu: Whether it is among the few that ``--quick-gpu`` selects.
    """

    op: str
    mode: str
    case: str
    provider: str
    dtype: str = ""
    quick: bool = True
    quick_gpu: bool = False

    @property
    def name(self) -> str:
        """What ``-k`` is matched against; unique within a benchmark."""
        return "-".join(filter(None, (self.mode, self.case, self.dtype, self.provider)))

    @property
    def task(self) -> tuple[str, ...]:
        """What the providers that are held against each other share."""
        return (self.op, self.mode, self.case, self.dtype)

    @property
    def is_ours(self) -> bool:
        """Whether this package does it."""
        return self.provider.startswith("ours")


@dataclass(frozen=True)
class Call:
    """What is timed for a row, and how much work that is.

    Attributes:
        run: Called without arguments; its result is dropped.
        dtype: The dtype that the roof is asked for.
        bytes: Least bytes that the operator has to move; 0 where that is not meant.
        flops: Least operations that it has to do; 0 where that is not meant.
        error: Returns the error relative to float64; None where it is not measured.
        config: What else the row should say.
        grad: Whether gradients are recorded while it runs.
        capture: Whether a CUDA graph may hold it; work on the host would not be in it.
        before: Runs before each call, outside of the time.
    """

    run: Callable[[], object]
    dtype: torch.dtype = torch.float32
    bytes: float = 0
    flops: float = 0
    error: Callable[[], float] | None = None
    config: Mapping[str, object] = field(default_factory=dict)
    grad: bool = True
    capture: bool = True
    before: Callable[[], None] | None = None


class Cases(Protocol):
    """What ``ops/<op>_cases.py`` has."""

    def rows(self, kind: str) -> Iterable[Row]:
        """Yield the rows on a kind of device, ``cpu`` or ``cuda``; those of a task together."""


class Providers(Protocol):
    """What ``ops/<op>_providers.py`` has."""

    PROVIDERS: Mapping[str, Callable[..., Any]]

    def prepare(self, row: Row, device: torch.device) -> Call:
        """Return the row's call; raises ``Unavailable``."""


@dataclass(frozen=True)
class Benchmark:
    """One benchmark.

    Attributes:
        op: Its name: of the modules, of the bench file, and of the kept results.
        in_turns: Whether the providers of a task are measured in several turns each, one after the
            other, so that all of them see the same quiet or busy times.
    """

    op: str
    in_turns: bool = False

    @property
    def providers(self) -> Providers:
        """The module that knows who is measured."""
        return cast(Providers, importlib.import_module(f"benchmarks.ops.{self.op}_providers"))

    def rows(self, kind: str) -> list[Row]:
        """List every row on a kind of device, ``cpu`` or ``cuda``."""
        cases = cast(Cases, importlib.import_module(f"benchmarks.ops.{self.op}_cases"))
        return list(cases.rows(kind))

    def turns(self, kind: str, many: int) -> Iterator[tuple[int, Row]]:
        """Yield the rows as they are measured, with the number of the turn."""
        for _, task in itertools.groupby(self.rows(kind), lambda row: row.task):
            yield from itertools.product(range(many if self.in_turns else 1), list(task))

    def find(self, kind: str, name: str) -> Row:
        """Return the row of a name; raises ``Unavailable``."""
        for row in self.rows(kind):
            if row.name == name:
                return row
        raise Unavailable(f"{self.op}: no row {name} on {kind}")

    def prepare(self, row: Row, device: torch.device) -> Call:
        """Return a row's call, from the same random inputs every time; raises ``Unavailable``."""
        torch.manual_seed(0)
        return self.providers.prepare(row, device)


BENCHMARKS = {
    benchmark.op: benchmark
    for benchmark in (
        Benchmark("panoptic_lookup"),
        Benchmark("panoptic_data"),
        Benchmark("llava_data", in_turns=True),
        Benchmark("crayon_prompt"),
        Benchmark("qlora_linear", in_turns=True),
        Benchmark("crayon_attention", in_turns=True),
        Benchmark("end_to_end"),
        Benchmark("llava_training", in_turns=True),
        Benchmark("llava_order", in_turns=True),
    )
}
