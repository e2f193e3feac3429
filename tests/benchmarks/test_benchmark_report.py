"""The benchmarks' tables and plots, and `collavo bench`; no time is measured here."""

from __future__ import annotations

import dataclasses
import os
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from benchmarks import caches, machine, peers, plots, report, timing
from benchmarks.roofline import Roof
from benchmarks.timing import percentiles
from collavo.cli import main


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
        **machine.facts(torch.device("cpu")),  # type: ignore[arg-type]
    )
    return dataclasses.replace(row, **changes)


def test_saved_rows_are_read_back_and_replaced_by_later_ones(tmp_path: Path) -> None:
    other = measurement(provider="bitsandbytes")
    (path,) = report.save([measurement(), other], tmp_path)
    assert report.read_csv(path) == [measurement(), other]
    report.save([measurement(p50_ms=2.0)], tmp_path)
    assert [row.p50_ms for row in report.read_csv(path)] == [2.0, 1.0]
    table = path.with_suffix(".md").read_text()
    on = measurement().on
    assert f"| decode | fwd  | bfloat16 | {on} | ours:cpu " in table and "50%" in table
    assert table.index("bitsandbytes") < table.index("ours:cpu")  # the faster one first
    assert sorted(file.suffix for file in path.parent.iterdir()) == [".csv", ".md"]


def test_files_from_before_the_gpus_columns_are_read_and_added_to(tmp_path: Path) -> None:
    """Kept results of CPUs end with the date; what is written has the new columns, empty."""
    (path,) = report.save([measurement()], tmp_path)
    lines = path.read_text().splitlines()
    assert lines[0].endswith(",date,wall_ms,timed")
    path.write_text("".join(",".join(line.split(",")[:-2]) + "\n" for line in lines))
    assert report.read_csv(path) == [measurement()]
    later = measurement(provider="ours:triton", isa="", wall_ms=2.0, timed="graph")
    report.save([later], tmp_path)
    assert report.read_csv(path) == [measurement(), later]
    table = path.with_suffix(".md").read_text().splitlines()
    assert report.HEADER_GPU in table[2] and "| 2 ms " in path.with_suffix(".md").read_text()
    assert report.HEADER_GPU not in report.markdown_table([measurement()])


def test_rows_are_kept_as_they_are_measured(tmp_path: Path) -> None:
    """A killed run may leave half a line; what was whole is read."""
    path = tmp_path / "rows.jsonl"
    for provider in ("ours:triton", "peft"):
        report.append_jsonl(path, measurement(provider=provider, wall_ms=1.0, timed="events"))
    with path.open("a") as stream:
        stream.write('{"op": "qlora')
    assert [row.provider for row in report.read_jsonl(path)] == ["ours:triton", "peft"]
    assert report.read_jsonl(path)[1].wall_ms == 1.0


def test_rows_that_came_home_are_laid_out_and_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """What a dry run wrote holds no times and must not pass for results."""
    monkeypatch.setattr(report, "save", lambda rows: kept.extend(rows))
    kept: list[report.Measurement] = []
    path = tmp_path / "rows.jsonl"
    for p50 in (3.0, 2.0):  # two turns of one measurement
        report.append_jsonl(path, measurement(device="NVIDIA H100", isa="", p50_ms=p50))
    assert report.main([str(path), "--save"]) == 0
    printed = capsys.readouterr().out
    assert "# qlora_linear on NVIDIA H100" in printed and printed.count("ours:cpu") == 1
    assert [row.p50_ms for row in kept] == [2.0]
    report.append_jsonl(path, measurement(device=report.DRY_RUN, isa="", provider="ours:triton"))
    with pytest.raises(SystemExit):
        report.main([str(path), "--save"])


def test_a_file_of_other_columns_is_refused(tmp_path: Path) -> None:
    (tmp_path / "x.csv").write_text("op,time\n")
    with pytest.raises(ValueError, match=r"x\.csv: expected the columns op, provider"):
        report.read_csv(tmp_path / "x.csv")


def test_plots_are_drawn_from_the_files_and_are_the_same_each_time(tmp_path: Path) -> None:
    """Committed pictures should change only when the numbers do."""
    pytest.importorskip("matplotlib")
    rows = [measurement(), measurement(provider="peft", p50_ms=2.5, p80_ms=3.0)]
    rows.append(measurement(provider="bitsandbytes", p50_ms=1.5, p80_ms=3.0))
    report.save(rows, tmp_path / "results")
    drawn = [plots.draw_all(tmp_path / "results", tmp_path / name) for name in ("a", "b")]
    assert [path.name for path in drawn[0]] == ["qlora_linear.svg"]
    assert [p.read_text() for p in drawn[0]] == [p.read_text() for p in drawn[1]]


