"""What the core promises of every operator, made-up ones included: no line here names one."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import pytest
import torch
import toy_operators
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.checkpoint import checkpoint

from collavo_kernels import info
from collavo_kernels._register import AnyOperator
from collavo_kernels.testing import backward_arguments, cases, poisoned_empty

OPERATORS: dict[str, AnyOperator] = {
    **info.operators(),
    "toy_fill": toy_operators.FILL,
    "toy_scale": toy_operators.SCALE,
    "toy_cube": toy_operators.CUBE,
}
DIFFERENTIABLE = {name: each for name, each in OPERATORS.items() if each.derivative is not None}


class Sample(NamedTuple):
    operator: AnyOperator
    inputs: Any


def samples(operators: dict[str, AnyOperator]) -> Iterator[Any]:
    for name, operator in operators.items():
        found = toy_operators.samples if name.startswith("toy") else cases.samples
        for case, inputs in found(name):
            yield pytest.param(Sample(operator, inputs), id=f"{name}-{case}")


every_sample = pytest.mark.parametrize("sample", list(samples(OPERATORS)))
differentiable = pytest.mark.parametrize("sample", list(samples(DIFFERENTIABLE)))


def changed(bundle: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """Return a bundle with every tensor replaced."""

    def one(value: Any) -> Any:
        if isinstance(value, list):
            return [one(each) for each in value]
        return change(value) if isinstance(value, Tensor) else value

    return type(bundle)(*map(one, bundle))


def with_gradients(sample: Sample) -> tuple[Any, list[Tensor]]:
    """Return the inputs with leaves of their own that ask for gradients, and these leaves."""
    derivative = sample.operator.derivative
    wanting = {id(x) for x in derivative.leaves(sample.inputs) if x is not None}

    def leaf(x: Tensor) -> Tensor:
        own = x.detach().clone()
        return own.requires_grad_(id(x) in wanting and x.is_floating_point())

    inputs = changed(sample.inputs, leaf)
    return inputs, leaves_of(sample, inputs)


def leaves_of(sample: Sample, inputs: Any) -> list[Tensor]:
    found = sample.operator.derivative.leaves(inputs)
    return [x for x in found if x is not None and x.requires_grad]


def copied(inputs: Any) -> Any:
    return changed(inputs, lambda x: x.detach().clone().requires_grad_(x.requires_grad))


def outputs(operator: AnyOperator, inputs: Any, **options: Any) -> list[Tensor]:
    """Call the operator as ``torch.ops`` does."""
    found = operator.op(*inputs, **options)
    return [found] if isinstance(found, Tensor) else list(found)


def loss(found: list[Tensor]) -> Tensor:
    """A number that depends on every output that has a gradient, each in another way."""
    wanted = [x for x in found if x.requires_grad]
    return sum(
        ((x.float() * (i + 1 + x.float())).sum() for i, x in enumerate(wanted)), torch.zeros(())
    )


def assert_same(found: list[Any], expected: list[Any]) -> None:
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        assert one is other is None or torch.equal(one, other)


def test_every_folder_is_an_operator_with_samples() -> None:
    assert {"crayon_attention", "panoptic_lookup", "qlora_linear"} <= set(info.operators())
    for name in info.operators():
        assert len(list(cases.samples(name))) >= 3


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
    called = [node.target for node in program.graph.nodes if node.op == "call_function"]
    assert operator.op in called
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
    inputs = next(iter(cases.samples("crayon_attention")))[1]
    with pytest.raises(ValueError, match="what was 'cuda' is 'library' now"):
        OPERATORS["crayon_attention"].op(*inputs, backend="cuda")


def test_what_gets_no_gradient_may_not_ask_for_one() -> None:
    inputs = next(iter(cases.samples("crayon_attention")))[1]
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
