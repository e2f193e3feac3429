"""Run every Triton kernel on the CPU through Triton's interpreter.

The interpreter is chosen when a kernel is defined, so it needs a process of its own: each file in
``interpreted/`` is run by a fresh pytest with ``TRITON_INTERPRET=1``, and its report is shown when
it fails.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="triton is not installed")

FOLDER = Path(__file__).parent / "interpreted"


@pytest.mark.parametrize("name", sorted(p.stem for p in FOLDER.glob("interpreted_*.py")))
def test_interpreted(name: str) -> None:
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-x",
        "-p",
        "no:cacheprovider",
        f"{FOLDER}/{name}.py",
    ]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, f"{done.stdout[-6000:]}\n{done.stderr[-2000:]}"
    assert " passed" in done.stdout, "the interpreter run collected no test"
