"""Times of one call: rounds sized to a budget, CUDA graphs and events on a GPU, percentiles."""

from __future__ import annotations

import gc
import math
import statistics
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

# Turns of each provider of a task, where a benchmark is measured in turns.
TURNS = 3
SLOW = 0.5
# Turns that this tree and the base of a comparison take; of long calls at least so many.
BASE_TURNS, LEAST_BASE_TURNS = 10, 4
# A comparison ends early when it has taken so many times what it may.
OVERDRAWN = 5
# Of calls that long so many rounds are enough.
LONG, LONG_ROUNDS = 1.0, 3
# Calls in one graph, or between two events: what starts and ends a graph is a fifth of a short one.
CALLS = 20
WALL_CALLS = 100
# Times stretches of so many seconds; returns seconds per call.
Stretch = Callable[[float], list[float]]


class GpuTimes(NamedTuple):
    """What a call takes on a GPU.

    Attributes:
        seconds: On the device, each the mean of ``CALLS`` calls that follow each other.
        wall: Seconds by the host's clock, the mean of up to ``WALL_CALLS`` calls and one wait:
            what a program sees that makes these calls without a graph.
        method: ``graph`` or, where the calls cannot be captured, ``events``: a host that is slower
            than the device then shows in ``seconds``.
    """

    seconds: list[float]
    wall: float
    method: str


