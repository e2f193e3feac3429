"""The CPU kernels beyond one block: long and ragged samples, threads, memory, large scores."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from collavo_kernels import crayon_attention
from collavo_kernels._native import ISA_CODES, native
from collavo_kernels.ops.crayon_attention import OPERATOR, cpu, reference
from collavo_kernels.ops.crayon_attention.inputs import AttentionInputs
from collavo_kernels.testing import (
    assert_within_budget,
    backward_arguments,
    peak_megabytes,
    poisoned_empty,
)
from collavo_kernels.testing.cases.crayon_attention import AttentionCase

pytestmark = pytest.mark.skipif(native() is None, reason="the compiled module is not there")

LEAVES = ("q", "k", "v", "crayon_q", "crayon_k", "crayon_v")
LONG = (
    AttentionCase(
        "ragged",
        "blocks and key heads that begin and end anywhere; a query head per item",
        length=531,
        heads=4,
        kv_heads=2,
        head_dim=48,
        images=((3, 400),),
        rows=9,
        ranges=((37, 531), (0, 402)),
    ),
    AttentionCase(
        "ragged band",
        "a window that begins within a block, rows of it that a part of a block sees",
        length=531,
        heads=2,
        kv_heads=1,
        head_dim=80,
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
        kv_heads=2,
        batch=1,
        causal=False,
        images=((5, 250),),
    ),
    AttentionCase(
        "band in both directions",
        "keys behind the query as well",
        length=301,
        heads=2,
        kv_heads=1,
        batch=1,
        causal=False,
        window=40,
        images=((5, 250),),
    ),
    AttentionCase(
        "pairs of query heads",
        "LLaMA's grouping: eight key heads, each with two items of two query heads",
        batch=1,
        length=140,
        heads=32,
        kv_heads=8,
        images=((3, 100),),
    ),
    AttentionCase(
        "uneven shares",
        "nine key heads with five query heads: items of two and of three",
        batch=3,
        length=140,
        heads=15,
        kv_heads=3,
        images=((3, 100),),
    ),
    AttentionCase(
        "one key head",
        "multi-query: sixteen items of two query heads add to one dk and dv",
        batch=1,
        length=140,
        heads=32,
        kv_heads=1,
        images=((3, 100),),
    ),
    AttentionCase(
        "many samples",
        "as many key heads as keep the threads busy: nothing is split, workers keep dk and dv",
        batch=9,
        length=140,
        heads=4,
        kv_heads=2,
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
    grads = (grad.to(inputs.q.dtype), found.key, found.value)
    gradients = run.backward(*backward_arguments(OPERATOR, inputs, found, grads))  # type: ignore[attr-defined]
    names = (*found._fields, *(f"d{name}" for name in LEAVES))
    return dict(zip(names, (*found, *gradients), strict=True))


@pytest.mark.parametrize("isa", native().isas() if native() else ())
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", LONG, ids=lambda c: c.name)
def test_long_samples(
    case: AttentionCase, dtype: torch.dtype, isa: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Against float64 of the same inputs, with the reference in this dtype as the budget."""
    monkeypatch.setattr(cpu, "BEST_ISA", ISA_CODES[isa])
    inputs = case.make(dtype)
    grad = torch.randn(inputs.q.shape, generator=torch.Generator().manual_seed(1))
    grad = grad.to(dtype)
    exact = everything(converted(inputs, torch.float64), reference, grad)
    honest = everything(inputs, reference, grad)
    with poisoned_empty():
        found = everything(inputs, cpu, grad)
    for name, value in found.items():
        assert_close_to_exact(name, value, honest[name], exact[name])


def assert_close_to_exact(name: str, found: Tensor, honest: Tensor, exact: Tensor) -> None:
    """Compare within the budget; of the log-sum-exp where there are keys, else its infinity."""
    if name == "lse":
        seen = exact.isfinite()
        assert torch.equal(found[~seen].double(), exact[~seen])
        found, honest, exact = found[seen], honest[seen], exact[seen]
    assert_within_budget(found, honest, exact, name=name)


