"""What the core promises of every operator, made-up ones included."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from operator_samples import (
    Sample,
    assert_same,
    changed,
    copied,
    differentiable,
    double,
    every_sample,
    loss,
    outputs,
    with_gradients,
)
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.checkpoint import checkpoint

from collavo_kernels import info
from collavo_kernels.testing import (
    assert_within_budget,
    backward_arguments,
    cases,
    poisoned_empty,
)


def test_every_folder_is_an_operator_with_samples() -> None:
    assert {"crayon_attention", "panoptic_lookup", "qlora_linear"} <= set(info.operators())
    for name in info.operators():
        cases.samples(name)  # says what is missing


@every_sample
def test_schema_and_bundle_have_the_same_arguments(sample: Sample) -> None:
    """Names, order and defaults; a backend by name comes last."""
    operator, inputs = sample
    arguments = operator.op._schema.arguments
    assert [x.name for x in arguments] == [*inputs._fields, "backend"]
    assert arguments[-1].kwarg_only and arguments[-1].default_value == ""
    defaults = {x.name: x.default_value for x in arguments[:-1] if x.has_default_value()}
    assert defaults == inputs._field_defaults
    written = [x.name for x in arguments if x.alias_info is not None and x.alias_info.is_write]
    assert written == operator._written


@every_sample
def test_opcheck(sample: Sample) -> None:
    operator, inputs = sample
    if operator.derivative is not None:
        inputs, _ = with_gradients(sample)
    for backend in ("", "reference"):
        torch.library.opcheck(operator.op, tuple(inputs), {"backend": backend})


@differentiable
def test_opcheck_of_the_backward(sample: Sample) -> None:
    operator, inputs = sample
    result = operator.bundled(operator.op(*inputs))
    empty = operator.derivative.empty(inputs)
    names = operator.derivative.output_grads._fields
    grads = [None if n in empty else torch.ones_like(getattr(result, n)) for n in names]
    kept, saved, grads, wanted = backward_arguments(operator, inputs, result, grads)
    # Memory of their own: opcheck takes no argument twice.
    kept, saved = changed(kept, torch.clone), changed(saved, torch.clone)
    flags = [flag for each in wanted for flag in (each if isinstance(each, list) else [each])]
    torch.library.opcheck(operator.backward.op, (*kept, *saved, *grads, flags))
    assert len(operator.backward.op(*kept, *saved, *grads, flags)) == sum(flags)
    with pytest.raises(ValueError, match=r"wanted: expected \d+ entries"):
        operator.backward.op(*kept, *saved, *grads, [*flags, True])


@every_sample
def test_the_backend_that_serves_agrees_with_the_reference(sample: Sample) -> None:
    """Results and gradients, within twice the error that the reference makes in the same dtype."""
    operator, inputs = sample
    if operator._written:
        return

    def computed(given: Any, backend: str) -> list[Tensor]:
        if operator.derivative is None:
            return outputs(operator, given, backend=backend)
        given, leaves = with_gradients(Sample(operator, given))
        found = outputs(operator, given, backend=backend)
        return [*found, *torch.autograd.grad(loss(found), leaves)]

    exact = computed(double(inputs), "reference")
    for found, low, truth in zip(
        computed(inputs, ""), computed(inputs, "reference"), exact, strict=True
    ):
        finite = truth.isfinite()
        assert torch.equal(found[~finite], low[~finite])
        if truth.is_floating_point() and bool(finite.any()):
            assert_within_budget(found[finite], low[finite], truth[finite])
        elif not truth.is_floating_point():
            assert torch.equal(found, low)


@differentiable
def test_the_references_gradient_is_the_functions(sample: Sample) -> None:
    """Along one direction in float64: what the loss does, and what the gradients say it does."""
    inputs, leaves = with_gradients(Sample(sample.operator, double(sample.inputs)))
    grads = torch.autograd.grad(loss(outputs(sample.operator, inputs)), leaves)
    ways = [torch.randn_like(x) for x in leaves]
    step = 1e-5

    def moved(by: float) -> Tensor:
        with torch.no_grad():
            for x, way in zip(leaves, ways, strict=True):
                x.add_(way, alpha=by)
        # loss() reads which results have a gradient, and needs float64 all along.
        found = [x for x in outputs(sample.operator, inputs) if x.requires_grad]
        return sum((x * (i + x)).sum() for i, x in enumerate(found, start=1)).detach()

    slope = (moved(step) - moved(-2 * step)) / (2 * step)
    found = sum((g * way).sum() for g, way in zip(grads, ways, strict=True))
    torch.testing.assert_close(found, slope, rtol=1e-4, atol=1e-3)


@differentiable
def test_functional_call_is_right_and_functional_derivatives_are_refused(sample: Sample) -> None:
    class Module(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.own = nn.Parameter(torch.zeros_like(leaves[0]))

        def forward(self) -> Tensor:
            given = changed(inputs, lambda x: self.own if x is leaves[0] else x.detach())
            return outputs(sample.operator, given)[0].sum()

    inputs, leaves = with_gradients(sample)
    module = Module()
    expected = torch.autograd.grad(outputs(sample.operator, inputs)[0].sum(), leaves[0])
    found = torch.func.functional_call(module, {"own": leaves[0]}, ())
    assert_same(list(torch.autograd.grad(found, leaves[0])), list(expected))
    with pytest.raises(NotImplementedError, match=f"{sample.operator.name}: torch.func's"):
        torch.func.grad(lambda own: torch.func.functional_call(module, {"own": own}, ()))(
            leaves[0].detach()
        )


@differentiable
def test_compiles_in_one_graph_with_gradients(sample: Sample) -> None:
    torch._dynamo.reset()
    inputs, leaves = with_gradients(sample)
    kind = type(inputs)
    others = copied(inputs)
    theirs = [
        x for x in sample.operator.derivative.leaves(others) if x is not None and x.requires_grad
    ]

    def step(*given: Any) -> Tensor:
        return loss(list(sample.operator(kind(*given)))) * 2

    expected = torch.autograd.grad(step(*inputs), leaves)
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    assert_same(list(torch.autograd.grad(compiled(*others), theirs)), list(expected))


@differentiable
def test_a_compiled_backward_of_an_eager_forward(sample: Sample) -> None:
    """The compiler then traces through what autograd calls; native code must stay out of it."""
    torch._dynamo.reset()
    inputs, leaves = with_gradients(sample)
    expected = torch.autograd.grad(loss(outputs(sample.operator, inputs)), leaves)
    total = loss(outputs(sample.operator, inputs))
    torch.compile(lambda total: total.backward(), backend="aot_eager")(total)
    assert_same([x.grad for x in leaves], list(expected))


@differentiable
@pytest.mark.parametrize("pre_dispatch", [True, False])
def test_a_traced_gradient_is_computed_again(sample: Sample, pre_dispatch: bool) -> None:
    """A trace holds the backward as an operator, not the numbers that it gave while tracing."""
    if pre_dispatch and sample.operator.derivative.saved._fields:
        # PyTorch's own operators lose results that autograd keeps there, softmax for one.
        pytest.skip("a trace before dispatch does not know results that are saved")
    inputs, leaves = with_gradients(sample)

    def gradient(x: Tensor) -> Tensor:
        given = changed(inputs, lambda each: x if each is leaves[0] else each.detach())
        found = [each for each in outputs(sample.operator, given) if each.requires_grad]
        return torch.autograd.grad(found[0].square().sum(), x)[0]

    x = leaves[0].detach().requires_grad_()
    traced = make_fx(gradient, pre_dispatch=pre_dispatch)(x)
    other = torch.randn_like(x).requires_grad_()
    torch.testing.assert_close(traced(other), gradient(other))


@every_sample
def test_wrapped_tensors_never_reach_native_code(sample: Sample) -> None:
    """A functional tensor is a plain ``Tensor`` by its type, and has no memory of its own."""
    operator, inputs = sample
    if operator._written:
        return
    expected = outputs(operator, inputs)
    torch._enable_functionalization(reapply_views=True)
    try:
        found = outputs(operator, changed(inputs, torch._to_functional_tensor))
        found = [torch._from_functional_tensor(x) for x in found]
    finally:
        torch._disable_functionalization()
    assert_same(found, expected)


@differentiable
def test_graphs_name_the_operator(sample: Sample) -> None:
    """In profiles, anomaly mode and errors of version counters."""
    inputs, _ = with_gradients(sample)
    found = [x for x in outputs(sample.operator, inputs) if x.requires_grad]
    name = "".join(part.title() for part in sample.operator.name.split("_"))
    assert found[0].grad_fn.name() == f"{name}Backward"


@every_sample
def test_exports(sample: Sample) -> None:
    operator, inputs = sample

    class Module(nn.Module):
        def forward(self, *given: Any) -> Any:
            return operator.op(*given)

    program = torch.export.export(Module(), tuple(copied(inputs)))
    nodes = [node for node in program.graph.nodes if node.op == "call_function"]
    # Before torch 2.6 one that writes is an argument of another operator.
    assert any(operator.op in (node.target, *node.args) for node in nodes)
    found = program.module()(*copied(inputs))
    expected = outputs(operator, copied(inputs))
    assert_same([found] if isinstance(found, Tensor) else list(found), expected)


@every_sample
def test_autocast(sample: Sample) -> None:
    """The same as calling on what the operator's own rule makes of the inputs; without a rule it
    changes nothing. Gradients come in the leaves' dtypes."""
    operator, inputs = sample
    low = inputs if operator.autocast is None else operator.autocast(inputs, torch.bfloat16)
    expected = outputs(operator, copied(low))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert_same(outputs(operator, copied(inputs)), expected)
        if operator.derivative is None:
            return
        wanting, leaves = with_gradients(sample)
        total = loss(outputs(operator, wanting))
    for leaf, grad in zip(leaves, torch.autograd.grad(total, leaves), strict=True):
        assert grad.dtype == leaf.dtype and grad.shape == leaf.shape


