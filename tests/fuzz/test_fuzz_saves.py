"""A few random kills and full disks, always the same ones, in a process that may fork."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="the work is done in forked processes")
def test_nothing_is_lost_or_half_there() -> None:
    command = [sys.executable, "-m", "tests.fuzz.fuzz_saves", "--cases", "12", "--seed", "1"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "12 cases, 0 faults" in done.stdout
