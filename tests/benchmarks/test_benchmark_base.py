"""``--base``: another commit's package in a process of its own, in turns with this tree's."""

from __future__ import annotations

import re
import sysconfig
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from tiny_benchmarks import FAST, SLOW, Project

from benchmarks import base, comparison, goals, report, results_tables, timing
from benchmarks.registry import Row, Unavailable

SUFFIX = sysconfig.get_config_var("EXT_SUFFIX")
OURS = Row("total", "fwd", "n=8", "ours")


@pytest.fixture
def project(tmp_path: Path) -> Project:
    return Project(tmp_path / "project")


def start(project: Project, ref: str = "HEAD") -> base.Base:
    commit = base.resolve(ref, project.root)
    return base.Base(commit, "cpu", torch.device("cpu"), project.root)


def test_a_run_compares_this_tree_with_a_slower_commit(project: Project) -> None:
    """Through pytest itself: who is run, the table, and the rows that are kept."""
    project.write("collavo_kernels/__init__.py", SLOW)
    sha = project.commit()
    project.write("collavo_kernels/__init__.py", FAST)
    now = project.commit()
    options = ("--base", "HEAD~1", "--save-results")
    result = project.bench("benchmarks", "--benchmark-only", *options)
    assert result.returncode == 0, result.stdout + result.stderr
    # Our two rows once each: peers are left out, and the turns are between the commits.
    assert "2 passed, 10 deselected" in result.stdout
    assert re.search(r"\| case +\| mode .*\| here .*\| base .*\| here / base", result.stdout)
    assert f"base: HEAD~1, {sha[:7]}; its csrc is this tree's" in result.stdout
    for op in ("total", "turns"):
        path = project.root / "benchmarks" / "results" / "tiny" / f"{op}.csv"
        found = {row.provider: row for row in report.read_csv(path)}
        assert set(found) == {"ours", "base:ours"}
        here, there = found["ours"], found["base:ours"]
        assert there.p50_ms > 2.0 > here.p50_ms
        assert (here.commit, there.commit) == (now[:7], sha[:7])
        assert here.error is not None and there.error is None
    assert project.git("worktree", "list").count("\n") == 0
    assert project.git("status", "--porcelain") == "?? benchmarks/results/"


def test_what_cannot_be_compared_is_said_in_one_line(project: Project) -> None:
    with pytest.raises(base.BaseError, match=r"--base HEAD: .* is not a git checkout"):
        base.resolve("HEAD", project.root)
    project.commit()
    base.require_committed(project.root)
    project.write("benchmarks/results/tiny/total.csv", "a run before this one kept it")
    base.require_committed(project.root)
    project.write("csrc/total.cpp", "two\n")
    words = r"1 files have changes that are not committed \(csrc/total.cpp, ...\)"
    with pytest.raises(base.BaseError, match=words):
        base.require_committed(project.root)
    result = project.bench("benchmarks", "--benchmark-only", "--base", "no-such-branch")
    assert result.returncode == 4
    (line,) = result.stderr.strip().splitlines()
    assert line.startswith("ERROR: --base no-such-branch: no such commit here; expected a branch")


def test_only_changed_files_are_written_and_modules_are_built_once(project: Project) -> None:
    """The same C++ sources: this tree's modules are copied; others: the commit's own are built."""
    module = f"collavo_kernels/_C{SUFFIX}"
    project.write("collavo_kernels/gone.py", "")
    project.commit()
    project.write(module, "built here")
    tree = project.root / "build" / "base" / "tree"
    with start(project) as process:
        assert process.note.startswith("its csrc is this tree's")
        assert (tree / module).read_text() == "built here"
    assert (tree / "collavo_kernels" / "gone.py").exists()
    kept = (tree / "csrc" / "total.cpp").stat().st_mtime_ns
    assert not (tree / "benchmarks").exists()  # they would hide this tree's

    (project.root / "collavo_kernels" / "gone.py").unlink()
    project.commit()
    project.write("csrc/total.cpp", "two\n")
    with start(project) as process:
        assert process.note == "its csrc is another: built"
        assert (tree / module).read_text() == "built of one\n"
    assert (tree / "csrc" / "total.cpp").stat().st_mtime_ns == kept
    assert not (tree / "collavo_kernels" / "gone.py").exists()
    assert (project.root / module).read_text() == "built here"


