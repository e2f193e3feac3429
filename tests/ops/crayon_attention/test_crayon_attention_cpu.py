"""The CPU kernels beyond one block: long and ragged samples, threads, memory, large scores."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from benchmarks.memory import peak_megabytes
from collavo_kernels import crayon_attention
from collavo_kernels._native import ISA_CODES, native
from collavo_kernels.ops.crayon_attention import cpu, reference
from collavo_kernels.ops.crayon_attention.inputs import AttentionInputs, BackwardInputs
from collavo_kernels.testing import assert_within_budget, poisoned_empty
from collavo_kernels.testing.crayon_attention_cases import AttentionCase

pytestmark = pytest.mark.skipif(native() is None, reason="the compiled module is not there")

LEAVES = ("q", "k", "v", "crayon_q", "crayon_k", "crayon_v")
LONG = (
    AttentionCase(
        "ragged",
        "blocks, groups and panels that begin and end anywhere; query heads that are split",
        length=531,
        heads=4,
        groups=2,
        images=((3, 400),),
        rows=9,
        ranges=((37, 531), (0, 402)),
    ),
    AttentionCase(
        "ragged band",
        "a window that begins within a block, rows of it that a part of a panel sees",
        length=531,
        heads=2,
        groups=1,
        images=((0, 531),),
        rows=3,
        ranges=((129, 531), (5, 389)),
        window=143,
    ),
    AttentionCase(
        "both directions",
        "every key, and a last block that is not whole",
        length=301,
        heads=2,
        groups=2,
        batch=1,
        causal=False,
        images=((5, 250),),
    ),
    AttentionCase(
        "band in both directions",
        "keys behind the query as well",
        length=301,
        heads=2,
        groups=1,
        batch=1,
        causal=False,
        window=40,
        images=((5, 250),),
    ),
    AttentionCase(
        "many samples",
        "as many key heads as keep the threads busy: nothing is split, workers keep dk and dv",
        batch=9,
        length=140,
        heads=4,
        groups=2,
        images=((3, 100),),
    ),
)


def converted(inputs: AttentionInputs, dtype: torch.dtype) -> AttentionInputs:
    return AttentionInputs(
        *(x.to(dtype) if isinstance(x, Tensor) and x.is_floating_point() else x for x in inputs)
    )


def everything(inputs: AttentionInputs, run: object, grad: Tensor) -> dict[str, Tensor]:
    """Forward and backward by a backend's own functions, with gradients through key and value."""
    found = run.forward(inputs)  # type: ignore[attr-defined]
    prepared = inputs._replace(k=found.key, v=found.value)
    given = BackwardInputs(
        grad.to(inputs.q.dtype),
        found.key,
        found.value,
        prepared,
        found.out,
        found.lse,
        (True,) * 6,  # type: ignore[arg-type]
    )
    gradients = run.backward(given)  # type: ignore[attr-defined]
    names = (*found._fields[:3], *(f"d{name}" for name in LEAVES))
    return dict(zip(names, (*found[:3], *gradients), strict=True))


