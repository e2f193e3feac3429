"""The benchmark of qlora_linear: its work, its float64 results, its providers, and the goals."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import caches, goals, machine, report
from benchmarks.ops import qlora_linear_cases as cases
from benchmarks.ops import qlora_linear_providers as bench
from benchmarks.ops.qlora_linear_cases import Case
from collavo_kernels import LoRAAdapter, qlora_linear
from collavo_kernels.testing import relative_error

ROOT = Path(__file__).resolve().parents[2]

CPU = torch.device("cpu")
SMALL = Case(k=128, n=96, m=3, rank=16)


def row(provider: str, **changes: Any) -> report.Measurement:
    made = report.Measurement(
        op="qlora_linear",
        provider=provider,
        mode="fwd",
        case="4096x4096/m1/r64",
        dtype="bfloat16",
        p20_ms=1.0,
        p50_ms=1.0,
        p80_ms=1.0,
        gb_per_s=1.0,
        gflop_per_s=1.0,
        roof=0.5,
        peak_mb=10.0,
        error=1e-3,
        config_json="{}",
        **machine.facts(CPU),  # type: ignore[arg-type]
    )
    return dataclasses.replace(made, **{"isa": "avx512", "threads": 1, **changes})


def test_the_work_is_the_least_that_the_operator_needs() -> None:
    """A weight of half a byte and 1/64, two adapters, x and y, in bytes and products by hand."""
    case = Case(k=128, n=64, m=2, rank=16)
    weight, factors, tokens = 64 * 128 // 2 + 128, 2 * 2 * 16 * (64 + 128), 2 * 2 * (64 + 128)
    assert case.bytes("fwd", "ours:cpu") == weight + factors + tokens
    assert case.bytes("fwd", "bitsandbytes") == weight + tokens
    assert case.bytes("fwd", "peft-fp32-adapters") == weight + 2 * factors + tokens
    assert case.flops("fwd", "ours:cpu") == 2 * 2 * 64 * 128 + 2 * (2 * 2 * 16 * (64 + 128))
    assert case.flops("fwd", "dense") == 2 * 2 * 64 * 128
    # Backward: g W, and for each adapter g B, h A, h^T x, g^T (A x).
    per_adapter = 2 * 2 * 16 * (64 + 128)
    assert case.flops("fwd+bwd", "peft") == 2 * (2 * 2 * 64 * 128) + 2 * 3 * per_adapter


def test_the_float64_results_are_the_operators() -> None:
    x, grad = (each.double() for each in cases.tokens(SMALL, CPU))
    given = cases.weights(SMALL.k, SMALL.n, SMALL.rank, CPU)
    adapters = [
        LoRAAdapter(a.double().requires_grad_(), b.double().requires_grad_(), scaling)
        for a, b, scaling in given.adapters
    ]
    x.requires_grad_()
    y = qlora_linear(x, given.nf4, adapters, backend="reference")
    leaves = [x, *(factor for a, b, _ in adapters for factor in (a, b))]
    gradients = torch.autograd.grad(y, leaves, grad)
    exact = cases.exact(SMALL, CPU, dense=False, adapted=True, gradients=True)
    for found, wanted in zip(
        (y.detach(), *gradients), (exact.y, *exact.dx, *exact.factors), strict=True
    ):
        assert relative_error(found, wanted) < 1e-12


@pytest.mark.parametrize("mode", ["fwd", "fwd-grad", "fwd+bwd"])
@pytest.mark.parametrize(
    "provider",
    [
        "ours:cpu",
        "ours:cpu-fp32-adapters",
        "reference",
        "bitsandbytes",
        "peft",
        "peft-fp32-adapters",
        "dense",
        "dense+lora",
        "dequantize+lora",
    ],
)
def test_every_provider_computes_what_its_error_is_measured_against(
    monkeypatch: pytest.MonkeyPatch, provider: str, mode: str
) -> None:
    """All have bfloat16 products: a forgotten adapter, scaling or gradient is far beyond 5 %."""
    if provider.startswith(("bitsandbytes", "peft", "dequantize+lora")):
        pytest.importorskip("bitsandbytes")
        pytest.importorskip("peft")
    monkeypatch.setattr(caches, "copies_past_cache", lambda size, device: 2)
    training = mode != "fwd"
    x, grad = cases.tokens(SMALL, CPU)
    x = x.detach().requires_grad_(training)
    with torch.set_grad_enabled(training):
        copies = bench.layers(SMALL, provider, training, x)
        for call in bench.calls(mode, copies, x, grad):
            assert bench.error_of(call(), mode, provider, SMALL, CPU) < 0.05
    wide = provider.endswith("-fp32-adapters")
    assert {leaf.dtype for leaf in copies[0].leaves} <= {torch.float32 if wide else torch.bfloat16}


def test_what_is_compiled_is_the_reference() -> None:
    given = cases.weights(SMALL.k, SMALL.n, SMALL.rank, CPU)
    x, _ = cases.tokens(SMALL, CPU)
    plain = bench.reference_forward(x, given.nf4, given.adapters)
    assert torch.equal(plain, qlora_linear(x, given.nf4, given.adapters, backend="reference"))


def test_goals_are_read_from_the_rows_of_one_thread_and_instruction_set() -> None:
    rows = [
        row("ours:cpu", roof=0.9),
        row("ours:int8", p50_ms=0.1),  # another work: no goal of the operator
        row("bitsandbytes", p50_ms=1.2),
        row("peft", p50_ms=4.0),
        row("peft", p50_ms=400.0, threads=2),
        row("ours:cpu", isa="avx2", p50_ms=2.0),
        row("bitsandbytes", isa="avx2", p50_ms=50.0),
    ]
    found = {
        (goal.what, goal.isa): goals.check(goal, rows)
        for goal in goals.GOALS["qlora_linear"]
        if goal.case == "4096x4096/m1/r64" and goal.mode == "fwd"
    }
    states = {key: (each.found, each.state) for key, each in found.items() if each.found}
    assert states == {
        ("bitsandbytes, base only", "avx512"): (1.2, "not met"),
        ("PEFT + bitsandbytes", "avx512"): (4.0, "met"),
        ("of the read bandwidth", "avx512"): (0.9, "met"),
        ("bitsandbytes, no AVX-512", "avx2"): (25.0, "met"),
    }
    assert any(each.state == goals.NOT_MEASURED for each in found.values())  # the GPU's


def test_goals_by_the_hosts_clock_are_read_from_its_column() -> None:
    goal = next(g for g in goals.GOALS["qlora_linear"] if g.metric == "host")
    rows = [
        row("ours:triton", isa="", p50_ms=0.1, wall_ms=0.4),
        row("ours:cuda", isa="", p50_ms=0.5, wall_ms=0.2),
        row("peft", isa="", p50_ms=5.0, wall_ms=1.0),
    ]
    assert goals.check(goal, rows).found == 5.0
    assert goals.check(goal, rows).row == rows[1]
    assert goals.check(goal, rows[:2]).found is None
    assert goals.check(dataclasses.replace(goal, metric="speed"), rows).found == 50.0


def test_goals_print_a_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report.save([row("ours:cpu"), row("peft", p50_ms=3.5)], tmp_path)
    (folder,) = tmp_path.iterdir()
    assert goals.main([str(folder)]) == 0
    printed = capsys.readouterr().out
    assert "2.20x the speed of PEFT + bitsandbytes | 3.50x | met |" in printed
    assert "not measured here" in printed
    assert goals.main([str(tmp_path)]) == 1


def test_without_avx512_torch_and_kernels_both_do_without() -> None:
    """``--isa avx2`` comes early enough, and each provider runs once with timing off."""
    command = [sys.executable, "-m", "pytest", "benchmarks/bench_qlora_linear.py", "-q"]
    only = "fwd-4096x4096/m1/r64-dense-"
    result = subprocess.run(
        [*command, "--benchmark-disable", "--isa=avx2", "--device=cpu", "--threads=1", "-k", only],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert "1 passed" in result.stdout
