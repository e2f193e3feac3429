"""What an operator cannot do it refuses, with one sentence that names it, and never in silence."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from operator_samples import (
    OPERATORS,
    Sample,
    assert_same,
    changed,
    copied,
    differentiable,
    every_sample,
    loss,
    outputs,
    with_gradients,
)
from torch import Tensor

from collavo_kernels.testing import (
    cases,
)


@every_sample
def test_bad_inputs_are_refused(sample: Sample) -> None:
    """Another dtype, and a row that is not in the table, before native code sees them."""
    operator, inputs = sample
    first = next(x for x in inputs if x is not None)
    first = first[0] if isinstance(first, list) else first
    wrong = changed(inputs, lambda x: x.to(torch.complex64) if x is first else x)
    if not operator.name.startswith("toy"):
        with pytest.raises(TypeError, match="expected dtype"):
            outputs(operator, wrong)
    if getattr(inputs, "row_index", None) is not None:
        bad = inputs.row_index.clone()
        bad.view(-1)[0] = 999
        for backend in ("", "reference"):
            with pytest.raises(ValueError, match=r"row_index: expected entries .* got 999 at"):
                outputs(operator, inputs._replace(row_index=bad), backend=backend)


@differentiable
def test_forward_mode_is_refused(sample: Sample) -> None:
    """A dropped tangent would be zeros without a word."""
    inputs, leaves = with_gradients(sample)

    def call(x: Tensor) -> Tensor:
        given = changed(inputs, lambda each: x if each is leaves[0] else each.detach())
        return outputs(sample.operator, given)[0]

    x = leaves[0].detach()
    with pytest.raises(NotImplementedError, match=f"{sample.operator.name}: forward-mode"):
        torch.func.jvp(call, (x,), (torch.ones_like(x),))
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x, torch.ones_like(x))
        with pytest.raises(NotImplementedError, match="forward-mode"):
            call(dual)
        assert isinstance(call(x), Tensor)  # without a tangent it is a call like any other


@differentiable
@pytest.mark.parametrize("constant", [True, False], ids=["constant", "differentiable"])
def test_a_second_derivative_is_refused(sample: Sample, constant: bool) -> None:
    """With an upstream gradient that is a constant, too: there it was once dropped."""
    inputs, leaves = with_gradients(sample)
    found = [x for x in outputs(sample.operator, inputs) if x.requires_grad]
    first = found[0].sum() if constant else found[0].square().sum()
    (grad,) = torch.autograd.grad(first, leaves[0], create_graph=True)
    with pytest.raises(NotImplementedError, match=f"{sample.operator.name}: a second derivative"):
        (first + grad.pow(2).sum()).backward()


@differentiable
def test_create_graph_alone_is_no_error(sample: Sample) -> None:
    """Libraries pass it by habit; only a derivative of the result is refused."""
    inputs, leaves = with_gradients(sample)
    expected = torch.autograd.grad(loss(outputs(sample.operator, inputs)), leaves)
    found = torch.autograd.grad(loss(outputs(sample.operator, inputs)), leaves, create_graph=True)
    assert_same(list(found), list(expected))


@every_sample
def test_vmap_is_refused(sample: Sample) -> None:
    operator, inputs = sample
    first = next(x for x in inputs if x is not None)
    batch = first[0] if isinstance(first, list) else first

    def call(x: Tensor) -> Any:
        return outputs(operator, changed(inputs, lambda each: x if each is batch else each))

    with pytest.raises(
        NotImplementedError, match=f"{operator.name}.*: torch.vmap is not supported"
    ):
        torch.vmap(call)(batch[None])


@differentiable
def test_forward_over_reverse_is_refused(sample: Sample) -> None:
    """A tangent that comes with the upstream gradient would be dropped by the backward."""
    inputs, leaves = with_gradients(sample)
    found = [x for x in outputs(sample.operator, inputs) if x.requires_grad]
    with torch.autograd.forward_ad.dual_level():
        grad = torch.ones_like(found[0])
        dual = torch.autograd.forward_ad.make_dual(grad, grad)
        with pytest.raises(NotImplementedError, match=f"{sample.operator.name}: forward-mode"):
            torch.autograd.grad((found[0] * dual).sum(), leaves)


@differentiable
def test_batched_gradients_are_refused(sample: Sample) -> None:
    inputs, leaves = with_gradients(sample)
    found = next(x for x in outputs(sample.operator, inputs) if x.requires_grad)
    grads = torch.ones(2, *found.shape)
    with pytest.raises(NotImplementedError, match=f"{sample.operator.name}.*torch.vmap is not"):
        torch.autograd.grad(found, leaves, grads, is_grads_batched=True)


@pytest.mark.parametrize(
    "value", ["qlora=cpu", "cpu,qlora_linear=reference", "qlora_linear=", "=cpu"]
)
def test_a_malformed_environment_variable_is_refused(
    value: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLLAVO_BACKEND", value)
    with pytest.raises(ValueError, match="COLLAVO_BACKEND: expected a backend, or"):
        torch.ops.collavo.toy_scale(torch.ones(2), [])


@every_sample
def test_unknown_backends_are_refused_with_those_there_are(
    sample: Sample, monkeypatch: pytest.MonkeyPatch
) -> None:
    operator, inputs = sample
    names = ", ".join(each.name for each in operator.backends)
    with pytest.raises(ValueError, match=f"expected one of {names} for {operator.name}, got 'fas'"):
        operator.op(*copied(inputs), backend="fas")
    monkeypatch.setenv("COLLAVO_BACKEND", "fas")
    with pytest.raises(ValueError, match=f"expected one of {names} for {operator.name}"):
        operator.op(*copied(inputs))


def test_a_former_name_is_refused_with_the_present_one() -> None:
    inputs = cases.samples("crayon_attention")[0][1]
    with pytest.raises(ValueError, match="what was 'cuda' is 'library' now"):
        OPERATORS["crayon_attention"].op(*inputs, backend="cuda")


def test_what_gets_no_gradient_may_not_ask_for_one() -> None:
    inputs = cases.samples("crayon_attention")[0][1]
    inputs = inputs._replace(cos=inputs.cos.clone().requires_grad_())
    with pytest.raises(ValueError, match="cos: gradients are not computed for it; detach it"):
        torch.ops.collavo.crayon_attention(*inputs)
    with torch.no_grad():
        torch.ops.collavo.crayon_attention(*inputs)


def test_an_operator_without_a_derivative_refuses_functional_ones_too() -> None:
    def filled(values: Tensor) -> Tensor:
        buffer = torch.zeros(3, 2)
        torch.ops.collavo.toy_fill(buffer, values)
        return buffer.sum()

    values = torch.ones(1, 2)
    with pytest.raises(NotImplementedError, match="toy_fill: forward-mode"):
        torch.func.jvp(filled, (values,), (values,))
    with pytest.raises((RuntimeError, NotImplementedError), match="toy_fill: "):
        torch.func.grad(filled)(values)
    with pytest.raises(RuntimeError, match="toy_fill: it has no derivative"):
        torch.compile(filled, backend="aot_eager")(values.clone().requires_grad_())


def test_an_operator_without_a_derivative_refuses_gradients() -> None:
    buffer, values = torch.zeros(3, 2), torch.ones(1, 2, requires_grad=True)
    with pytest.raises(RuntimeError, match="toy_fill: it has no derivative"):
        torch.ops.collavo.toy_fill(buffer, values)
    assert bool((buffer == 0).all())
    with torch.no_grad():
        torch.ops.collavo.toy_fill(buffer, values)
    assert buffer.sum() == 2