@pytest.mark.parametrize("isa", native().isas() if native() else ())
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", LONG, ids=lambda c: c.name)
def test_long_samples(
    case: AttentionCase, dtype: torch.dtype, isa: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Against float64 of the same inputs, with the reference in this dtype as the budget."""
    monkeypatch.setattr(cpu, "_BEST_ISA", ISA_CODES[isa])
    inputs = case.make(dtype)
    grad = torch.randn(inputs.q.shape, generator=torch.Generator().manual_seed(1))
    grad = grad.to(dtype)
    exact = everything(converted(inputs, torch.float64), reference, grad)
    honest = everything(inputs, reference, grad)
    with poisoned_empty():
        found = everything(inputs, cpu, grad)
    for name, value in found.items():
        assert_within_budget(value, honest[name], exact[name], name=name)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", LONG, ids=lambda c: c.name)
def test_same_bits_for_any_number_of_threads(case: AttentionCase, dtype: torch.dtype) -> None:
    """Cut among one, two and three workers, and again: nothing but the shapes orders a sum."""
    inputs = case.make(dtype)
    grad = torch.randn(inputs.q.shape, generator=torch.Generator().manual_seed(1))
    threads, found = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3, 3):
            torch.set_num_threads(count)
            found.append(everything(inputs, cpu, grad))
    finally:
        torch.set_num_threads(threads)
    for other in found[1:]:
        for name, value in found[0].items():
            assert torch.equal(other[name], value), name


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
def test_memory_grows_with_the_length_alone(backward: bool) -> None:
    """Twice the tokens take about twice the memory: no S x S tensor, no crayon per token.

    Four times would be a square; what does not grow makes it less than two. A dense crayon of the
    queries alone would be as large as q.
    """
    peaks = []
    for length in (512, 1024):
        case = AttentionCase(
            "long", "", 1, length, heads=8, groups=2, size=64, images=((5, length),)
        )
        inputs = case.make(torch.bfloat16, gradients=backward)
        options = dict(zip(inputs._fields[3:], inputs[3:], strict=True))
        leaves = [getattr(inputs, name) for name in LEAVES]

        def step(
            inputs: AttentionInputs = inputs,
            options: dict[str, object] = options,
            leaves: list[Tensor] = leaves,
        ) -> None:
            out = crayon_attention(inputs.q, inputs.k, inputs.v, **options, backend="cpu").out
            if backward:
                torch.autograd.grad(out, leaves, torch.ones_like(out))

        peaks.append(peak_megabytes(step, torch.device("cpu")))
    assert peaks[1] < 2.1 * peaks[0]
    one_head_square = 1024**2 * 2 / 1e6
    assert peaks[1] < 8 * one_head_square


def test_infinite_scores_are_pytorchs() -> None:
    """Infinities in q give NaN where PyTorch gives NaN, and leave the other rows alone."""
    inputs = AttentionCase("inf", "", 1, 40, heads=1, groups=1, size=16, tables="").make(
        torch.float32
    )
    inputs.q[0, 7, 0, 3] = float("inf")
    expected, found = reference.forward(inputs).out, cpu.forward(inputs).out
    assert torch.equal(found.isnan(), expected.isnan())
    assert bool(found.isnan().any())
    rows = ~expected.isnan().any(-1)
    torch.testing.assert_close(found[rows], expected[rows])


def test_large_scores_do_not_overflow() -> None:
    """A softmax of scores of thousands is the largest score's value."""
    q = torch.full((1, 33, 1, 16), 100.0)
    k = torch.full((1, 33, 1, 16), -100.0)
    k[0, 4] = 100.0
    v = torch.arange(33.0)[None, :, None, None].expand(1, 33, 1, 16)
    out = crayon_attention(q, k, v, backend="cpu").out
    assert bool((out[0, 4:] == 4.0).all()) and bool(out.isfinite().all())


def test_more_threads_than_work() -> None:
    """A worker has at least one item and a million products; an empty share is never run."""
    case = AttentionCase("small", "", 1, 3, heads=1, groups=1, size=2, rows=1, images=((0, 2),))
    inputs = case.make(torch.float32)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(7)
        found = everything(inputs, cpu, torch.ones_like(inputs.q))
    finally:
        torch.set_num_threads(threads)
    for name, value in everything(inputs, reference, torch.ones_like(inputs.q)).items():
        torch.testing.assert_close(found[name], value)


def test_head_dims_above_the_largest_go_to_the_reference() -> None:
    inputs = AttentionCase("wide", "", 1, 3, heads=1, groups=1, size=258, tables="").make(
        torch.float32
    )
    assert "256" in (cpu.declines(inputs) or "")
    assert crayon_attention(inputs.q, inputs.k, inputs.v, cos=inputs.cos, sin=inputs.sin).out.shape
    with pytest.raises(ValueError, match=r"'cpu' cannot serve .* head dims up to 256"):
        crayon_attention(inputs.q, inputs.k, inputs.v, backend="cpu")
