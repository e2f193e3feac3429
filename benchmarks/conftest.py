"""Fixtures of the benchmarks: the device, its roof, and ``measure``, which times and records."""

from __future__ import annotations

import os

# Before torch is imported: waiting OpenMP threads must not spin beside the one that works.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import pytest
import torch

from benchmarks import memory, peers, report, roofline, timing

Measure = Callable[..., report.Measurement | None]
Rows = dict[tuple[str, ...], report.Measurement]
ROWS = pytest.StashKey[Rows]()
SECONDS = pytest.StashKey[dict[tuple[str, ...], list[float]]]()
ROOF = pytest.StashKey[roofline.Roof]()
# Each library asks for its instruction set at its first product, so this is early enough.
ISA_VARIABLES = {
    "COLLAVO_ISA": "avx2",
    "ATEN_CPU_CAPABILITY": "avx2",
    "ONEDNN_MAX_CPU_ISA": "AVX2",
    "MKL_ENABLE_INSTRUCTIONS": "AVX2",
}


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("collavo benchmarks")
    group.addoption("--full", action="store_true", help="run every shape, not the quick selection")
    group.addoption("--save-results", action="store_true", help="keep CSV and markdown tables")
    group.addoption("--device", default=None, help="device to measure (default: a GPU if any)")
    group.addoption("--threads", type=int, default=None, help="CPU threads (default: torch's own)")
    group.addoption("--isa", choices=["avx2"], help="leave AVX-512 out, here and in the peers")


def pytest_configure(config: pytest.Config) -> None:
    config.stash[ROWS] = {}
    config.stash[SECONDS] = {}
    # Our table holds the same times and more; --benchmark-json still writes the plugin's own.
    config.option.benchmark_quiet = True
    if config.getoption("--isa"):
        os.environ.update(ISA_VARIABLES)
        if report.isa() != "avx2":
            raise pytest.UsageError(f"--isa avx2: torch has already chosen {report.isa()}")
    threads = config.getoption("--threads")
    if threads is not None:
        if threads < 1:
            raise pytest.UsageError(f"--threads: expected 1 or more, got {threads}")
        torch.set_num_threads(threads)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave the shapes marked ``full`` out of the quick selection."""
    if config.getoption("--full"):
        return
    left_out = [item for item in items if item.get_closest_marker("full")]
    if left_out:
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if not item.get_closest_marker("full")]


def chosen_device(config: pytest.Config) -> torch.device:
    """Return the device to measure: a GPU where there is one, else the CPU, or ``--device``."""
    name = config.getoption("--device")
    return torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))


def turns(config: pytest.Config) -> range:
    """Return the turns of a benchmark that is measured in several; one where nothing is timed."""
    return range(1 if config.getoption("benchmark_disable") else timing.TURNS)


@pytest.fixture(scope="session")
def device(request: pytest.FixtureRequest) -> torch.device:
    """Device to measure."""
    return chosen_device(request.config)


@pytest.fixture(scope="session")
def roof(request: pytest.FixtureRequest, device: torch.device) -> roofline.Roof:
    """Bandwidth and matmul peaks of the device, measured once per run."""
    if request.config.getoption("benchmark_disable"):
        return roofline.Roof(0.0)
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
    rows, seconds = request.config.stash[ROWS], request.config.stash[SECONDS]
    budget = 2.0 if request.config.getoption("--full") else 0.4

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
        in_turns: bool = False,
        before: Callable[[], None] | None = None,
    ) -> report.Measurement | None:
        benchmark.group = f"{op} {mode} {case}"
        parts = timing.TURNS if in_turns else 1
        # On a GPU the rounds only say how many events to time.
        share = budget / parts / (4 if device.type == "cuda" else 1)
        taken = timing.rounds_of(benchmark, fn, device, share, -(-5 // parts), before)
        if not taken:
            return None
        if device.type == "cuda":
            taken = timing.event_seconds(fn, rounds=len(taken))
        name = str(dtype).removeprefix("torch.")
        facts = report.facts(device)
        key = (op, *report.key(case, mode, name, provider, facts))
        pooled = seconds.setdefault(key, [])
        pooled += taken
        p20, p50, p80 = timing.percentiles(pooled)
        least = roof.seconds(bytes, flops, name)
        earlier = rows.get(key)
        rows[key] = row = report.Measurement(
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
            peak_mb=earlier.peak_mb if earlier else memory.peak_megabytes(fn, device),
            error=error,
            config_json=report.config_json(config),
            **facts,  # type: ignore[arg-type]
        )
        benchmark.extra_info.update(
            provider=provider, gb_per_s=row.gb_per_s, gflop_per_s=row.gflop_per_s, roof=row.roof
        )
        return row

    return run


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    """Print the tables, the roof, and who was and was not there; save if asked to."""
    rows = list(config.stash.get(ROWS, {}).values())
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
