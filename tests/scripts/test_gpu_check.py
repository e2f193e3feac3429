"""scripts/gpu_check.sh without a GPU: limits hold, kills keep what there is, six files at most.

Python is replaced by a program that does what each step's would leave, so all of it takes seconds.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "scripts/gpu_check.sh"
STEPS = ROOT / "scripts/gpu_steps.sh"
FILES = {"rows.jsonl", "table.md", "tests.xml", "log.txt", "profile.txt", "rest.tar.xz"}

pytestmark = pytest.mark.skipif(
    not shutil.which("bash") or not shutil.which("timeout"), reason="needs bash and timeout"
)


def steps(folder: Path, body: str, total: int, grace: int = 1) -> tuple[str, float]:
    """Run steps; return the summary's lines and the seconds they took."""
    script = folder / "steps.sh"
    script.write_text(
        f"total={total} reserve=0 grace={grace} work={folder} summary={folder}/summary\n"
        f". {STEPS}\n{body}\n"
    )
    start = time.monotonic()
    subprocess.run(["bash", str(script)], capture_output=True, timeout=60, check=False)
    return (folder / "summary").read_text(), time.monotonic() - start


def test_steps_never_take_more_than_all_may(tmp_path: Path) -> None:
    """The second is cut to what the first has left, the third has nothing left."""
    body = "step one 2 sleep 30\nstep two 90 sleep 30\nstep three 90 sleep 30\nexit $failed"
    said, seconds = steps(tmp_path, body, total=6)
    assert seconds < 7
    assert "one: STOPPED after 2 s" in said
    assert "two: STOPPED" in said and "after 90 s" not in said
    assert "three: LEFT OUT: no time is left" in said


def test_other_steps_than_those_asked_for_are_left_out(tmp_path: Path) -> None:
    """A GPU that is lent for minutes may be asked for one part again."""
    said, _ = steps(tmp_path, "only=,b,\nstep a 5 echo x\nstep b 5 echo y", total=30)
    assert "a: " not in said and "b: ok" in said


def test_what_does_not_heed_an_interrupt_is_killed(tmp_path: Path) -> None:
    said, seconds = steps(tmp_path, "step deaf 1 bash -c \"trap '' INT; sleep 30; sleep 30\"", 20)
    assert "deaf: STOPPED after 1 s" in said and seconds < 8


def test_states_are_told_apart(tmp_path: Path) -> None:
    body = (
        "step good 5 echo fine\nstep bad 5 sh -c 'echo reason; exit 3'\nstep none 5 sh -c 'exit 5'"
    )
    said, _ = steps(tmp_path, body, total=30)
    assert "good: ok in" in said and ": fine" in said
    assert "bad: FAILED (3): reason" in said and "none: nothing to run" in said


def test_an_interrupted_pytest_writes_its_report(tmp_path: Path) -> None:
    """Even where the script runs in the background, where shells ignore interrupts."""
    (tmp_path / "test_two.py").write_text(
        "import time\ndef test_quick(): pass\ndef test_slow(): time.sleep(60)\n"
    )
    pytest_ = f"{sys.executable} -m pytest -q -p no:cacheprovider {tmp_path}/test_two.py"
    inner = tmp_path / "inner"
    inner.mkdir()
    body = f"step tests 15 {pytest_} --junitxml {tmp_path}/tests.xml"
    script = inner / "steps.sh"
    script.write_text(
        f"total=40 reserve=0 grace=5 work={inner} summary={inner}/summary\n. {STEPS}\n{body}\n"
    )
    subprocess.run(["bash", "-c", f"bash {script} & wait"], timeout=60, check=False)
    assert "tests: STOPPED after 15 s" in (inner / "summary").read_text()
    assert 'name="test_quick"' in (tmp_path / "tests.xml").read_text()


def stand_in(folder: Path, numbers: str) -> Path:
    """A program in Python's place: what each step leaves, and ``numbers`` where it measures."""
    program = folder / "python"
    program.write_text(
        "#!/usr/bin/env bash\n"
        f'echo "$@" >>{folder}/calls\n'
        'case "$*" in\n'
        f"  *--rows*) {numbers} ;;\n"
        "  *benchmarks.report*) echo '# a table' ;;\n"
        '  *--junitxml*) while [ "$1" != --junitxml ]; do shift; done; echo "<xml/>" >"$2" ;;\n'
        "esac\n"
    )
    program.chmod(0o755)
    return program


def check(
    folder: Path, numbers: str, *options: str, path: str = ""
) -> tuple[subprocess.CompletedProcess[str], Path]:
    """Run the script with the program in Python's place."""
    results = folder / "results"
    environment = {**os.environ, "PYTHON": str(stand_in(folder, numbers))}
    environment["PATH"] = path + environment["PATH"]
    done = subprocess.run(
        ["bash", str(SCRIPT), str(results), "--dry-run", *options],
        env=environment,
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    return done, results


ROWS = 'while [ "$1" != --rows ]; do shift; done; for i in 1 2 3; do echo "{}" >>"$2"; done'


def test_numbers_come_before_tests_and_six_files_are_left(tmp_path: Path) -> None:
    tools = tmp_path / "tools"
    tools.mkdir()
    for name in ("ncu", "compute-sanitizer"):
        (tools / name).write_text(f"#!/bin/sh\necho {name} says\n")
        (tools / name).chmod(0o755)
    done, results = check(tmp_path, ROWS, path=f"{tools}:")
    assert {path.name for path in results.iterdir()} == FILES, done.stdout + done.stderr
    assert (results / "rows.jsonl").read_text() == "{}\n" * 3
    assert (results / "table.md").read_text() == "# a table\n"
    profile = (results / "profile.txt").read_text()
    assert "ncu says" in profile and "compute-sanitizer says" in profile
    calls = (tmp_path / "calls").read_text()
    places = [calls.index(word) for word in ("gpu_smoke", "--rows", "--junitxml", "gpu_decode")]
    assert places == sorted(places)
    with tarfile.open(results / "rest.tar.xz") as archive:
        assert {"./smoke.txt", "./numbers.txt", "./tests.txt"} <= set(archive.getnames())


def test_numbers_that_are_stopped_are_kept(tmp_path: Path) -> None:
    """The limit comes while the fourth row is measured; tests have their turn all the same."""
    done, results = check(tmp_path, f"{ROWS}; exec sleep 90", "--total", "40")
    assert (results / "rows.jsonl").read_text() == "{}\n" * 3
    log = (results / "log.txt").read_text()
    assert "numbers: STOPPED after 10 s" in log and "tests: ok" in log
    assert done.returncode == 1 and (results / "table.md").exists()


def test_without_a_gpu_it_ends_well() -> None:
    done = subprocess.run(
        ["bash", str(SCRIPT)],
        env={**os.environ, "PYTHON": "false"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0 and "no NVIDIA GPU" in done.stdout


@pytest.mark.parametrize("options", [["--fast"], ["--total"], ["--total", "soon"]])
def test_options_that_it_does_not_know_are_errors(options: list[str]) -> None:
    done = subprocess.run(
        ["bash", str(SCRIPT), *options], capture_output=True, text=True, check=False
    )
    assert done.returncode == 2 and options[0] in done.stderr
