"""Every backend against float64, with the usual PyTorch's own error as the budget."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from collavo_kernels import crayon_attention
from collavo_kernels._native import ISA_CODES, native, native_reason
from collavo_kernels.ops.crayon_attention import cpu
from collavo_kernels.ops.crayon_attention.inputs import AttentionInputs
from collavo_kernels.testing import assert_within_budget
from collavo_kernels.testing.cases.crayon_attention import CASES, AttentionCase, eager

LEAVES = ("q", "k", "v", "crayon_q", "crayon_k", "crayon_v")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def call(inputs: AttentionInputs, backend: str) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v, *_ = inputs
    options = dict(zip(inputs._fields[3:], inputs[3:], strict=True))
    return tuple(crayon_attention(q, k, v, **options, backend=backend))


def with_gradients(inputs: AttentionInputs, results: tuple[Tensor, ...]) -> dict[str, Tensor]:
    """Outputs and the gradients of a random linear loss over all three of them, by name."""
    generator = torch.Generator().manual_seed(1)
    weights = [torch.randn(x.shape, generator=generator, dtype=torch.float64) for x in results]
    loss = sum((x * w.to(x.dtype)).sum() for x, w in zip(results, weights, strict=True))
    leaves = {n: getattr(inputs, n) for n in LEAVES if getattr(inputs, n) is not None}
    gradients = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)
    found = dict(zip(("out", "key", "value"), results, strict=True))
    for (name, leaf), gradient in zip(leaves.items(), gradients, strict=True):
        found[f"d{name}"] = torch.zeros_like(leaf) if gradient is None else gradient
    return found


def exact_and_honest(
    case: AttentionCase, dtype: torch.dtype
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The values in float64 from the low-precision inputs, and the usual PyTorch's."""
    low = case.make(dtype, gradients=True)
    honest = with_gradients(low, eager(low))
    high = AttentionInputs(
        *(
            x.detach().double().requires_grad_(x.requires_grad)
            if isinstance(x, Tensor) and x.is_floating_point()
            else x
            for x in low
        )
    )
    return with_gradients(high, call(high, "reference")), honest


def assert_cancels(value: Tensor, inputs: AttentionInputs, name: str) -> None:
    """A query that sees one key has gradients of exactly zero for q and k: dP - delta cancels.

    What is left is the rounding of the D products that cancel, each at most |dOut v k|; |dOut|
    stays below 5 for unit variance. Without a token the tables' gradients are zeros outright.
    """
    if inputs.q.numel() == 0:
        assert bool((value == 0).all()), name
        return
    largest = float(5 * inputs.v.detach().abs().max() * inputs.k.detach().abs().max())
    bound = torch.finfo(value.dtype).eps * inputs.q.shape[-1] * largest
    assert float(value.detach().abs().max()) <= bound, name


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_within_budget(case: AttentionCase, backend: str, dtype: torch.dtype) -> None:
    if backend == "cpu" and native() is None:
        pytest.skip(f"the cpu backend does not serve here: {native_reason()}")
    exact, honest = exact_and_honest(case, dtype)
    inputs = case.make(dtype, gradients=True)
    found = with_gradients(inputs, call(inputs, backend))
    assert found.keys() == exact.keys()
    for name, value in found.items():
        if value.numel() and float(exact[name].detach().abs().max()) < 1e-9:
            assert_cancels(value, inputs, name)
        else:
            assert_within_budget(value, honest[name], exact[name], name=name)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("isa", ["avx2", "baseline"])
@pytest.mark.parametrize(
    "name",
    [
        "plain",
        "head_dim_6",
        "head_dim_80",
        "long",
        "window_long",
        "padding_window",
        "window_not_causal",
        "negative_scale",
    ],
)
def test_other_instruction_sets_within_budget(
    name: str, isa: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Vectors of other lengths cut blocks and slabs at other places."""
    module = native()
    if module is None or isa not in module.isas():
        pytest.skip(f"no {isa} kernels here: {native_reason() or 'not built or not supported'}")
    monkeypatch.setattr(cpu, "BEST_ISA", ISA_CODES[isa])
    test_within_budget(next(c for c in CASES if c.name == name), "cpu", dtype)


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_reference_is_the_usual_formula(case: AttentionCase) -> None:
    """In float64 the reference and plain PyTorch share no code and agree to rounding."""
    inputs, others = (case.make(torch.float64, gradients=True) for _ in range(2))
    found = with_gradients(inputs, call(inputs, "reference"))
    usual = with_gradients(others, eager(others))
    for name, value in found.items():
        torch.testing.assert_close(value, usual[name], rtol=1e-12, atol=1e-12)
