"""Hooks and fixtures of the benchmarks; nothing is imported from here.

``--dry-run`` goes through the GPU's benchmarks without one: a stand-in compiles our kernels and
launches nothing, peers are not run, and rows say so in place of the device and hold no times.
"""

from __future__ import annotations

import os

# Before torch is imported: waiting OpenMP threads must not spin beside the one that works.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import base as bases
from benchmarks import comparison, machine, peers, report, roofline
from benchmarks import measure as measuring
from benchmarks.registry import BENCHMARKS

COMMIT = pytest.StashKey[bases.Commit]()
NOTE = pytest.StashKey[str]()
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
    group.addoption(
        "--base", metavar="REF", help="only our own providers, in turns with those of a commit"
    )


def pytest_configure(config: pytest.Config) -> None:
    config.stash[measuring.RUN] = measuring.Run()
    # Our table holds the same times and more; --benchmark-json still writes the plugin's own.
    config.option.benchmark_quiet = True
    if config.getoption("--isa"):
        os.environ.update(ISA_VARIABLES)
        if machine.isa() != "avx2":
            raise pytest.UsageError(f"--isa avx2: torch has already chosen {machine.isa()}")
    threads = config.getoption("--threads")
    if threads is not None:
        if threads < 1:
            raise pytest.UsageError(f"--threads: expected 1 or more, got {threads}")
        torch.set_num_threads(threads)
    if config.getoption("--base"):
        _configure_base(config, config.getoption("--base"))


def _configure_base(config: pytest.Config, ref: str) -> None:
    """Find the commit, so that a wrong name is said before anything is measured."""
    if config.getoption("--dry-run"):
        raise pytest.UsageError("--base compares times, and --dry-run takes none")
    try:
        config.stash[COMMIT] = bases.resolve(ref)
        if config.getoption("--save-results"):
            bases.require_committed()
    except bases.BaseError as error:
        raise pytest.UsageError(str(error)) from error
    if measuring.chosen_kind(config) == "cpu":
        bases.share_cores(torch.get_num_threads())


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Give ``bench_<op>`` the rows of its benchmark, providers in turns, marked as selected."""
    config = metafunc.config
    entry = BENCHMARKS[metafunc.function.__name__.removeprefix("bench_")]
    parameters = []
    for turn, row in entry.turns(measuring.chosen_kind(config), measuring.turns(config)):
        marks = [] if row.quick else [pytest.mark.full]
        marks += [pytest.mark.quick_gpu] if row.quick_gpu else []
        parameters.append(pytest.param(row, marks=marks, id=f"{row.name}-{turn}"))
    metafunc.parametrize("row", parameters)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out what the selection leaves out: the shapes marked ``full``, or all but a few."""
    kept = list(items)
    if config.getoption("--quick-gpu"):
        kept = [item for item in kept if item.get_closest_marker("quick_gpu")]
    elif not config.getoption("--full"):
        kept = [item for item in kept if not item.get_closest_marker("full")]
    # In a dry run peers would compute; with a base there is nothing to hold them against.
    if measuring.is_dry(config) or config.getoption("--base"):
        kept = [item for item in kept if item.callspec.params["row"].is_ours]  # type: ignore[attr-defined]
    if len(kept) < len(items):
        left_out = set(items) - set(kept)
        config.hook.pytest_deselected(items=[item for item in items if item in left_out])
        items[:] = kept


@pytest.fixture(scope="session")
def device(request: pytest.FixtureRequest) -> torch.device:
    """Device to measure."""
    return measuring.chosen_device(request.config)


@pytest.fixture(scope="session")
def base(request: pytest.FixtureRequest, device: torch.device) -> Iterator[bases.Base | None]:
    """Start the other commit's process; None where nobody asked for one."""
    config = request.config
    commit = config.stash.get(COMMIT, None)
    if commit is None or config.getoption("benchmark_disable"):
        yield None
        return
    try:
        process = bases.Base(commit, measuring.chosen_kind(config), device)
    except bases.BaseError as error:
        pytest.exit(str(error), returncode=pytest.ExitCode.USAGE_ERROR)
    config.stash[NOTE] = process.note
    with process:
        yield process


@pytest.fixture(scope="session", autouse=True)
def _roof(request: pytest.FixtureRequest, device: torch.device) -> None:
    """Measure the device's bandwidth and matmul peaks, once per run."""
    if not request.config.getoption("benchmark_disable") and not measuring.is_dry(request.config):
        request.config.stash[measuring.RUN].roof = roofline.measure_roof(device)


@pytest.fixture(scope="session", autouse=True)
def _stand_in(request: pytest.FixtureRequest) -> Iterator[None]:
    """Let tensors on the CPU pass for a GPU's in a dry run."""
    if not measuring.is_dry(request.config):
        yield
        return
    from collavo_kernels.testing.gpu_stand_in import gpu_stand_in

    with gpu_stand_in():
        yield


@pytest.fixture
def measure(
    benchmark: Any,
    request: pytest.FixtureRequest,
    device: torch.device,
    base: bases.Base | None,
) -> measuring.Measure:
    """Return what times a row and records it; see ``benchmarks/README.md``."""
    return measuring.Measure(benchmark, request.config, device, base)


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    """Print the tables, the roof, and who was and was not there; save if asked to."""
    run = config.stash.get(measuring.RUN, measuring.Run())
    rows, say = list(run.rows.values()), terminalreporter.write_line
    if not rows:
        return
    terminalreporter.section("measurements")
    for op in dict.fromkeys(row.op for row in rows):
        say(f"\n{op} on {rows[0].device}")
        pairs = [pair for pair in run.pairs if pair.row.op == op]
        say(f"{comparison.table(pairs)}\n" if pairs else "")
        say(report.markdown_table([row for row in rows if row.op == op]))
    if COMMIT in config.stash:
        commit = config.stash[COMMIT]
        say(f"\nbase: {commit.ref}, {commit.short}; {config.stash.get(NOTE, 'not started')}")
    present, absent = peers.summary()
    say(f"\nroof: {run.roof or 'not measured'}")
    say(f"peers here: {', '.join(present) or 'none'}")
    say(f"peers absent: {', '.join(absent) or 'none'}")
    if config.getoption("--save-results") and not measuring.is_dry(config):
        for path in report.save(rows):
            say(f"saved {path}")