def rounds_of(
    benchmark: Any,
    fn: Callable[[], object],
    budget: float,
    least: int,
    before: Callable[[], None] | None = None,
) -> list[float]:
    """Run pytest-benchmark's pedantic rounds on a CPU; return their seconds, [] if it is disabled.

    Args:
        benchmark: The plugin's fixture.
        fn: What to time.
        budget: Seconds that the rounds may take, unless ``least`` rounds take longer.
        least: Fewest rounds; one where a call takes more than half a second and ``least`` is
            below five, three where one takes more than a second.
        before: Run before each call, outside of the time; see ``caches.py``.
    """
    if benchmark.disabled:
        benchmark.pedantic(fn)
        return []
    fn()
    between = _seconds(before) if before else 0.0
    once = max(_seconds(fn), 1e-7)
    # What runs before a call has to run before every one.
    iterations = 1 if before else max(1, math.ceil(1e-4 / once))
    if once > SLOW and least < 5:
        least = 1
    elif once > LONG:
        least = min(least, LONG_ROUNDS)
    rounds = min(200, max(least, int(budget / (once * iterations + between))))
    benchmark.pedantic(
        fn,
        setup=before,
        rounds=rounds,
        iterations=iterations,
        warmup_rounds=min(3, rounds // 5),
    )
    return list(benchmark.stats.stats.data)


def _seconds(fn: Callable[[], object]) -> float:
    start = time.perf_counter()
    fn()
    return time.perf_counter() - start


def gpu_times(fn: Callable[[], object], budget: float, *, capture: bool = True) -> GpuTimes:
    """Time a call on the current GPU.

    ``fn`` takes the next of its copies at every call, so that none finds its data in the cache;
    writing to flush the cache would leave lines that are written back while the call runs.

    Args:
        fn: What to time; it has been called before, and has allocated what it keeps.
        budget: Seconds for the calls on the device, and again for those by the host's clock.
        capture: Whether to try a graph; work on the host would not be in it.
    """
    once = wall_seconds(fn, 3)
    calls = max(1, min(CALLS, int(budget / once)))
    graph = _captured(fn, calls) if capture else None
    rounds = max(3, min(30, int(budget / (calls * once))))
    if graph is None:
        seconds = _event_seconds(lambda: [fn() for _ in range(calls)], rounds)
    else:
        seconds = _event_seconds(graph.replay, rounds)
    wall = wall_seconds(fn, max(3, min(WALL_CALLS, int(budget / once))))
    return GpuTimes(
        [each / calls for each in seconds], wall, "events" if graph is None else "graph"
    )


class Sampler:
    """Times a call in stretches, between which another process can have the machine.

    Args:
        fn: What to time.
        device: Where it runs.
        capture: Whether a CUDA graph may hold it.
        before: Runs before each call, outside of the time.
    """

    def __init__(
        self,
        fn: Callable[[], object],
        device: torch.device,
        *,
        capture: bool = True,
        before: Callable[[], None] | None = None,
    ) -> None:
        self.fn, self.before, self.method = fn, before, ""
        self.gpu = device.type == "cuda"
        fn()
        if not self.gpu:
            self.once = max(_seconds(fn), 1e-7)
            self.calls = 1 if before else max(1, math.ceil(1e-4 / self.once))
            return
        self.calls, self.once = CALLS, wall_seconds(fn, 3)
        graph = _captured(fn, CALLS) if capture else None
        self.method = "events" if graph is None else "graph"
        self.work = self._all if graph is None else graph.replay

    def _all(self) -> None:
        for _ in range(self.calls):
            self.fn()

    def stretch(self, seconds: float) -> list[float]:
        """Return seconds per call, of at least one round and of as many as fit into a time."""
        if self.gpu:
            rounds = max(1, int(seconds / (self.calls * self.once)))
            return [each / self.calls for each in _event_seconds(self.work, rounds)]
        if self.once < SLOW:
            self.fn()  # the other process has had the caches
        found: list[float] = []
        collecting = gc.isenabled()
        gc.disable()  # the two sides hold more and less that is to be looked through
        end = time.perf_counter() + seconds
        try:
            while not found or time.perf_counter() < end:
                if self.before:
                    self.before()
                found.append(_seconds(self._all) / self.calls)
        finally:
            if collecting:
                gc.enable()
        return found


def take_turns(
    here: Stretch, base: Stretch, budget: float
) -> tuple[list[list[float]], list[list[float]]]:
    """Let two sides time stretches in turns, one at a time; return a list per turn of each.

    Who begins alternates, so that neither always has the other's leavings in the caches.

    Args:
        here: Times this tree.
        base: Times the other commit.
        budget: Seconds that each side may take.
    """
    found: tuple[list[list[float]], list[list[float]]] = ([], [])
    sides = list(zip((here, base), found, strict=True))
    latest = time.perf_counter() + 2 * OVERDRAWN * budget
    for turn in range(BASE_TURNS):
        if turn >= LEAST_BASE_TURNS and turn % 2 == 0 and time.perf_counter() > latest:
            break
        for stretch, times in sides if turn % 2 == 0 else reversed(sides):
            times.append(stretch(budget / BASE_TURNS))
    return found


def wall_seconds(fn: Callable[[], object], calls: int) -> float:
    """Return the mean of calls that follow each other and one wait, by the host's clock."""
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(calls):
        fn()
    torch.cuda.synchronize()
    return (time.perf_counter() - start) / calls


def _captured(fn: Callable[[], object], calls: int) -> torch.cuda.CUDAGraph | None:
    """Return a graph of calls, or None where they cannot be captured."""
    side: Any = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.stream(side):
            for _ in range(calls):
                fn()  # each copy once: what it allocates or packs at first use is there
        torch.cuda.current_stream().wait_stream(side)
        with torch.cuda.graph(graph):
            for _ in range(calls):
                fn()
    except RuntimeError:
        torch.cuda.synchronize()
        return None
    return graph


def _event_seconds(fn: Callable[[], object], rounds: int) -> list[float]:
    """Time rounds by events, after one that is not timed."""
    fn()
    pairs = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(rounds)]
    for start, end in pairs:
        start.record()
        fn()
        end.record()
    torch.cuda.synchronize()
    return [start.elapsed_time(end) / 1e3 for start, end in pairs]


def percentiles(seconds: list[float]) -> tuple[float, float, float]:
    """Return the 20th, 50th and 80th percentile."""
    if len(seconds) == 1:
        return seconds[0], seconds[0], seconds[0]
    fifths = statistics.quantiles(seconds, n=5, method="inclusive")
    return fifths[0], statistics.median(seconds), fifths[3]
