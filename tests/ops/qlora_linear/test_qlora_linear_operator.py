"""The operator inside PyTorch: opcheck, compile, export, autocast, checkpointing, bad input."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.utils.checkpoint import checkpoint

from collavo_kernels import LoRAAdapter, NF4Weight, qlora_linear, quantize_nf4
from collavo_kernels._backends import Backend
from collavo_kernels.ops.qlora_linear import reference
from collavo_kernels.ops.qlora_linear.tokens import on_tokens
from collavo_kernels.testing.cases.qlora_linear import CASES, PANEL_CASES, QLoRACall, make_call

BY_NAME = {case.name: case for case in (*CASES, *PANEL_CASES)}


def flat(call: QLoRACall) -> tuple[Any, ...]:
    weight = call.weight
    nf4 = isinstance(weight, NF4Weight)
    head = (weight.packed, weight.scales) if nf4 else (weight, None)
    facts = (weight.block_size, weight.double_quant) if nf4 else (64, False)
    a, b = [x.a for x in call.adapters], [x.b for x in call.adapters]
    scaling = [x.scaling for x in call.adapters]
    epilogue = (call.adapter_mask, call.row_table, call.row_index, call.bias)
    return (call.x, *head, weight.shape[0], *facts, a, b, scaling, *epilogue)


@pytest.mark.parametrize("name", ["few", "few_in_panels", "prefill", "dense", "no_adapters"])
def test_opcheck(name: str) -> None:
    call = make_call(BY_NAME[name])
    torch.library.opcheck(torch.ops.collavo.qlora_linear.default, flat(call))


@pytest.mark.parametrize("wanted", [True, False], ids=["all", "none"])
def test_opcheck_backward(wanted: bool) -> None:
    call = make_call(BY_NAME["few"])
    grad = torch.randn(7, 70)
    detached = [
        [t.detach() for t in each]
        if isinstance(each, list) and each and isinstance(each[0], Tensor)
        else each.detach()
        if isinstance(each, Tensor)
        else each
        for each in flat(call)
    ]
    flags = [wanted, False, *([wanted] * 6)]  # x, weight, every a, every b, row_table, bias
    op = torch.ops.collavo.qlora_linear_backward.default
    torch.library.opcheck(op, (*detached, False, grad, flags))
    assert len(op(*detached, False, grad, flags)) == sum(flags)


@pytest.mark.parametrize("name", ["few", "prefill", "prefill_in_panels"])
def test_compile_fullgraph(name: str) -> None:
    call = make_call(BY_NAME[name])

    @torch.compile(fullgraph=True, backend="aot_eager")
    def compiled(x: Tensor, adapters: Any, table: Tensor) -> Tensor:
        # Made by its class: the compiler of torch 2.5 breaks the graph at dataclasses.replace.
        given = QLoRACall(
            x, call.weight, adapters, call.adapter_mask, table, call.row_index, call.bias
        )
        return given.run() * 2

    out = compiled(call.x, call.adapters, call.row_table)
    grads = torch.autograd.grad(out.sum(), call.leaves()[:6])
    plain = call.run() * 2
    expected = torch.autograd.grad(plain.sum(), call.leaves()[:6])
    assert torch.equal(out, plain)
    assert all(map(torch.equal, grads, expected))


def test_export() -> None:
    class Layer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = quantize_nf4(torch.randn(32, 64))

        def forward(self, x: Tensor) -> Tensor:
            return qlora_linear(x, self.weight)

    layer, x = Layer(), torch.randn(4, 64)
    program = torch.export.export(layer, (x,))
    called = [n.target for n in program.graph.nodes if n.op == "call_function"]
    assert torch.ops.collavo.qlora_linear.default in called
    assert torch.equal(program.module()(x), layer(x))


def test_autocast() -> None:
    call = make_call(BY_NAME["prefill"])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = call.run()
    assert out.dtype == torch.bfloat16
    grads = torch.autograd.grad(out.float().sum(), call.leaves())
    assert all(g.dtype == leaf.dtype for g, leaf in zip(grads, call.leaves(), strict=True))
    half = replace(call, x=call.x.bfloat16(), row_table=call.row_table.bfloat16())
    assert torch.equal(out, half.run())


def test_checkpointing_gives_the_same_gradients() -> None:
    call = make_call(BY_NAME["few"])

    def run(x: Tensor) -> Tensor:
        return replace(call, x=x).run().square()

    plain = torch.autograd.grad(run(call.x).sum(), call.leaves())
    kept = checkpoint(run, call.x, use_reentrant=False)
    assert all(map(torch.equal, plain, torch.autograd.grad(kept.sum(), call.leaves())))


def test_only_what_is_asked_for_gets_a_gradient() -> None:
    call = make_call(BY_NAME["few"])
    for leaf in call.leaves():
        leaf.requires_grad_(False)
    idle, trained = call.adapters
    trained.b.requires_grad_()
    call.run().sum().backward()
    assert trained.b.grad is not None
    assert all(t.grad is None for t in (call.x, idle.a, idle.b, trained.a, call.bias))
    assert not replace(call, adapters=(idle,)).run().requires_grad


def test_double_backward_raises() -> None:
    call = make_call(BY_NAME["decode"])
    (grad,) = torch.autograd.grad(call.run().square().sum(), call.x, create_graph=True)
    with pytest.raises(RuntimeError, match="first derivatives"):
        grad.sum().backward()


def test_fake_cuda_tensors_without_a_gpu() -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    weight = quantize_nf4(torch.randn(32, 64))
    with FakeTensorMode():
        x = torch.empty(2, 5, 64, device="cuda", dtype=torch.bfloat16)
        bytes_on_device = (
            torch.empty(weight.packed.shape, dtype=torch.uint8, device="cuda"),
            torch.empty(weight.scales.shape, dtype=torch.uint8, device="cuda"),
        )
        out = qlora_linear(x, NF4Weight(*bytes_on_device, (32, 64)))
    assert out.shape == (2, 5, 32) and out.dtype == torch.bfloat16 and out.device.type == "cuda"


X, W = torch.randn(3, 64), quantize_nf4(torch.randn(32, 64))
A, B = torch.randn(4, 64), torch.randn(32, 4)
TABLE, INDEX = torch.randn(2, 32), torch.tensor([0, 1, -1], dtype=torch.int32)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"x": [1.0]}, TypeError, "x: expected a tensor, got list"),
        ({"x": X.int()}, TypeError, "x: expected dtype float32 or"),
        ({"x": torch.tensor(1.0)}, ValueError, r"x: expected shape \[\.\.\., K\]"),
        ({"x": X[:, :60]}, ValueError, r"x: expected \[\.\.\., 64\] for the weight"),
        ({"weight": torch.randn(32, 60)}, ValueError, r"weight: expected shape \[32, 64\]"),
        ({"weight": torch.randn(64)}, ValueError, r"weight: expected shape \[N, K\]"),
        ({"bias": [1.0]}, TypeError, "bias: expected a tensor, got list"),
        ({"adapters": [LoRAAdapter(A, None)]}, TypeError, r"adapters\[0\]\.b: expected a tensor"),
        ({"weight": torch.randn(32, 64).half()}, TypeError, "weight: expected dtype float32"),
        ({"adapters": [LoRAAdapter(A[:, 1:], B)]}, ValueError, r"adapters\[0\]\.a: expected shape"),
        ({"adapters": [LoRAAdapter(A, B[:, 1:])]}, ValueError, r"adapters\[0\]\.b: expected shape"),
        ({"adapters": [LoRAAdapter(A.half(), B)]}, TypeError, r"adapters\[0\]\.a: expected dtype"),
        (
            {"adapters": [LoRAAdapter(A.to("meta"), B)]},
            ValueError,
            r"adapters\[0\]\.a: expected a tensor on cpu",
        ),
        (
            {"adapter_mask": torch.ones(4, dtype=torch.uint8)},
            ValueError,
            r"adapter_mask: expected shape \[3\]",
        ),
        ({"adapter_mask": torch.ones(3)}, TypeError, "adapter_mask: expected dtype uint8"),
        (
            {"adapters": [LoRAAdapter(A, B)] * 9, "adapter_mask": torch.ones(3, dtype=torch.uint8)},
            ValueError,
            "adapters: expected at most 8",
        ),
        ({"row_table": TABLE}, ValueError, "row_index: row_table and row_index go together"),
        ({"row_index": INDEX}, ValueError, "row_table: row_table and row_index go together"),
        (
            {"row_table": TABLE[:, 1:], "row_index": INDEX},
            ValueError,
            r"row_table: expected shape \[T, 32\]",
        ),
        (
            {"row_table": TABLE, "row_index": INDEX.long()},
            TypeError,
            "row_index: expected dtype int32",
        ),
        (
            {"row_table": TABLE, "row_index": INDEX + 1},
            ValueError,
            r"row_index: expected entries from -1 to 1 \(the table has 2 rows\), got 2 at token 1",
        ),
        ({"row_table": TABLE, "row_index": INDEX - 1}, ValueError, "got -2 at token 2"),
        ({"bias": torch.ones(31)}, ValueError, r"bias: expected shape \[32\]"),
        ({"backend": "fast"}, ValueError, "backend: expected one of"),
        ({"backend": "cuda"}, ValueError, "backend: "),
    ],
)
def test_bad_input_is_named(arguments: dict[str, Any], error: type, message: str) -> None:
    call = {"x": X, "weight": W} | arguments
    with pytest.raises(error, match=message):
        qlora_linear(call.pop("x"), call.pop("weight"), call.pop("adapters", ()), **call)


@pytest.mark.parametrize(
    ("place", "value", "message"),
    [
        (1, W.packed[:-1], "weight: expected 1024 bytes"),
        (2, W.scales[1:], "scales: expected"),
        (3, 40, "weight: expected 1280 bytes"),
        (4, 48, "block_size: expected one of"),
        (7, [], "adapters: expected as many a as b"),
        (9, torch.ones(2, dtype=torch.uint8), "adapter_mask: expected shape"),
        (11, INDEX[:1], "row_index: expected shape"),
        (12, torch.ones(31), "bias: expected shape"),
    ],
)
def test_the_operators_check_what_reaches_native_code(place: int, value: Any, message: str) -> None:
    """Called without the public function, forward and backward: nothing is read out of bounds."""
    mask = torch.ones(3, dtype=torch.uint8)
    call = [X, W.packed, W.scales, 32, 64, True, [A], [B], [1.0], mask, TABLE, INDEX, None]
    flags = [True, False, True, True, True, False]
    grad, ops = torch.randn(3, 32), torch.ops.collavo
    ops.qlora_linear_backward(*call, False, grad, flags)
    with pytest.raises(ValueError, match="grad_out: expected shape"):
        ops.qlora_linear_backward(*call, False, grad[:, 1:], flags)
    with pytest.raises(ValueError, match="wanted: expected 6 entries"):
        ops.qlora_linear_backward(*call, False, grad, flags[1:])
    with pytest.raises(ValueError, match="wanted: a gradient of bias is asked for"):
        ops.qlora_linear_backward(*call, False, grad, [*flags[:-1], True])
    call[place] = value
    with pytest.raises(ValueError, match=message):
        ops.qlora_linear(*call)
    with pytest.raises(ValueError, match=message):
        ops.qlora_linear_backward(*call, False, grad, flags)


def test_weights_that_cannot_be() -> None:
    with pytest.raises(ValueError, match=r"packed: expected 1024 bytes .* truncated"):
        NF4Weight(W.packed[:-1], W.scales, (32, 64))
    with pytest.raises(ValueError, match="scales: expected"):
        NF4Weight(W.packed, W.scales, (32, 64), double_quant=False)
    with pytest.raises(ValueError, match="block_size: expected one of 32, 64"):
        quantize_nf4(torch.randn(4, 64), block_size=48)
    with pytest.raises(TypeError, match="weight: expected dtype"):
        quantize_nf4(torch.randn(4, 64).double())
    with pytest.raises(ValueError, match="weight: expected at least one element"):
        quantize_nf4(torch.randn(0, 64))
    with pytest.raises(TypeError, match="dtype: expected one of"):
        W.dequantize(torch.int32)


@pytest.mark.parametrize("backend", ["", "reference"])
def test_lazy_signs_and_zeros_are_seen(backend: str) -> None:
    # A view that only says "negated" or "zero" must not reach code that reads memory.
    call = make_call(BY_NAME["few"])
    with torch.no_grad():
        for name in ("x", "bias", "row_table"):
            value = getattr(call, name)
            lazy = torch._neg_view(value)
            out = replace(call, **{name: lazy}).run(backend)
            torch.testing.assert_close(out, replace(call, **{name: -value}).run(backend))
        first, second = call.adapters
        a = first._replace(a=torch._neg_view(first.a))
        expected = replace(call, adapters=(first._replace(a=-first.a), second)).run(backend)
        torch.testing.assert_close(replace(call, adapters=(a, second)).run(backend), expected)
        nothing = torch._efficientzerotensor(second.b.shape)
        out = replace(call, adapters=(first, second._replace(b=nothing))).run(backend)
        zeros = second._replace(b=torch.zeros_like(second.b))
        torch.testing.assert_close(out, replace(call, adapters=(first, zeros)).run(backend))


def test_subclasses_are_dispatched() -> None:
    from torch.testing._internal.two_tensor import TwoTensor

    call = make_call(BY_NAME["few"])
    bias = call.bias.detach()
    with torch.no_grad():
        out = replace(call, bias=TwoTensor(bias, bias)).run()
        assert isinstance(out, TwoTensor)
        torch.testing.assert_close(out.a, call.run())


def test_a_tangent_is_refused_not_dropped() -> None:
    x = torch.randn(2, 64)
    weight = quantize_nf4(torch.randn(8, 64))
    with forward_ad.dual_level(), pytest.raises(NotImplementedError):
        qlora_linear(forward_ad.make_dual(x, torch.ones_like(x)), weight)


def test_backward_inside_autocast_has_the_same_bits() -> None:
    call = make_call(BY_NAME["prefill"])
    grad = torch.randn(2, 33, 130)
    _, expected = call.gradients(grad)
    out = call.run()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = torch.autograd.grad(out, call.leaves(), grad)
    assert all(torch.equal(*pair) for pair in zip(found, expected, strict=True))


def test_an_nf4_weight_gets_no_gradient_from_the_backward_operator() -> None:
    call = make_call(BY_NAME["no_adapters"])
    op = torch.ops.collavo.qlora_linear_backward.default
    with pytest.raises(ValueError, match="wanted: a 4-bit weight cannot get a gradient"):
        op(*flat(call), False, torch.randn(6, 48), [True, True, False, False])


def test_a_backend_without_a_backward_stays_one() -> None:
    """So that the reference's serves in its place."""
    (flat,) = on_tokens(Backend("reference", reference.forward))
    assert flat.backward is None
