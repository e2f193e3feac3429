"""Fixtures of the benchmarks: the device, its roof, and ``measure``, which times and records."""

from __future__ import annotations

import os

# Before torch is imported: waiting OpenMP threads must not spin beside the one that works.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import math
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import pytest
import torch

from benchmarks import peers, report, roofline

Measure = Callable[..., report.Measurement | None]
ROWS = pytest.StashKey[list[report.Measurement]]()
ROOF = pytest.StashKey[roofline.Roof]()


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("collavo benchmarks")
    group.addoption("--full", action="store_true", help="run every shape, not the quick selection")
    group.addoption("--save-results", action="store_true", help="keep CSV and markdown tables")
    group.addoption("--device", default=None, help="device to measure (default: a GPU if any)")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "full: a shape that only --full runs")
    config.stash[ROWS] = []
    # Our table holds the same times and more; --benchmark-json still writes the plugin's own.
    config.option.benchmark_quiet = True


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave the shapes marked ``full`` out of the quick selection."""
    if config.getoption("--full"):
        return
    left_out = [item for item in items if item.get_closest_marker("full")]
    if left_out:
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if not item.get_closest_marker("full")]


@pytest.fixture(scope="session")
def device(request: pytest.FixtureRequest) -> torch.device:
    """Device to measure: a GPU where there is one, else the CPU (``--device`` overrides)."""
    name = request.config.getoption("--device")
    return torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))


@pytest.fixture(scope="session")
def roof(request: pytest.FixtureRequest, device: torch.device) -> roofline.Roof:
    """Bandwidth and matmul peaks of the device, measured once per run."""
    measured = roofline.measure_roof(device)
    request.config.stash[ROOF] = measured
    return measured


@pytest.fixture(autouse=True)
def _seed() -> Iterator[None]:
    torch.manual_seed(0)
    yield


@pytest.fixture
def measure(
    benchmark: Any, request: pytest.FixtureRequest, device: torch.device, roof: roofline.Roof
) -> Measure:
    """Time a call and record it; see ``benchmarks/README.md``. Returns the recorded row."""

    def run(
        fn: Callable[[], object],
        *,
        op: str,
        provider: str,
        case: str,
        mode: str = "fwd",
        dtype: torch.dtype = torch.float32,
        bytes: float = 0,
        flops: float = 0,
        error: float | None = None,
        config: Mapping[str, object] | None = None,
    ) -> report.Measurement | None:
        benchmark.group = f"{op} {mode} {case}"
        seconds = _pedantic(benchmark, fn, device, full=request.config.getoption("--full"))
        if not seconds:
            return None
        peak_mb = _peak_megabytes(fn, device)
        if device.type == "cuda":
            seconds = _event_seconds(fn, rounds=len(seconds))
        p20, p50, p80 = _percentiles(seconds)
        name = str(dtype).removeprefix("torch.")
        least = roof.seconds(bytes, flops, name)
        row = report.Measurement(
            op=op,
            provider=provider,
            mode=mode,
            case=case,
            dtype=name,
            p20_ms=p20 * 1e3,
            p50_ms=p50 * 1e3,
            p80_ms=p80 * 1e3,
            gb_per_s=bytes / p50 / 1e9 if bytes else None,
            gflop_per_s=flops / p50 / 1e9 if flops else None,
            roof=least / p50 if least else None,
            peak_mb=peak_mb,
            error=error,
            config_json=report.config_json(config),
            **report.facts(device),  # type: ignore[arg-type]
        )
        request.config.stash[ROWS].append(row)
        benchmark.extra_info.update(
            provider=provider, gb_per_s=row.gb_per_s, gflop_per_s=row.gflop_per_s, roof=row.roof
        )
        return row

    return run


def _pedantic(
    benchmark: Any, fn: Callable[[], object], device: torch.device, *, full: bool
) -> list[float]:
    """Run pytest-benchmark's pedantic rounds, sized to a time budget; [] when it is disabled."""
    on_gpu = device.type == "cuda"

    def call() -> None:
        fn()
        if on_gpu:
            torch.cuda.synchronize(device)

    if benchmark.disabled:
        benchmark.pedantic(call)
        return []
    call()
    start = time.perf_counter()
    call()
    once = max(time.perf_counter() - start, 1e-7)
    budget = 2.0 if full else 0.4
    iterations = max(1, math.ceil(1e-4 / once))
    rounds = min(200, max(5, int(budget / (once * iterations))))
    benchmark.pedantic(
        call, rounds=rounds, iterations=iterations, warmup_rounds=min(3, rounds // 5)
    )
    return list(benchmark.stats.stats.data)


def _event_seconds(fn: Callable[[], object], rounds: int) -> list[float]:
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


def _peak_megabytes(fn: Callable[[], object], device: torch.device) -> float | None:
    if device.type != "cuda":
        return None
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    fn()
    torch.cuda.synchronize(device)
    return (torch.cuda.max_memory_allocated(device) - before) / 1e6


def _percentiles(seconds: list[float]) -> tuple[float, float, float]:
    if len(seconds) == 1:
        return seconds[0], seconds[0], seconds[0]
    fifths = statistics.quantiles(seconds, n=5, method="inclusive")
    return fifths[0], statistics.median(seconds), fifths[3]


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    """Print the tables, the roof, and who was and was not there; save if asked to."""
    rows = config.stash.get(ROWS, [])
    if not rows:
        return
    terminalreporter.section("measurements")
    for op in dict.fromkeys(row.op for row in rows):
        terminalreporter.write_line(f"\n{op} on {rows[0].device}")
        terminalreporter.write_line(report.markdown_table([r for r in rows if r.op == op]))
    present, absent = peers.summary()
    terminalreporter.write_line(f"\nroof: {config.stash[ROOF]}")
    terminalreporter.write_line(f"peers here: {', '.join(present) or 'none'}")
    terminalreporter.write_line(f"peers absent: {', '.join(absent) or 'none'}")
    if config.getoption("--save-results"):
        for path in report.save(rows):
            terminalreporter.write_line(f"saved {path}")
