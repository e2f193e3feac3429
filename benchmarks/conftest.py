"""Fixtures of the benchmarks: the device, its roof, and ``measure``, which times and records.

``--dry-run`` goes through the GPU's benchmarks without one: a stand-in compiles our kernels and
launches nothing, peers are not run, and rows say so in place of the device and hold no times.
"""

from __future__ import annotations

import os

# Before torch is imported: waiting OpenMP threads must not spin beside the one that works.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
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
    group.addoption(
        "--quick-gpu", action="store_true", help="the rows that a few minutes on a GPU allow"
    )
    group.addoption("--dry-run", action="store_true", help="the GPU's benchmarks without a GPU")
    group.addoption("--rows", type=Path, help="a file that gets each row as it is measured")
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
    """Leave out what the selection leaves out: the shapes marked ``full``, or all but a few."""
    if config.getoption("--full"):
        return
    if config.getoption("--quick-gpu"):
        kept = [item for item in items if item.get_closest_marker("quick_gpu")]
    else:
        kept = [item for item in items if not item.get_closest_marker("full")]
    if len(kept) < len(items):
        left_out = set(items) - set(kept)
        config.hook.pytest_deselected(items=[item for item in items if item in left_out])
        items[:] = kept


def chosen_device(config: pytest.Config) -> torch.device:
    """Return the device to measure: a GPU where there is one, else the CPU, or ``--device``."""
    name = "cpu" if is_dry(config) else config.getoption("--device")
    return torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))


def is_dry(config: pytest.Config) -> bool:
    """Say whether a stand-in takes the GPU's place."""
    return bool(config.getoption("--dry-run"))


def chosen_kind(config: pytest.Config) -> str:
    """Return whose benchmarks are run: ``cuda`` or ``cpu``."""
    return "cuda" if is_dry(config) or chosen_device(config).type == "cuda" else "cpu"


def turns(config: pytest.Config) -> range:
    """Return the turns of a benchmark that is measured in several; one where nothing is timed."""
    once = ("benchmark_disable", "--quick-gpu", "--dry-run")
    return range(1 if any(map(config.getoption, once)) else timing.TURNS)


@pytest.fixture(scope="session")
def device(request: pytest.FixtureRequest) -> torch.device:
    """Device to measure."""
    return chosen_device(request.config)


@pytest.fixture(scope="session")
def roof(request: pytest.FixtureRequest, device: torch.device) -> roofline.Roof:
    """Bandwidth and matmul peaks of the device, measured once per run."""
    if request.config.getoption("benchmark_disable") or is_dry(request.config):
        return roofline.Roof(0.0)
    measured = roofline.measure_roof(device)
    request.config.stash[ROOF] = measured
    return measured


@pytest.fixture(autouse=True)
def _seed() -> Iterator[None]:
    torch.manual_seed(0)
    yield


@pytest.fixture(scope="session", autouse=True)
def _stand_in(request: pytest.FixtureRequest) -> Iterator[None]:
    """Let tensors on the CPU pass for a GPU's in a dry run."""
    if not is_dry(request.config):
        yield
        return
    from collavo_kernels.testing.gpu_stand_in import gpu_stand_in

    with gpu_stand_in():
        yield


@pytest.fixture(autouse=True)
def _only_ours(request: pytest.FixtureRequest) -> None:
    """Skip peers in a dry run: they would compute."""
    call = getattr(request.node, "callspec", None)
    provider = str(call.params.get("provider", "")) if call else ""
    if is_dry(request.config) and not provider.startswith("ours"):
        pytest.skip("a dry run runs no peers")


@pytest.fixture
def measure(
    benchmark: Any, request: pytest.FixtureRequest, device: torch.device, roof: roofline.Roof
) -> Measure:
    """Time a call and record it; see ``benchmarks/README.md``. Returns the recorded row."""
    options = request.config
    rows, seconds = options.stash[ROWS], options.stash[SECONDS]
    path, dry = options.getoption("--rows"), is_dry(options)

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
        error: Callable[[], float] | None = None,
        config: Mapping[str, object] | None = None,
        in_turns: bool = False,
        capture: bool = True,
        before: Callable[[], None] | None = None,
    ) -> report.Measurement | None:
        benchmark.group = f"{op} {mode} {case}"
        times = _times(benchmark, options, fn, device, in_turns, capture, before)
        if not times.seconds:
            return None
        name = str(dtype).removeprefix("torch.")
        facts = report.facts(device) | ({"device": report.DRY_RUN, "isa": ""} if dry else {})
        key = (op, *report.key(case, mode, name, provider, facts))
        pooled = seconds[key] = [*seconds.get(key, ()), *times.seconds]
        p20, p50, p80 = timing.percentiles(pooled)
        rates = _rates(bytes, flops, roof.seconds(bytes, flops, name), p50)
        peak = rows[key].peak_mb if key in rows else None
        if peak is None and not dry:
            peak = memory.peak_megabytes(fn, device)
        rows[key] = row = report.Measurement(
            op=op,
            provider=provider,
            mode=mode,
            case=case,
            dtype=name,
            p20_ms=p20 * 1e3,
            p50_ms=p50 * 1e3,
            p80_ms=p80 * 1e3,
            peak_mb=peak,
            error=None if error is None or dry else error(),
            config_json=report.config_json(config),
            wall_ms=times.wall * 1e3 if times.method else None,
            timed=times.method,
            **rates,
            **facts,  # type: ignore[arg-type]
        )
        benchmark.extra_info.update(provider=provider, **rates)
        if path is not None:
            report.append_jsonl(path, row)
        return row

    return run


def _rates(bytes: float, flops: float, least: float, seconds: float) -> dict[str, float | None]:
    """Return GB/s, GFLOP/s and the part of the roof that a time means; None where there is none."""
    return {
        "gb_per_s": bytes / seconds / 1e9 if bytes and seconds else None,
        "gflop_per_s": flops / seconds / 1e9 if flops and seconds else None,
        "roof": least / seconds if least and seconds else None,
    }


def _times(
    benchmark: Any,
    options: pytest.Config,
    fn: Callable[[], object],
    device: torch.device,
    in_turns: bool,
    capture: bool,
    before: Callable[[], None] | None,
) -> timing.GpuTimes:
    """Time a call as its device asks for; no seconds where timing is off, zeros in a dry run."""
    budget = 2.0 if options.getoption("--full") else 0.4
    budget = 0.1 if options.getoption("--quick-gpu") else budget
    parts = timing.TURNS if in_turns and not options.getoption("--quick-gpu") else 1
    if device.type == "cuda" or is_dry(options):
        benchmark.pedantic(fn)
        if benchmark.disabled:
            return timing.GpuTimes([], 0.0, "")
        if is_dry(options):
            return timing.GpuTimes([0.0], 0.0, "")
        return timing.gpu_times(fn, budget / parts, capture=capture)
    taken = timing.rounds_of(benchmark, fn, budget / parts, -(-5 // parts), before)
    return timing.GpuTimes(taken, 0.0, "")


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
    terminalreporter.write_line(f"\nroof: {config.stash.get(ROOF, 'not measured')}")
    terminalreporter.write_line(f"peers here: {', '.join(present) or 'none'}")
    terminalreporter.write_line(f"peers absent: {', '.join(absent) or 'none'}")
    if config.getoption("--save-results") and not is_dry(config):
        for path in report.save(rows):
            terminalreporter.write_line(f"saved {path}")
