"""The benchmarks' tables and plots, and `collavo bench`; no time is measured here."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from collavo.cli import main

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from benchmarks import peers, plots, report  # noqa: E402
from benchmarks.conftest import _percentiles  # noqa: E402
from benchmarks.roofline import Roof  # noqa: E402


def measurement(**changes: Any) -> report.Measurement:
    row = report.Measurement(
        op="qlora_linear",
        provider="ours:cpu",
        mode="fwd",
        case="decode",
        dtype="bfloat16",
        p20_ms=0.9,
        p50_ms=1.0,
        p80_ms=1.5,
        gb_per_s=10.0,
        gflop_per_s=None,
        roof=0.5,
        peak_mb=None,
        error=1e-3,
        config_json=report.config_json({"m": 1}),
        **report.facts(torch.device("cpu")),  # type: ignore[arg-type]
    )
    return dataclasses.replace(row, **changes)


def test_saved_rows_are_read_back_and_replaced_by_later_ones(tmp_path: Path) -> None:
    other = measurement(provider="bitsandbytes")
    (path,) = report.save([measurement(), other], tmp_path)
    assert report.read_csv(path) == [measurement(), other]
    report.save([measurement(p50_ms=2.0)], tmp_path)
    assert [row.p50_ms for row in report.read_csv(path)] == [2.0, 1.0]
    table = path.with_suffix(".md").read_text()
    assert "| decode | fwd  | bfloat16 | ours:cpu " in table and "50%" in table
    assert table.index("bitsandbytes") < table.index("ours:cpu")  # the faster one first
    assert sorted(file.suffix for file in path.parent.iterdir()) == [".csv", ".md"]


def test_a_file_of_other_columns_is_refused(tmp_path: Path) -> None:
    (tmp_path / "x.csv").write_text("op,time\n")
    with pytest.raises(ValueError, match=r"x\.csv: expected the columns op, provider"):
        report.read_csv(tmp_path / "x.csv")


def test_plots_are_drawn_from_the_files_and_are_the_same_each_time(tmp_path: Path) -> None:
    """Committed pictures should change only when the numbers do."""
    pytest.importorskip("matplotlib")
    rows = [measurement(), measurement(provider="peft", p50_ms=2.5, p80_ms=3.0)]
    # The base without adapters is drawn, and no speed is claimed over it.
    rows.append(measurement(provider="bitsandbytes", p50_ms=1.5, p80_ms=3.0))
    report.save(rows, tmp_path / "results")
    drawn = [plots.draw_all(tmp_path / "results", tmp_path / name) for name in ("a", "b")]
    assert [path.name for path in drawn[0]] == ["qlora_linear.svg", "overview.svg"]
    assert [p.read_text() for p in drawn[0]] == [p.read_text() for p in drawn[1]]
    assert plots.speedups(rows) == {"decode, fwd, bfloat16": 2.5}


def test_the_roof_is_the_slower_of_memory_and_arithmetic() -> None:
    roof = Roof(bandwidth=100.0, peak={"float32": 10.0, "bfloat16": 40.0})
    assert roof.seconds(200, 5, "float32") == 2.0
    assert roof.seconds(200, 50, "float32") == 5.0
    assert roof.seconds(0, 80, "float16") == 2.0


def test_percentiles() -> None:
    assert _percentiles([5.0, 1.0, 2.0, 3.0, 4.0, 6.0]) == (2.0, 3.5, 5.0)
    assert _percentiles([2.0]) == (2.0, 2.0, 2.0)


def test_absent_peers_are_named() -> None:
    present, absent = peers.summary()
    assert len(present) + len(absent) == len(peers.PEERS)
    assert peers.Peer("none", "no_such_module_here", ()).absent() == "not installed"


def test_the_fixture_measures_and_the_table_is_printed(tmp_path: Path) -> None:
    """One benchmark file through pytest itself: quick selection, --full, and the summary."""
    folder = tmp_path / "benchmarks"
    folder.mkdir()
    for name in ("__init__", "conftest", "peers", "report", "roofline"):
        text = (ROOT / "benchmarks" / f"{name}.py").read_text()
        (folder / f"{name}.py").write_text(text.replace("1 << 28", "1 << 20").replace("1536", "64"))
    (folder / "bench_sum.py").write_text(
        "import pytest, torch\n"
        "@pytest.mark.parametrize('n', [8, pytest.param(16, marks=pytest.mark.full)])\n"
        "def bench_sum(measure, n):\n"
        "    x = torch.ones(n)\n"
        "    row = measure(x.sum, op='sum', provider='ours', case=f'n={n}', bytes=4 * n)\n"
        "    assert row is None or row.p20_ms <= row.p50_ms <= row.p80_ms\n"
    )
    (tmp_path / "pytest.ini").write_text(
        "[pytest]\npython_files = bench_*.py\npython_functions = bench_*\n"
    )
    command = [sys.executable, "-m", "pytest", "benchmarks", "--benchmark-only", "--full"]
    result = subprocess.run(
        [*command, "--device", "cpu", "--save-results", "-p", "no:cacheprovider"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert "sum on " in result.stdout and "roof: read" in result.stdout
    (saved,) = (folder / "results").glob("*/sum.csv")
    assert [row.case for row in report.read_csv(saved)] == ["n=8", "n=16"]


def test_bench_says_where_the_benchmarks_are_not(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from collavo.cli import bench

    monkeypatch.setattr(bench, "__file__", str(tmp_path / "site" / "collavo" / "cli" / "bench.py"))
    monkeypatch.chdir(tmp_path)
    assert main(["bench"]) == 2
    assert "part of the source checkout" in capsys.readouterr().err