@differentiable
def test_saved_tensor_hooks_see_every_tensor_once(sample: Sample) -> None:
    inputs, leaves = with_gradients(sample)
    expected = torch.autograd.grad(loss(outputs(sample.operator, inputs)), leaves)
    seen: list[tuple[int, ...]] = []

    def pack(x: Tensor) -> Tensor:
        if x.numel():
            seen.append((x.data_ptr(), x.numel(), x.element_size()))
        return x.clone()

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        result = sample.operator.op(*inputs)
        count = len(seen)
        found = [result] if isinstance(result, Tensor) else list(result)
        total = loss(found)
    assert count and len(set(seen[:count])) == count, "a tensor was packed twice"
    assert_same(list(torch.autograd.grad(total, leaves)), list(expected))


@differentiable
@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing(sample: Sample, reentrant: bool) -> None:
    inputs, leaves = with_gradients(sample)
    expected = torch.autograd.grad(loss(outputs(sample.operator, inputs)), leaves)
    others = copied(inputs)
    theirs = [
        x for x in sample.operator.derivative.leaves(others) if x is not None and x.requires_grad
    ]

    def call(_: Tensor) -> Any:
        return sample.operator.op(*others)

    found = checkpoint(call, theirs[0], use_reentrant=reentrant)
    loss([found] if isinstance(found, Tensor) else list(found)).backward()
    assert_same([x.grad for x in theirs], list(expected))


