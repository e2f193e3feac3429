"""The registry: every row comes from it, once, with somebody to measure; and how it is measured."""

from __future__ import annotations

import ast
from collections import Counter
from itertools import groupby
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from tiny_benchmarks import Project

from benchmarks import report
from benchmarks.registry import BENCHMARKS, Benchmark, Call, Row, Unavailable

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "benchmarks"
KINDS = ("cpu", "cuda")


def imports(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {str(node.module), *(f"{node.module}.{alias.name}" for alias in node.names)}
    return names


def sources() -> list[Path]:
    folders = (FOLDER, *(ROOT / each for each in ("tests", "scripts", "collavo")))
    return [path for folder in folders for path in folder.rglob("*.py")]


def test_nothing_imports_a_conftest() -> None:
    """Hooks and fixtures are pytest's to find; what others need lies in a module of its own."""
    for path in sources():
        bad = [name for name in imports(path) if "conftest" in name.split(".")]
        assert not bad, f"{path.relative_to(ROOT)} imports {bad}"


def test_a_bench_file_measures_one_benchmark_and_has_no_cases_of_its_own() -> None:
    """Its one function asks for the registry's rows, so that there are no others."""
    assert {path.stem for path in FOLDER.glob("bench_*.py")} == {f"bench_{op}" for op in BENCHMARKS}
    for path in FOLDER.glob("bench_*.py"):
        tree = ast.parse(path.read_text())
        kinds = (ast.FunctionDef, ast.ClassDef, ast.Assign)
        (function,) = [node for node in tree.body if isinstance(node, kinds)]
        assert isinstance(function, ast.FunctionDef) and function.name == path.stem
        assert [argument.arg for argument in function.args.args] == ["measure", "row"]
        assert not function.decorator_list
        assert imports(path) <= {
            "__future__",
            "__future__.annotations",
            "benchmarks.measure",
            "benchmarks.measure.Measure",
            "benchmarks.registry",
            "benchmarks.registry.Row",
        }


def test_every_benchmark_is_the_same_pair_of_files() -> None:
    expected = {f"{op}_{what}" for op in BENCHMARKS for what in ("cases", "providers")}
    assert {path.stem for path in (FOLDER / "ops").glob("*.py")} == {*expected, "__init__"}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("op", BENCHMARKS)
def test_rows_have_names_of_their_own_and_stand_by_their_task(op: str, kind: str) -> None:
    rows = BENCHMARKS[op].rows(kind)
    assert rows and {row.op for row in rows} == {op}
    twice = [name for name, count in Counter(row.name for row in rows).items() if count > 1]
    assert not twice
    # Whoever is held against each other is measured in turns: a task is one stretch of rows.
    tasks = [task for task, _ in groupby(row.task for row in rows)]
    assert len(tasks) == len(set(tasks))
    assert any(row.quick for row in rows)
    assert kind == "cuda" or any(row.is_ours for row in rows)
    assert BENCHMARKS[op].find(kind, rows[-1].name) == rows[-1]


@pytest.mark.parametrize("op", BENCHMARKS)
def test_every_row_has_a_provider_and_every_provider_a_row(op: str) -> None:
    pytest.importorskip("transformers")
    named = {row.provider for kind in KINDS for row in BENCHMARKS[op].rows(kind)}
    assert named == set(BENCHMARKS[op].providers.PROVIDERS)


def test_what_is_not_in_the_table_is_not_found() -> None:
    with pytest.raises(Unavailable, match="qlora_linear: no row of-nobody on cpu"):
        BENCHMARKS["qlora_linear"].find("cpu", "of-nobody")


def test_a_row_draws_the_same_inputs_each_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Both sides of a comparison draw them for themselves, after whatever came before."""

    def prepare(row: Row, device: torch.device) -> Call:
        return Call(lambda: None, config={"drawn": torch.rand(3).tolist()})

    drawing = SimpleNamespace(PROVIDERS={}, prepare=prepare)
    monkeypatch.setattr(Benchmark, "providers", drawing)
    row = Row("total", "fwd", "n=8", "ours")
    first = Benchmark("total").prepare(row, torch.device("cpu"))
    torch.rand(5)
    second = Benchmark("total").prepare(row, torch.device("cpu"))
    assert first.config == second.config


@pytest.fixture
def project(tmp_path: Path) -> Project:
    return Project(tmp_path / "project")


def test_rows_are_measured_in_turns_and_kept(project: Project) -> None:
    """Through pytest itself: the selection, who is absent, the summary, and the files."""
    result = project.bench("benchmarks", "--benchmark-only", "--save-results", "-rs")
    assert result.returncode == 0, result.stdout + result.stderr
    assert "total on Tiny" in result.stdout and "roof: read" in result.stdout
    assert "absent: not installed" in result.stdout
    # Three rows once and three in three turns; one of the three has nobody. As many without quick.
    assert "8 passed, 4 skipped, 12 deselected" in result.stdout
    results = project.root / "benchmarks" / "results" / "tiny"
    for op in ("total", "turns"):  # turns are blocks of one measurement: one row
        rows = report.read_csv(results / f"{op}.csv")
        found = [(row.case, row.provider, row.threads) for row in rows]
        assert found == [("n=8", "ours", 1), ("n=8", "peer", 1)]
        assert all(row.p20_ms <= row.p50_ms <= row.p80_ms for row in rows)
        assert all(row.peak_mb is not None and row.peak_mb < 1e-3 for row in rows)


def test_the_quick_selection_leaves_the_rest_out_and_may_run_untimed(project: Project) -> None:
    result = project.bench("benchmarks/bench_turns.py", "--benchmark-disable", "-q")
    assert "2 passed, 1 skipped, 3 deselected" in result.stdout, result.stdout + result.stderr
    assert not (project.root / "benchmarks" / "results").exists()