def test_plots_over_tokens_are_drawn_and_long_plots_are_split(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    rows = [
        measurement(case=f"64x64/m{m}/r64", mode=mode, provider=provider)
        for m in range(1, 20)
        for mode in ("fwd", "fwd+bwd")
        for provider in ("ours:cpu", "ours:int8", "bitsandbytes", "peft")
    ]
    report.save(rows, tmp_path / "results")
    names = [path.stem for path in plots.draw_all(tmp_path / "results", tmp_path / "plots")]
    parts = [report.slug(f"{mode} {rows[0].on}") for mode in ("fwd", "fwd+bwd")]
    assert names == [
        *(f"qlora_linear_{part}" for part in parts),
        *(f"qlora_linear_tokens_{part}" for part in parts),
    ]


def test_rows_of_other_threads_and_instruction_sets_stay(tmp_path: Path) -> None:
    """A run with one thread must not replace one with two, nor an AVX2 run an AVX-512 one."""
    rows = [measurement(threads=1, isa="avx512"), measurement(threads=2, isa="avx512")]
    report.save(rows, tmp_path)
    (path,) = report.save([measurement(threads=1, isa="avx2")], tmp_path)
    assert [(row.threads, row.isa) for row in report.read_csv(path)] == [
        (1, "avx512"),
        (2, "avx512"),
        (1, "avx2"),
    ]


def test_the_last_level_cache_counts_each_instance_once(tmp_path: Path) -> None:
    """Two cores on one 32 MiB cache rotate through 64 MiB, not 128."""
    for cpu in range(os.cpu_count() or 1):
        for index, (level, size, shared) in enumerate(
            [("1", "32K", f"{cpu}"), ("3", "32M", "0-255"), ("2", "1024K", f"{cpu}")]
        ):
            folder = tmp_path / f"cpu{cpu}" / "cache" / f"index{index}"
            folder.mkdir(parents=True)
            for name, text in (("level", level), ("size", size), ("shared_cpu_list", shared)):
                (folder / name).write_text(text + "\n")
    assert caches.last_level_cache(torch.device("cpu"), tmp_path) == 32 << 20
    assert caches.last_level_cache(torch.device("cpu"), tmp_path / "none") == caches.UNKNOWN_CACHE
    assert caches.copies_past_cache(1 << 40, torch.device("cpu")) == 2


def test_other_work_comes_before_every_timed_call_and_is_not_timed() -> None:
    """A cold row has one call per round, each after the other work; the time is the call's."""
    done: list[str] = []

    class Plugin:
        disabled = False

        def pedantic(self, call: Any, setup: Any, rounds: int, iterations: int, **_: Any) -> None:
            assert iterations == 1
            for _ in range(rounds):
                setup()
                call()

        stats = SimpleNamespace(stats=SimpleNamespace(data=[1.0]))

    timing.rounds_of(Plugin(), lambda: done.append("call"), 0.01, 5, lambda: done.append("other"))
    pairs = "".join("o" if each == "other" else "c" for each in done)
    assert pairs.startswith("coc") and set(pairs[3:].split("oc")) == {""} and len(pairs) >= 13


def test_other_work_reads_more_than_the_caches_hold() -> None:
    work = caches.OtherWork()
    assert work.buffer.nbytes >= 2 * caches.last_level_cache(torch.device("cpu"))
    assert work() is None  # or pytest-benchmark would take it for arguments


def test_the_roof_is_the_slower_of_memory_and_arithmetic() -> None:
    roof = Roof(bandwidth=100.0, peak={"float32": 10.0, "bfloat16": 40.0})
    assert roof.seconds(200, 5, "float32") == 2.0
    assert roof.seconds(200, 50, "float32") == 5.0
    assert roof.seconds(0, 80, "float16") == 2.0


def test_percentiles() -> None:
    assert percentiles([5.0, 1.0, 2.0, 3.0, 4.0, 6.0]) == (2.0, 3.5, 5.0)
    assert percentiles([2.0]) == (2.0, 2.0, 2.0)


def test_absent_peers_are_named() -> None:
    present, absent = peers.summary()
    assert len(present) + len(absent) == len(peers.PEERS)
    assert {"kernels", "bitsandbytes"} <= peers.PEERS.keys()
    assert peers.Peer("none", "no_such_module_here", ()).absent() == "not installed"


def test_bench_says_where_the_benchmarks_are_not(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from collavo.cli import bench

    monkeypatch.setattr(bench, "__file__", str(tmp_path / "site" / "collavo" / "cli" / "bench.py"))
    monkeypatch.chdir(tmp_path)
    assert main(["bench"]) == 2
    assert "part of the source checkout" in capsys.readouterr().err


def test_bench_hands_its_options_on(monkeypatch: pytest.MonkeyPatch) -> None:
    from collavo.cli import bench

    given: list[list[str]] = []

    def run(command: list[str], **_: Any) -> SimpleNamespace:
        given.append(command)
        return SimpleNamespace(returncode=0)

    monkeypatch.setattr(bench.subprocess, "run", run)
    assert main(["bench", "--base", "main", "--full", "-k", "qlora"]) == 0
    (command,) = given
    assert command[-5:] == ["--full", "--base", "main", "-k", "qlora"]


def test_a_reader_that_leaves_ends_the_benchmarks_without_a_word(tmp_path: Path) -> None:
    """pytest alone would print an internal error."""
    from collavo.cli import bench

    (tmp_path / "chatty.py").write_text("while True: print('line')")
    command = [sys.executable, "-c", bench._RUN.format(name="chatty")]
    process = subprocess.Popen(
        command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert process.stdout is not None and process.stdout.readline() == b"line\n"
    process.stdout.close()
    assert process.stderr is not None and process.stderr.read() == b""
    assert process.wait() == -signal.SIGPIPE