@every_sample
def test_deterministic_and_clean_of_what_memory_held(sample: Sample) -> None:
    """The same bits again, and with every new piece of memory full of NaN."""
    operator, inputs = sample
    with torch.no_grad():
        expected = outputs(operator, copied(inputs))
        assert_same(outputs(operator, copied(inputs)), expected)
        with poisoned_empty():
            found = outputs(operator, copied(inputs))
        assert_same(found, expected)
    if operator.derivative is None:
        return
    given, leaves = with_gradients(sample)
    first = torch.autograd.grad(loss(outputs(operator, given)), leaves)
    with poisoned_empty():
        again = torch.autograd.grad(loss(outputs(operator, given)), leaves)
    assert_same(list(again), list(first))


@every_sample
def test_lazy_views_and_subclasses_are_dispatched(sample: Sample) -> None:
    """A view that only says "negated" must not reach code that reads memory."""
    operator, inputs = sample
    if operator._written:
        return

    def lazy(x: Tensor) -> Tensor:
        return torch._neg_view(-x) if x.is_floating_point() else x

    with torch.no_grad():
        assert_same(outputs(operator, changed(inputs, lazy)), outputs(operator, inputs))


def test_a_written_argument_is_seen_by_autograd_and_by_the_compiler() -> None:
    """Its version counter moves, and a compiled function writes to the caller's buffer."""
    buffer, values = torch.zeros(3, 2), torch.ones(1, 2)
    before = buffer._version
    torch.ops.collavo.toy_fill(buffer, values, 2)
    assert buffer._version > before

    @torch.compile(fullgraph=True, backend="aot_eager")
    def step(buffer: Tensor, values: Tensor) -> Tensor:
        torch.ops.collavo.toy_fill(buffer, values, 1)
        return buffer * 2

    assert step(buffer, values).tolist() == [[0, 0], [2, 2], [2, 2]]
    assert buffer.tolist() == [[0, 0], [1, 1], [1, 1]]


@differentiable
def test_undefined_gradients_give_none(sample: Sample) -> None:
    """As autograd has them where nothing depends on a result."""
    inputs, leaves = with_gradients(sample)
    found = [x for x in outputs(sample.operator, inputs) if x.requires_grad]
    undefined = torch._C._functions.UndefinedGrad()(found[0])
    grads = torch.autograd.grad(undefined, leaves, torch.ones_like(found[0]), allow_unused=True)
    assert all(each is None for each in grads)


def test_results_without_a_user_give_zeros_or_none() -> None:
    """Of two results only one is used: the gradient of the other is zeros, or None if it may be."""
    x = torch.randn(2, 3, requires_grad=True)
    _, total = torch.ops.collavo.toy_scale(x, [], 3.0)
    total.backward()
    assert torch.equal(x.grad, torch.full_like(x, 3.0))
