"""crayon_attention on an NVIDIA GPU: every backend there, without waiting for it, as a graph."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from collavo_kernels import check, crayon_attention
from collavo_kernels.ops.crayon_attention.inputs import AttentionInputs
from collavo_kernels.ops.crayon_attention.registration import OPERATOR
from collavo_kernels.testing import assert_within_budget
from collavo_kernels.testing.cases.crayon_attention import (
    CASES,
    LONG_CASES,
    AttentionCase,
    eager,
)
from collavo_kernels.testing.gpu import no_synchronisation, replayed, rougher

pytestmark = pytest.mark.gpu
BACKENDS = [b.name for b in OPERATOR.backends if not b.devices or "cuda" in b.devices]
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
LEAVES = ("q", "k", "v", "crayon_q", "crayon_k", "crayon_v")


def moved(inputs: AttentionInputs, to: Any) -> AttentionInputs:
    """The same values elsewhere; a dtype is for floating tensors only."""

    def move(x: Any) -> Any:
        if not isinstance(x, Tensor) or (isinstance(to, torch.dtype) and not x.is_floating_point()):
            return x
        return x.detach().to(to).requires_grad_(x.requires_grad)

    return AttentionInputs(*map(move, inputs))


def weights_of(case: AttentionCase, dtype: torch.dtype) -> list[Tensor]:
    """The gradients of out, key and value in a linear loss."""
    generator = torch.Generator().manual_seed(1)
    heads = (case.heads, case.kv_heads, case.kv_heads)
    shapes = [(case.batch, case.length, n, case.head_dim) for n in heads]
    return [torch.randn(s, generator=generator, dtype=torch.float64).to(dtype) for s in shapes]


def everything(inputs: AttentionInputs, results: Any, weights: list[Tensor]) -> list[Tensor]:
    """Results and the gradients of every leaf."""
    leaves = [x for name in LEAVES if (x := getattr(inputs, name)) is not None]
    loss = sum((x * w).sum() for x, w in zip(results, weights, strict=True))
    found = torch.autograd.grad(loss, leaves, allow_unused=True)
    gradients = [
        torch.zeros_like(x) if g is None else g for g, x in zip(found, leaves, strict=True)
    ]
    return [*results, *gradients]


def must_serve(backend: str, inputs: AttentionInputs) -> None:
    """Skip where a backend says that it does not take the inputs, with its reason."""
    chosen = next(b for b in OPERATOR.backends if b.name == backend)
    reason = chosen.reason_against("cuda") or chosen.declines(inputs)
    if reason is not None:
        pytest.skip(f"{backend}: {reason}")


def call(inputs: AttentionInputs, backend: str) -> Any:
    options = dict(zip(inputs._fields[3:], inputs[3:], strict=True))
    return crayon_attention(inputs.q, inputs.k, inputs.v, **options, backend=backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("case", [c for c in CASES if c.length and c.batch], ids=lambda c: c.name)
def test_within_budget(case: AttentionCase, dtype: torch.dtype, backend: str) -> None:
    inputs, weights = case.make(dtype, gradients=True), weights_of(case, dtype)
    wide = moved(inputs, torch.float64)
    exact = everything(wide, call(wide, "reference"), [w.double() for w in weights])
    honest = everything(inputs, eager(inputs), weights)
    there, sent = moved(inputs, "cuda"), [w.to("cuda") for w in weights]
    must_serve(backend, there)
    plain = everything(there, eager(there), sent)
    everything(there, call(there, backend), sent)
    with no_synchronisation():
        found = everything(there, call(there, backend), sent)
    again = everything(there, call(there, backend), sent)
    for i, (one, other) in enumerate(zip(found, again, strict=True)):
        assert torch.equal(one, other), i
    for i, (one, low, low_there, true) in enumerate(zip(found, honest, plain, exact, strict=True)):
        # Where the exact value is a sum that cancels there is nothing to compare with.
        if true.numel() and float(true.detach().abs().max()) > 1e-9:
            assert_within_budget(one.cpu(), rougher(low, low_there, true), true, name=f"result {i}")
    check()


@pytest.mark.parametrize("backend", BACKENDS)
def test_bad_values_are_clipped_and_reported(backend: str) -> None:
    case = next(c for c in CASES if c.name == "left_padding")
    weights = [w.to("cuda") for w in weights_of(case, torch.bfloat16)]
    good, bad = (moved(case.make(torch.bfloat16, gradients=True), "cuda") for _ in range(2))
    must_serve(backend, good)
    good.row_index[1, 5] = -1
    bad.row_index[1, 5] = 4
    bad.key_range[1, 1] = case.length + 3  # clipped to the end, which is the good one's
    found = everything(bad, call(bad, backend), weights)
    with pytest.raises(ValueError, match=r"row_index: .*; key_range: "):
        check()
    for one, other in zip(found, everything(good, call(good, backend), weights), strict=True):
        assert torch.equal(one, other)
    check()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", ["left_padding", "right_padding", "padding_window", "empty_range"])
def test_nan_in_padding_stays_there(name: str, backend: str) -> None:
    case = next(c for c in CASES if c.name == name)
    clean, dirty = (moved(case.make(torch.bfloat16, gradients=True), "cuda") for _ in range(2))
    must_serve(backend, clean)
    token, ranges = torch.arange(case.length, device="cuda"), clean.key_range
    valid = (token >= ranges[:, :1]) & (token < ranges[:, 1:])
    with torch.no_grad():
        for x in dirty[:3]:
            x[~valid] = float("nan")

    def results(inputs: AttentionInputs) -> list[Tensor]:
        out = call(inputs, backend)[0]
        upstream = torch.ones_like(out)
        upstream[~valid] = float("nan")
        return [out, *torch.autograd.grad(out, [getattr(inputs, n) for n in LEAVES], upstream)]

    found = results(dirty)
    for one, other in zip(found, results(clean), strict=True):
        assert torch.equal(one, other)
    for each in found[:4]:
        assert bool((each[~valid] == 0).all())


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("case", LONG_CASES, ids=lambda c: c.name)
def test_long_sequences(case: AttentionCase, dtype: torch.dtype, backend: str) -> None:
    inputs, weights = case.make(dtype, gradients=True), weights_of(case, dtype)
    there, sent = moved(inputs, "cuda"), [w.to("cuda") for w in weights]
    must_serve(backend, there)
    wide = moved(there, torch.float64)
    exact = everything(wide, call(wide, "reference"), [w.double() for w in sent])
    honest = everything(there, eager(there), sent)
    found = everything(there, call(there, backend), sent)
    again = everything(there, call(there, backend), sent)
    for i, values in enumerate(zip(found, honest, exact, strict=True)):
        assert torch.equal(values[0], again[i]), i
        assert_within_budget(*values, name=f"result {i}")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", ["padding_window", "head_dim_128"])
def test_replays_as_a_graph(name: str, backend: str) -> None:
    """Forward and backward; the leaves' gradients come out of the graph's own memory."""
    case = next(c for c in CASES if c.name == name)
    inputs = moved(case.make(torch.bfloat16), "cuda")
    must_serve(backend, inputs)
    grads = [w.to("cuda") for w in weights_of(case, torch.bfloat16)]
    operator = torch.ops.collavo

    def run() -> list[Tensor]:
        out, key, value, lse = operator.crayon_attention(*inputs, backend=backend)
        kept = inputs._replace(k=key, v=value)
        saved = (key, value, out, lse)
        gradients = operator.crayon_attention_backward(
            *kept, *saved, *grads, [True] * 6, backend=backend
        )
        return [out, key, value, lse, *gradients]

    with torch.no_grad():
        found = replayed(run)
        for one, other in zip(found, run(), strict=True):
            assert torch.equal(one, other)


@pytest.mark.parametrize("where", ["q", "k", "v"])
def test_what_is_no_number_stays_visible(where: str) -> None:
    """An overflow becomes no zeros: the rows that see it are not finite, as the reference's."""
    case = next(c for c in CASES if c.name == "attention_alone")
    inputs = case.make(torch.float16)
    getattr(inputs, where)[0, 7, 0, 3] = float("nan")
    expected = call(inputs, "reference").out[0, -1].isfinite()
    found = call(moved(inputs, "cuda"), "triton").out[0, -1].isfinite()
    assert torch.equal(found.cpu(), expected)
