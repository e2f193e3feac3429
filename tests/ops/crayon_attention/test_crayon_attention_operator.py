"""The operator inside PyTorch: gradients, opcheck, compile, export, autocast, checkpointing."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from collavo_kernels import crayon_attention
from collavo_kernels._native import native
from collavo_kernels._sdpa import grouped_attention
from collavo_kernels.ops.crayon_attention import prepare
from collavo_kernels.ops.crayon_attention.inputs import AttentionInputs
from collavo_kernels.testing.cases.crayon_attention import CASES, AttentionCase

BACKENDS = ["reference"] + (["cpu"] if native() is not None else [])
LEAVES = ("q", "k", "v", "crayon_q", "crayon_k", "crayon_v")
SMALL = (
    AttentionCase(
        "all",
        "every table",
        batch=1,
        length=6,
        heads=2,
        kv_heads=1,
        head_dim=2,
        rows=3,
        images=((1, 5),),
    ),
    AttentionCase(
        "padded band",
        "range, band and no value table: value is v itself",
        length=6,
        heads=2,
        kv_heads=2,
        head_dim=2,
        images=((0, 4),),
        ranges=((2, 6), (0, 5)),
        window=2,
        tables="qk",
    ),
    AttentionCase(
        "bare", "both directions, no table", length=5, head_dim=2, causal=False, tables=""
    ),
)


OPTIONS = AttentionInputs._fields[3:]


def named(name: str) -> AttentionCase:
    return next(c for c in CASES if c.name == name)


def options(inputs: AttentionInputs) -> dict[str, Any]:
    return {name: getattr(inputs, name) for name in OPTIONS}


def call(inputs: AttentionInputs, **more: Any) -> tuple[Tensor, Tensor, Tensor]:
    return tuple(crayon_attention(inputs.q, inputs.k, inputs.v, **options(inputs), **more))


def leaves(inputs: AttentionInputs) -> list[Tensor]:
    return [x for n in LEAVES if (x := getattr(inputs, n)) is not None]


def loss(results: tuple[Tensor, ...]) -> Tensor:
    return sum((x.float() * (i + 1 + x.float())).sum() for i, x in enumerate(results))


def assert_same(found: list[Tensor], expected: list[Tensor]) -> None:
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("case", SMALL, ids=lambda c: c.name)
def test_gradcheck(case: AttentionCase) -> None:
    """Numerical derivatives through all three outputs, for every differentiable argument."""
    inputs = case.make(torch.float64, gradients=True)
    used = [n for n in LEAVES if getattr(inputs, n) is not None]

    def run(*values: Tensor) -> tuple[Tensor, ...]:
        return call(inputs._replace(**dict(zip(used, values, strict=True))))

    assert torch.autograd.gradcheck(run, leaves(inputs))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", ["plain", "no_tables", "padding_window", "no_rows"])
def test_opcheck(name: str, backend: str) -> None:
    inputs = named(name).make(torch.float32, gradients=True)
    torch.library.opcheck(torch.ops.collavo.crayon_attention.default, inputs, {"backend": backend})


@pytest.mark.parametrize("backend", BACKENDS)
def test_opcheck_backward(backend: str) -> None:
    inputs = named("plain").make(torch.float32)
    out, key, value, lse = torch.ops.collavo.crayon_attention(*inputs, backend=backend)
    wanted = [True, False, True, True, False, True]
    # Of k and v the shapes alone matter, in memory of their own: opcheck takes no aliases.
    kept = inputs._replace(k=torch.zeros_like(key), v=torch.zeros_like(value))
    grads = (torch.ones_like(out), None, value.clone())
    torch.library.opcheck(
        torch.ops.collavo.crayon_attention_backward.default,
        (*kept, key, value, out, lse, *grads, wanted),
        {"backend": backend},
    )


@pytest.mark.parametrize("name", ["plain", "left_padding", "no_tables"])
def test_compiles_without_graph_break(name: str) -> None:
    inputs, others = (named(name).make(torch.float32, gradients=True) for _ in range(2))

    def step(given: AttentionInputs) -> Tensor:
        return loss(call(given))

    expected = torch.autograd.grad(step(inputs), leaves(inputs))
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    found = torch.autograd.grad(compiled(others), leaves(others))
    assert_same(found, expected)


def test_exports() -> None:
    class Module(torch.nn.Module):
        def forward(self, q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
            return crayon_attention(q, k, v, cos=cos, sin=sin).out

    inputs = named("no_tables").make(torch.float32)
    program = torch.export.export(Module(), inputs[:5])
    assert_same([program.module()(*inputs[:5])], [Module()(*inputs[:5])])


def test_autocast() -> None:
    """q, k, v and the tables are cast, the angles are not, gradients come in the leaves' dtype."""
    inputs = named("plain").make(torch.float32, gradients=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        results = call(inputs)
    assert {x.dtype for x in results} == {torch.bfloat16}
    gradients = torch.autograd.grad(loss(results), leaves(inputs))
    assert {g.dtype for g in gradients} == {torch.float32}
    low = AttentionInputs(
        *(
            x.detach().bfloat16() if i in (0, 1, 2, 5, 6, 7) and isinstance(x, Tensor) else x
            for i, x in enumerate(inputs)
        )
    )
    assert_same(list(results), list(call(low)))


def test_checkpointing() -> None:
    inputs = named("plain").make(torch.float32, gradients=True)
    expected = torch.autograd.grad(loss(call(inputs)), leaves(inputs))
    results = checkpoint(lambda: call(inputs), use_reentrant=False)
    assert_same(torch.autograd.grad(loss(results), leaves(inputs)), expected)


def test_second_derivative_raises() -> None:
    inputs = named("plain").make(torch.float32, gradients=True)
    (gradient,) = torch.autograd.grad(call(inputs)[0].sum(), inputs.q, create_graph=True)
    with pytest.raises(RuntimeError, match="first derivatives"):
        gradient.sum().backward()


def test_only_what_needs_a_gradient_gets_one() -> None:
    inputs = named("plain").make(torch.float32)
    inputs.crayon_k.requires_grad_()
    call(inputs)[0].sum().backward()
    assert inputs.crayon_k.grad is not None
    assert inputs.q.grad is None and inputs.crayon_v.grad is None


def test_value_is_v_itself_without_a_value_table() -> None:
    inputs = named("key_table").make(torch.float32, gradients=True)
    assert call(inputs)[2] is inputs.v


@pytest.mark.parametrize("name", ["plain", "two_images", "key_table", "no_rows", "no_tables"])
def test_prepare_is_the_first_half(name: str) -> None:
    """The cached path's q, k and v are the operator's, up to the order of one sum's rounding."""
    inputs = named(name).make(torch.float32, gradients=True)
    given = {k: v for k, v in options(inputs).items() if k in ("cos", "sin", "row_index")}
    tables = {n: getattr(inputs, n) for n in LEAVES[3:]}
    q, key, value = prepare(inputs.q, inputs.k, inputs.v, **given, **tables)
    out, *cached = call(inputs)
    assert_same([key, value], cached)
    attended = grouped_attention(*(x.transpose(1, 2) for x in (q, key, value)), is_causal=True)
    torch.testing.assert_close(attended.transpose(1, 2), out)
    gradients = torch.autograd.grad(loss((q, key)), inputs.q)
    assert bool(gradients[0].isfinite().all())
