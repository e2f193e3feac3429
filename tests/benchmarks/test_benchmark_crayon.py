"""The benchmark of crayon_attention: its work, its exact results, its providers, and the goals."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from benchmarks import goals, machine, report
from benchmarks.ops import crayon_attention_cases as cases
from benchmarks.ops import crayon_attention_providers as providers
from benchmarks.ops.crayon_attention_cases import SHAPES, Shape, names
from collavo_kernels._native import native
from collavo_kernels.testing import relative_error

CPU = torch.device("cpu")
TINY = Shape(2, 24, 4, 2, 16, 12, 3, torch.float32)


@pytest.fixture(autouse=True, params=[False, True], ids=["whole", "padded"])
def _tiny_case(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setitem(SHAPES, "tiny", TINY._replace(padded=request.param))
    yield
    cases.make.cache_clear()
    cases.exact.cache_clear()


@pytest.mark.parametrize("provider", [n for n in names("cpu") if not n.startswith("compile")])
def test_a_provider_computes_what_it_is_held_against(provider: str) -> None:
    """Outputs and gradients in float32 against float64, of the operator or of attention alone."""
    if provider.endswith(":cpu") and native() is None:
        pytest.skip("the cpu backend does not serve here")
    inputs, call = cases.make("tiny", CPU), providers.PROVIDERS[provider]
    given = cases.alone(inputs) if providers.is_alone(provider) else inputs
    out = call(inputs)
    gradients = torch.autograd.grad(out, cases.leaves(given), cases.upstream(inputs))
    assert providers.error_of(out, "tiny", provider, CPU) < 1e-5
    assert providers.error_of(gradients, "tiny", provider, CPU) < 1e-4


def test_the_float64_results_are_the_operators() -> None:
    inputs = cases.make("tiny", CPU)
    wide = inputs._replace(
        **{
            n: x.detach().double().requires_grad_(n not in ("cos", "sin"))
            for n in (*cases.LEAVES, "cos", "sin")
            if (x := getattr(inputs, n)) is not None
        }
    )
    out = providers.PROVIDERS["reference"](wide)
    grad = cases.upstream(inputs).double()
    gradients = torch.autograd.grad(out, cases.leaves(wide), grad)
    exact = cases.exact("tiny", CPU, crayon=True, gradients=True)
    assert relative_error(out, exact.out) < 1e-12
    for found, wanted in zip(gradients, exact.gradients, strict=True):
        assert relative_error(found, wanted) < 1e-12


def test_the_work_is_that_of_the_causal_half() -> None:
    """q k^T and p v, two operations each, over half of the square; a backward has five more."""
    square = TINY.batch * TINY.heads * TINY.length**2 * TINY.head_dim
    assert TINY.flops("fwd") == 2 * 2 * square / 2
    assert TINY.flops("fwd+bwd") == 7 * 2 * square / 2
    moved = 2 * TINY.batch * TINY.length * (TINY.heads + 2 * TINY.kv_heads) * TINY.head_dim * 2
    assert TINY.bytes("fwd", 2) == moved


def row(provider: str, milliseconds: float, **changes: Any) -> report.Measurement:
    made = report.Measurement(
        op="crayon_attention",
        provider=provider,
        mode="fwd",
        case="7b/s1325/g8/b1",
        dtype="bfloat16",
        p20_ms=milliseconds,
        p50_ms=milliseconds,
        p80_ms=milliseconds,
        gb_per_s=1.0,
        gflop_per_s=1.0,
        roof=0.5,
        peak_mb=10.0,
        error=1e-3,
        config_json="{}",
        **machine.facts(CPU),  # type: ignore[arg-type]
    )
    return dataclasses.replace(made, **{"isa": "avx512", "threads": 1, **changes})


@pytest.mark.parametrize(("ours", "state"), [(104.0, "met"), (106.0, "not met")])
def test_a_price_is_met_by_at_most_so_much(ours: float, state: str) -> None:
    price = next(g for g in goals.GOALS["crayon_attention"] if g.metric == "price")
    rows = [row("ours:cpu", ours), row("ours-alone:cpu", 100.0), row("eager", 400.0)]
    outcome = goals.check(price, rows)
    assert outcome.state == state and outcome.found == pytest.approx(ours / 100)
    assert "at most 1.05x the time of our own attention" in goals.table([outcome])


def test_the_fastest_of_several_libraries_is_the_peer() -> None:
    goal = next(g for g in goals.GOALS["crayon_attention"] if g.peer == "sdpa-alone")
    on_gpu = {"isa": "", "case": goal.case, "mode": goal.mode}
    rows = [
        row(goal.ours, 12.0, **on_gpu),
        row("sdpa-alone", 20.0, **on_gpu),
        row("sdpa-alone:cudnn", 10.0, **on_gpu),
    ]
    assert goals.check(goal, rows).found == pytest.approx(1.2)