def test_a_commit_that_does_not_build_says_why(project: Project) -> None:
    project.write("csrc/total.cpp", "broken\n")
    project.commit()
    project.write("csrc/total.cpp", "mended\n")
    result = project.bench("benchmarks", "--benchmark-only", "--base", "HEAD")
    assert result.returncode == 4
    (line,) = [line for line in result.stdout.splitlines() if "--base" in line]
    assert "--base HEAD: its modules do not build: total.cpp: this does not compile" in line


def test_a_commit_that_does_not_start_says_why(project: Project) -> None:
    project.write("collavo_kernels/__init__.py", "raise ValueError('nothing here')\n")
    project.commit()
    with pytest.raises(base.BaseError, match="its process ended: ValueError: nothing here"):
        start(project)


def test_the_protocol_names_rows_times_them_and_ends(project: Project) -> None:
    project.commit()
    process = start(project)
    with pytest.raises(base.BaseError, match="another run uses"):
        start(project)
    process.prepare(OURS)
    times = process.stretch(0.01)
    assert times and all(0 < each < 1 for each in times)
    for row, reason in (
        (replace(OURS, provider="absent"), "not installed"),
        (replace(OURS, provider="nobody"), "total: no row fwd-n=8-nobody on cpu"),
    ):
        with pytest.raises(Unavailable, match=reason):
            process.prepare(row)
    with pytest.raises(base.BaseError, match="before a row was named"):
        process.stretch(0.01)
    child = process._process
    process.close()
    assert child.returncode == 0
    with start(project):  # and the folder is free again
        pass


def test_a_commit_that_lacks_what_a_row_needs_skips_it(project: Project) -> None:
    project.write("collavo_kernels/__init__.py", "def other(x):\n    return x\n")
    project.commit()
    missing = pytest.raises(Unavailable, match=r"at \w{7}: AttributeError: .*'total'")
    with start(project) as process, missing:
        process.prepare(OURS)


def test_a_process_that_dies_is_said_at_once(project: Project) -> None:
    project.commit()
    with start(project) as process:
        process._process.kill()
        process._process.wait()
        with pytest.raises(base.BaseError, match="--base HEAD: its process ended"):
            process.prepare(OURS)


def test_sides_take_turns_and_who_begins_alternates() -> None:
    order: list[str] = []

    def side(name: str) -> timing.Stretch:
        def stretch(seconds: float) -> list[float]:
            assert seconds == pytest.approx(1.0 / timing.BASE_TURNS)
            order.append(name)
            return [float(len(order))]

        return stretch

    here, there = timing.take_turns(side("h"), side("b"), 1.0)
    assert "".join(order) == "hbbh" * (timing.BASE_TURNS // 2)
    assert len(here) == len(there) == timing.BASE_TURNS and here[0] == [1.0] and there[0] == [2.0]


def test_long_calls_take_fewer_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    """As many that each side begins as often, and no more than that many budgets."""
    clock = iter(range(1000))
    monkeypatch.setattr(timing.time, "perf_counter", lambda: float(next(clock)))
    here, there = timing.take_turns(lambda seconds: [1.0], lambda seconds: [1.0], 1e-3)
    assert len(here) == len(there) == timing.LEAST_BASE_TURNS and len(here) % 2 == 0


def test_ratios_are_of_turns_beside_each_other() -> None:
    """A busy moment that meets one turn of both sides changes no ratio but its own."""
    here, there = [[1.0, 1.0], [40.0], [1.0]], [[2.0, 2.0], [50.0], [2.5]]
    pair = comparison.Pair(OURS, "float32", here, there)
    assert pair.ratios == pytest.approx((0.44, 0.5, 0.68))
    (_, _, line) = comparison.table([pair]).splitlines()
    assert "ours" in line and "0.500" in line and "0.440 - 0.680" in line


def test_rows_of_a_base_do_not_pass_for_ours() -> None:
    """Kept beside ours they are found neither by the goals nor by the page."""
    provider = f"{comparison.BASE}ours:cpu"
    assert not replace(OURS, provider=provider).is_ours
    for goal in (goal for some in goals.GOALS.values() for goal in some):
        measured = SimpleNamespace(
            provider=provider, case=goal.case, mode=goal.mode, isa=goal.isa, threads=goal.threads
        )
        assert goals.check(goal, [measured]).state == goals.NOT_MEASURED
        assert results_tables.fastest([measured], goal.case, goal.mode, results_tables.OURS) is None
