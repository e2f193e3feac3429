"""mypy sees the seam between an operator and its backends: a slip there does not wait for a run."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
HEAD = """
from torch import Tensor
from collavo_kernels._backends import Backend
from collavo_kernels.ops.crayon_attention import cpu, reference
from collavo_kernels.ops.crayon_attention.inputs import *
from collavo_kernels.ops.crayon_attention.registration import OPERATOR
from collavo_kernels.ops.qlora_linear.inputs import QLoRAInputs, QLoRAResult


def of_another(inputs: QLoRAInputs) -> QLoRAResult: ...


def without_wanted(
    inputs: AttentionInputs, saved: AttentionSaved, grads: AttentionOutputGrads
) -> Gradients: ...


def returns_a_tuple(inputs: AttentionInputs) -> tuple[Tensor, Tensor, Tensor, Tensor]: ...


def right(inputs: AttentionInputs) -> AttentionResult: ...


"""
SLIPS = {
    "another operator's forward": "OPERATOR.backends = (Backend('x', of_another),)",
    "a backward without wanted": "OPERATOR.backends = (Backend('x', right, without_wanted),)",
    "a forward without names": "OPERATOR.backends = (Backend('x', returns_a_tuple),)",
    "a field that is not there": "OPERATOR.reference.forward(OPERATOR.inputs()).outt",
    "a call without a bundle": "OPERATOR(1, 2)",
}


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("mypy") is None, reason="mypy is not installed")
def test_slips_at_the_seam_are_type_errors(tmp_path: Path) -> None:
    good = "OPERATOR.backends = (Backend('x', right, reference.backward),)"
    file = tmp_path / "slips.py"
    file.write_text(HEAD + "\n".join([good, *SLIPS.values()]) + "\n")
    command = [sys.executable, "-m", "mypy", "--no-error-summary", "--cache-dir", str(tmp_path)]
    command += ["--config-file", str(ROOT / "pyproject.toml"), str(file)]
    found = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
    lines = {
        int(line.split(":")[1])
        for line in found.stdout.splitlines()
        if line.startswith(str(file)) and ": error:" in line
    }
    first = HEAD.count("\n") + 1
    assert first not in lines, found.stdout
    for i, why in enumerate(SLIPS, start=1):
        assert first + i in lines, f"{why}: {found.stdout}"
