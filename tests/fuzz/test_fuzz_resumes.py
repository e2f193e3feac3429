"""A few random kills of training runs, always the same ones, in a process that may fork."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="the work is done in forked processes")
def test_a_killed_run_ends_as_if_it_had_not_been() -> None:
    """One of two processes: the dense decoder, and adapters over 4 bits; trained tensors alone."""
    words = ["--kills", "3", "--kinds", "instruct", "instruct nf4", "--processes", "2"]
    command = [sys.executable, "-m", "tests.fuzz.fuzz_resumes", *words]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "6 kills, 0 faults" in done.stdout
