"""What holds whatever the backend: peers, exact zeros, padding, memory, bits, and messages."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from collavo_kernels import crayon_attention
from collavo_kernels._native import native
from collavo_kernels._sdpa import grouped_attention
from collavo_kernels.ops.crayon_attention.inputs import AttentionInputs
from collavo_kernels.testing import offset_view, poisoned_empty
from collavo_kernels.testing.cases.crayon_attention import CASES

BACKENDS = ["reference"] + (["cpu"] if native() is not None else [])
LEAVES = ("q", "k", "v", "crayon_q", "crayon_k", "crayon_v")


def make(name: str, dtype: torch.dtype = torch.float32, **more: Any) -> AttentionInputs:
    return next(c for c in CASES if c.name == name).make(dtype, **more)


def call(inputs: AttentionInputs, backend: str = "") -> tuple[Tensor, Tensor, Tensor]:
    options = dict(zip(inputs._fields[3:], inputs[3:], strict=True))
    return tuple(crayon_attention(inputs.q, inputs.k, inputs.v, **options, backend=backend))


def everything(inputs: AttentionInputs, backend: str) -> list[Tensor]:
    """Outputs and all gradients of a loss that uses every output."""
    results = call(inputs, backend)
    leaves = [x for n in LEAVES if (x := getattr(inputs, n)) is not None]
    loss = sum((x.float() * (i + 1 + x.float())).sum() for i, x in enumerate(results))
    return [*results, *torch.autograd.grad(loss, leaves)]


def assert_same(found: list[Tensor], expected: list[Tensor]) -> None:
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("backend", BACKENDS)
def test_agrees_with_transformers(backend: str) -> None:
    """The replaced code: a dense crayon per token, transformers' rotary embedding, and SDPA."""
    llama = pytest.importorskip("transformers.models.llama.modeling_llama")
    inputs = make("plain", torch.float64 if backend == "reference" else torch.float32)
    on = (inputs.row_index >= 0)[:, :, None, None]
    index = inputs.row_index.clamp_min(0).long()
    q, k, v = (
        torch.where(on, x + table[index], x).transpose(1, 2)
        for x, table in zip(inputs[:3], inputs[5:8], strict=True)
    )
    q, k = llama.apply_rotary_pos_emb(q, k, inputs.cos, inputs.sin)
    expected = grouped_attention(q, k, v, is_causal=True)
    out, key, value = call(inputs, backend)
    for found, usual in ((out, expected), (key, k), (value, v)):
        torch.testing.assert_close(found, usual.transpose(1, 2))


@pytest.mark.parametrize("backend", BACKENDS)
def test_table_form_equals_dense_form(backend: str) -> None:
    """A table row per token says the same as few rows; its gradients sum to the rows'."""
    few, dense = (make("plain", gradients=True) for _ in range(2))
    index = few.row_index.flatten()
    used = index >= 0
    own = torch.full_like(index, -1)
    own[used] = torch.arange(int(used.sum()), dtype=torch.int32)
    tables = [t.detach()[index[used].long()].requires_grad_() for t in dense[5:8]]
    dense = AttentionInputs(*dense[:5], *tables, own.view_as(few.row_index), *dense[9:])
    found, expected = everything(few, backend), everything(dense, backend)
    assert_same(found[:3], expected[:3])
    assert_same(found[3:6], expected[3:6])
    for table, per_token in zip(found[6:], expected[6:], strict=True):
        summed = torch.zeros_like(table).index_add_(0, index[used].long(), per_token)
        torch.testing.assert_close(table, summed)


