"""Times of one call: rounds sized to a budget, events on a GPU, percentiles."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

# Each of the blocks of rounds that a benchmark with the argument ``turn`` is measured in.
TURNS = 3
SLOW = 0.5
# Of calls that long so many rounds are enough.
LONG, LONG_ROUNDS = 1.0, 3


def rounds_of(
    benchmark: Any,
    fn: Callable[[], object],
    device: torch.device,
    budget: float,
    least: int,
    before: Callable[[], None] | None = None,
) -> list[float]:
    """Run pytest-benchmark's pedantic rounds and return their seconds; [] when it is disabled.

    Args:
        benchmark: The plugin's fixture.
        fn: What to time.
        device: Where it runs; a GPU is waited for.
        budget: Seconds that the rounds may take, unless ``least`` rounds take longer.
        least: Fewest rounds; one where a call takes more than half a second and ``least`` is
            below five, three where one takes more than a second.
        before: Run before each call, outside of the time; see ``cold.py``.
    """
    on_gpu = device.type == "cuda"

    def call() -> None:
        fn()
        if on_gpu:
            torch.cuda.synchronize(device)

    if benchmark.disabled:
        benchmark.pedantic(call)
        return []
    call()
    between = _seconds(before) if before else 0.0
    once = max(_seconds(call), 1e-7)
    # What runs before a call has to run before every one.
    iterations = 1 if before else max(1, math.ceil(1e-4 / once))
    if once > SLOW and least < 5:
        least = 1
    elif once > LONG:
        least = min(least, LONG_ROUNDS)
    rounds = min(200, max(least, int(budget / (once * iterations + between))))
    benchmark.pedantic(
        call,
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


def event_seconds(fn: Callable[[], object], rounds: int) -> list[float]:
    """Time on the GPU by events, the L2 cache flushed before each call."""
    flush = torch.empty(1 << 28, dtype=torch.int8, device="cuda")
    pairs = [
        (torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True))
        for _ in range(rounds)
    ]
    for start, end in pairs:
        flush.zero_()
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