@pytest.mark.parametrize("isa", native().isas() if native() else ())
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", LONG, ids=lambda c: c.name)
def test_same_bits_for_any_number_of_threads(
    case: AttentionCase, dtype: torch.dtype, isa: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Shared by one, two and three workers, and again: nothing but the shapes orders a sum."""
    monkeypatch.setattr(cpu, "BEST_ISA", ISA_CODES[isa])
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


def peak(inputs: AttentionInputs, backward: bool) -> float:
    """Megabytes that a call takes from torch beyond its inputs."""
    options = dict(zip(inputs._fields[3:], inputs[3:], strict=True))
    leaves = [x for name in LEAVES if (x := getattr(inputs, name)) is not None]

    def step() -> None:
        out = crayon_attention(inputs.q, inputs.k, inputs.v, **options, backend="cpu").out
        if backward:
            torch.autograd.grad(out, leaves, torch.ones_like(out))

    return peak_megabytes(step, torch.device("cpu"))


def long_case(length: int, *, backward: bool = False) -> AttentionInputs:
    case = AttentionCase(
        "long", "", 1, length, heads=8, kv_heads=2, head_dim=64, images=((5, length),)
    )
    return case.make(torch.bfloat16, gradients=backward)


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
def test_memory_grows_with_the_length_alone(backward: bool) -> None:
    """Twice the tokens take at most about twice the memory, where an S x S tensor takes four times.

    And less than the scores of two of the eight heads, in bfloat16, would.
    """
    peaks = [peak(long_case(length, backward=backward), backward) for length in (1024, 2048)]
    assert peaks[1] < 2.1 * peaks[0]
    assert peaks[1] < (6 if backward else 2) * 2048**2 * 2 / 1e6


def test_the_crayon_costs_no_tensor_per_token_but_key_and_value() -> None:
    """A dense crayon of the queries alone would be as large as q, four times as large as key."""
    inputs = long_case(1024)
    nothing = ("cos", "sin", "crayon_q", "crayon_k", "crayon_v", "row_index")
    alone = inputs._replace(**dict.fromkeys(nothing))
    outputs = 2 * inputs.k.numel() * 2 / 1e6
    # The angles in float32 come on top.
    angles = 2 * inputs.cos.numel() * 4 / 1e6
    assert peak(inputs, False) - peak(alone, False) < outputs + angles + 0.1


@pytest.mark.parametrize("isa", native().isas() if native() else ())
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("where", ["q", "k", "v"])
def test_what_is_no_number_stays_visible(
    where: str, value: float, dtype: torch.dtype, isa: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In q it reaches its own row, in k and v every row that sees the key, as PyTorch has it.

    Rows that PyTorch keeps finite stay so. Between, a hidden key's NaN times a weight of 0 may
    reach a row of its block, there as here.
    """
    monkeypatch.setattr(cpu, "BEST_ISA", ISA_CODES[isa])
    case = AttentionCase(
        "odd", "", 1, 40, heads=1, kv_heads=1, head_dim=16, tables="", rotated=False
    )
    inputs = case.make(dtype)
    getattr(inputs, where)[0, 7, 0, 3] = value
    expected, found = reference.forward(inputs).out[0], cpu.forward(inputs).out[0]
    spared = expected.isfinite().all(-1)
    assert bool(found.isfinite().all(-1)[spared].all())
    for row in (7, 20, 39):
        assert torch.equal(found[row].isnan(), expected[row].isnan()), row


def test_large_scores_do_not_overflow() -> None:
    """A softmax of scores of thousands is the largest score's value."""
    q = torch.full((1, 33, 1, 16), 100.0)
    k = torch.full((1, 33, 1, 16), -100.0)
    k[0, 4] = 100.0
    v = torch.arange(33.0)[None, :, None, None].expand(1, 33, 1, 16)
    out = crayon_attention(q, k, v, backend="cpu").out
    assert bool((out[0, 4:] == 4.0).all()) and bool(out.isfinite().all())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_sixteen_thousand_tokens(dtype: torch.dtype) -> None:
    """Rows from all over a long sample against float64 of the keys they see."""
    case = AttentionCase(
        "long",
        "",
        1,
        16384,
        heads=1,
        kv_heads=1,
        images=((5, 1230), (9000, 9600)),
        ranges=((3, 16380),),
    )
    inputs = case.make(dtype)
    found = cpu.forward(inputs)
    query = reference.prepared(inputs.q, inputs.crayon_q, inputs.row_index, inputs.cos, inputs.sin)
    for row in (3, 127, 128, 5000, 9100, 16379):
        seen = slice(3, row + 1)
        q = query[0, row, 0]
        key, value = found.key[0, seen, 0], found.value[0, seen, 0]
        scores = (key.double() @ q.double()) * inputs.softmax_scale
        exact = scores.softmax(0) @ value.double()
        low = torch.nn.functional.scaled_dot_product_attention(
            q[None, None, None], key[None, None], value[None, None]
        )
        assert_within_budget(found.out[0, row, 0], low[0, 0, 0], exact, name=f"row {row}")


def test_more_threads_than_items() -> None:
    """Work for fourteen, and two items in the backward: five of seven threads get none."""
    case = AttentionCase("few", "", 1, 700, heads=2, kv_heads=1, images=((0, 690),))
    inputs = case.make(torch.float32)
    grad = torch.randn(inputs.q.shape, generator=torch.Generator().manual_seed(1))
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(7)
        found = everything(inputs, cpu, grad)
        torch.set_num_threads(1)
        expected = everything(inputs, cpu, grad)
    finally:
        torch.set_num_threads(threads)
    for name, value in found.items():
        assert torch.equal(value, expected[name]), name


@pytest.mark.parametrize("scale", [1e30, 1e-30, 0.0])
def test_any_finite_scale(scale: float) -> None:
    """The largest score's value, or the mean: differences are taken before they are scaled."""
    case = AttentionCase("steep", "", 1, 60, heads=1, kv_heads=1, tables="", scale=scale)
    inputs = case.make(torch.float32)
    assert_within_budget(
        cpu.forward(inputs).out,
        reference.forward(inputs).out,
        reference.forward(converted(inputs, torch.float64)).out,
    )


def test_head_dims_above_the_largest_go_to_the_reference() -> None:
    inputs = AttentionCase("wide", "", 1, 3, heads=1, kv_heads=1, head_dim=258, tables="").make(
        torch.float32
    )
    assert "256" in (cpu.declines(inputs) or "")
    assert crayon_attention(inputs.q, inputs.k, inputs.v, cos=inputs.cos, sin=inputs.sin).out.shape
    with pytest.raises(ValueError, match=r"'cpu' cannot serve .* head dims up to 256"):
        crayon_attention(inputs.q, inputs.k, inputs.v, backend="cpu")