@pytest.mark.parametrize("backend", BACKENDS)
def test_unused_rows_get_exact_zeros(backend: str) -> None:
    inputs = make("plain", gradients=True)
    for gradient in everything(inputs, backend)[6:]:
        assert bool((gradient[-1] == 0).all()) and bool((gradient[0] != 0).any())


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", ["left_padding", "right_padding", "padding_window", "empty_range"])
def test_nan_in_padding_stays_there(name: str, backend: str) -> None:
    clean, dirty = (make(name, gradients=True) for _ in range(2))
    token = torch.arange(clean.q.shape[1])
    ranges = clean.key_range
    valid = (token >= ranges[:, :1]) & (token < ranges[:, 1:])
    with torch.no_grad():
        for x in dirty[:3]:
            x[~valid] = float("nan")

    def results(inputs: AttentionInputs) -> list[Tensor]:
        out = call(inputs, backend)[0]
        upstream = torch.ones_like(out)
        upstream[~valid] = float("nan")
        leaves = [getattr(inputs, n) for n in LEAVES]
        return [out, *torch.autograd.grad(out, leaves, upstream)]

    found = results(dirty)
    assert_same(found, results(clean))
    for each in found[:4]:
        assert bool((each[~valid] == 0).all())


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["plain", "padding_window", "empty_range", "no_tokens"])
def test_poisoned_memory_and_odd_views(name: str, dtype: torch.dtype, backend: str) -> None:
    expected = everything(make(name, dtype, gradients=True), backend)
    inputs = make(name, dtype)
    views = [
        offset_view(x).requires_grad_(x.is_floating_point() and i not in (3, 4))
        if isinstance(x, Tensor)
        else x
        for i, x in enumerate(inputs)
    ]
    with poisoned_empty():
        found = everything(AttentionInputs(*views), backend)
    assert_same(found, expected)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["long", "padding_window"])
def test_same_bits_for_any_number_of_threads(name: str, dtype: torch.dtype, backend: str) -> None:
    threads = torch.get_num_threads()
    found = []
    try:
        for count in (1, 2, 2):
            torch.set_num_threads(count)
            found.append(everything(make(name, dtype, gradients=True), backend))
    finally:
        torch.set_num_threads(threads)
    assert_same(found[1], found[0])
    assert_same(found[2], found[0])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("entry", [-2, 4, 2**31 - 1, -(2**31)])
def test_row_index_out_of_range(entry: int, backend: str) -> None:
    inputs = make("plain")
    inputs.row_index[1, 5] = entry
    with pytest.raises(ValueError, match=rf"row_index: .* got {entry} at sample 1, token 5"):
        call(inputs, backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("bad", [(5, 3), (-1, 4), (0, 38)])
def test_key_range_out_of_range(bad: tuple[int, int], backend: str) -> None:
    inputs = make("left_padding")
    inputs.key_range[1] = torch.tensor(bad)
    with pytest.raises(ValueError, match=r"key_range: .* at sample 1"):
        call(inputs, backend)


WRONG = {
    "q": (lambda x: x[0], ValueError, r"q: expected shape \[B, S, H, D\]"),
    "k": (lambda x: x[:, :-1], ValueError, "k: expected shape"),
    "v": (lambda x: x.half(), TypeError, "v: expected dtype float32"),
    "cos": (lambda x: x[:, :-1], ValueError, "cos: expected shape .* angles of exactly"),
    "sin": (lambda x: x.double(), TypeError, "sin: expected dtype"),
    "crayon_q": (lambda x: x[:, :-1], ValueError, "crayon_q: expected shape"),
    "crayon_k": (lambda x: x[:-1], ValueError, "crayon_k: expected shape"),
    "crayon_v": (lambda x: x.double(), TypeError, "crayon_v: expected dtype"),
    "row_index": (lambda x: x.long(), TypeError, "row_index: expected dtype int32"),
    "key_range": (lambda x: x[:1], ValueError, "key_range: expected shape"),
    "window": (lambda _: 0, ValueError, "window: expected at least 1"),
    "scale": (lambda _: float("nan"), ValueError, "scale: expected a finite number"),
}


@pytest.mark.parametrize("name", WRONG)
def test_messages(name: str) -> None:
    spoil, error, message = WRONG[name]
    inputs = make("left_padding")
    with pytest.raises(error, match=message):
        call(inputs._replace(**{name: spoil(getattr(inputs, name))}))


def test_messages_of_combinations() -> None:
    inputs = make("plain")
    with pytest.raises(ValueError, match="row_index: expected a tensor beside crayon_q"):
        call(inputs._replace(row_index=None))
    with pytest.raises(ValueError, match="even head dim"):
        call(AttentionInputs(*(x[..., :3] for x in inputs[:5]), *[None] * 5, True, None, None))
    with pytest.raises(ValueError, match="divides q's 4"):
        call(inputs._replace(k=torch.ones(2, 37, 3, 64), v=torch.ones(2, 37, 3, 64)))
    with pytest.raises(TypeError, match="k: expected a tensor, got list"):
        call(inputs._replace(k=[1]))
    with pytest.raises(ValueError, match="cos: gradients"):
        call(inputs._replace(cos=inputs.cos.requires_grad_()))
    with pytest.raises(ValueError, match="backend: expected one of"):
        call(inputs._replace(cos=inputs.cos.detach()), "fastest")
