"""Every backend against the reference, forward and gradients, by the error budget."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from collavo_kernels import LoRAAdapter, NF4Weight, qlora_linear, quantize_nf4
from collavo_kernels.ops.qlora_linear import OPERATOR
from collavo_kernels.testing import (
    assert_within_budget,
    offset_view,
    poisoned_empty,
    relative_error,
)
from collavo_kernels.testing.cases.qlora_linear import (
    CASES,
    PANEL_CASES,
    QLoRACase,
    make_call,
)

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
BACKENDS = [b.name for b, reason in OPERATOR.explain("cpu") if reason is None]
NATIVE = "cpu" in BACKENDS


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    # Small cases: on a busy machine threads would only wait for each other.
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def names(case: QLoRACase) -> str:
    return case.name


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("case", [*CASES, *PANEL_CASES], ids=names)
def test_within_budget(case: QLoRACase, dtype: torch.dtype) -> None:
    call = make_call(case, dtype)
    grad = torch.randn(*case.tokens, case.n).to(dtype)
    exact, exact_grads = call.double().gradients(grad)
    low, low_grads = call.gradients(grad, "reference")
    assert low.shape == (*case.tokens, case.n)
    for backend in ("", *(b for b in BACKENDS if not case.dense and b != "reference")):
        with poisoned_empty():
            out, grads = call.gradients(grad, backend)
        assert_within_budget(out, low, exact, name=f"{backend} output")
        for i, triple in enumerate(zip(grads, low_grads, exact_grads, strict=True)):
            assert_within_budget(*triple, name=f"{backend} gradient {i}")


@pytest.mark.parametrize("case", [c for c in CASES if c.k * c.n < 20000], ids=names)
def test_gradcheck_of_the_reference(case: QLoRACase) -> None:
    call = make_call(case).double()

    def forward(*_: Tensor) -> Tensor:
        return call.run("reference")

    leaves = [leaf for leaf in call.leaves() if leaf.numel()]
    assert torch.autograd.gradcheck(forward, leaves, fast_mode=True)


@pytest.mark.parametrize("backend", BACKENDS)
def test_views_with_odd_offsets_and_strides(backend: str) -> None:
    for case in (c for c in CASES if c.name in ("few", "prefill")):
        call = make_call(case)
        plain = call.run(backend)
        odd = call.__class__(
            x=offset_view(call.x),
            weight=call.weight,
            adapters=tuple(
                LoRAAdapter(offset_view(a), offset_view(b), s) for a, b, s in call.adapters
            ),
            adapter_mask=offset_view(call.adapter_mask),
            row_table=offset_view(call.row_table),
            row_index=offset_view(call.row_index),
            bias=None if call.bias is None else offset_view(call.bias),
        )
        assert relative_error(odd.run(backend), plain) < 1e-6


@pytest.mark.parametrize("backend", ["", *BACKENDS[-1:]])
def test_zero_sizes(backend: str) -> None:
    weight = quantize_nf4(torch.randn(32, 64))
    adapter = LoRAAdapter(torch.randn(4, 64), torch.randn(32, 4), 1.0)
    x = torch.randn(2, 0, 64, requires_grad=True)
    out = qlora_linear(x, weight, [adapter], backend=backend)
    assert out.shape == (2, 0, 32)
    out.sum().backward()
    assert x.grad is not None and x.grad.shape == x.shape
    # A table without rows: no token has one.
    tokens = torch.randn(3, 64)
    empty = torch.zeros(0, 32)
    none = torch.full((3,), -1, dtype=torch.int32)
    with_table = qlora_linear(tokens, weight, row_table=empty, row_index=none, backend=backend)
    assert torch.equal(with_table, qlora_linear(tokens, weight, backend=backend))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("tokens", [5, 40], ids=["few", "many"])
def test_what_other_rows_hold_reaches_no_token(backend: str, tokens: int) -> None:
    # A product with a one-hot matrix would give 0 * NaN = NaN everywhere.
    weight = quantize_nf4(torch.randn(32, 64))
    table = torch.randn(3, 32)
    table[1] = float("nan")
    index = (torch.arange(tokens, dtype=torch.int32) % 3) - 1
    x, table = torch.randn(tokens, 64), table.requires_grad_()
    out = qlora_linear(x, weight, row_table=table, row_index=index, backend=backend)
    assert torch.equal(out.isnan().any(1), index == 1)
    grad = torch.ones_like(out)
    grad[index == 1] = float("nan")
    grad[index == -1] = float("inf")
    (found,) = torch.autograd.grad(out, table, grad)
    assert found[0].isfinite().all() and found[1].isnan().all()
    assert torch.equal(found[2], torch.zeros(32))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("tokens", [5, 40], ids=["few", "many"])
def test_a_bias_that_a_row_takes_back_leaves_nothing(backend: str, tokens: int) -> None:
    # Crayon rows ride behind the tokens and must get no bias, which some models have large.
    weight = quantize_nf4(torch.randn(32, 64) / 8)
    x, bias = torch.randn(tokens, 64).bfloat16(), torch.full((32,), 300.0, dtype=torch.bfloat16)
    index = torch.zeros(tokens, dtype=torch.int32)
    options = {"row_table": -bias[None], "row_index": index, "bias": bias, "backend": backend}
    plain = qlora_linear(x, weight, backend=backend)
    torch.testing.assert_close(qlora_linear(x, weight, **options), plain, atol=2e-2, rtol=2e-2)


@pytest.mark.parametrize("backend", BACKENDS)
def test_bytes_of_any_strides(backend: str) -> None:
    weight = quantize_nf4(torch.randn(32, 64))
    strided = NF4Weight(
        weight.packed.repeat(1, 2)[:, :1], weight.scales.repeat_interleave(3)[::3], (32, 64)
    )
    assert not strided.packed.is_contiguous() and not strided.scales.is_contiguous()
    for tokens in (3, 40):
        x = torch.randn(tokens, 64)
        plain = qlora_linear(x, weight, backend=backend)
        assert torch.equal(qlora_linear(x, strided, backend=backend), plain)


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_backward_checks_rows_itself(backend: str) -> None:
    # It can be called without its forward, and writes where the index says.
    weight = quantize_nf4(torch.randn(32, 64))
    rows = torch.tensor([0, 7], dtype=torch.int32)
    call = (torch.randn(2, 64), weight.packed, weight.scales, 32, 64, True, [], [], [], None)
    op = torch.ops.collavo.qlora_linear_backward.default
    with pytest.raises(ValueError, match=r"row_index: expected entries from -1 to 1 .* got 7"):
        flags = [False, False, True, False]
        rest = (torch.zeros(2, 32), rows, None, False, torch.ones(2, 32))
        op(*call, *rest, flags, backend=backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_same_bits_again_and_for_any_number_of_threads(backend: str) -> None:
    # PyTorch's own products, which are the reference, only promise the same bits run to run.
    counts = (1, 1) if backend == "reference" else (1, 2, 3, 8)
    before = torch.get_num_threads()
    try:
        every = [*CASES, *PANEL_CASES]
        for case, dtype in itertools.product(every, (torch.float32, torch.bfloat16)):
            if case.dense:
                continue
            grad = torch.randn(*case.tokens, case.n).to(dtype)
            results = []
            for threads in counts:
                torch.set_num_threads(threads)
                out, grads = make_call(case, dtype).gradients(grad, backend)
                results.append([out, *grads])
            for i, (first, *others) in enumerate(zip(*results, strict=True)):
                assert all(torch.equal(first, each) for each in others), (case.name, dtype, i)
    finally:
        torch.set_num_threads(before)


def test_table_form_equals_dense_form() -> None:
    # DESIGN: W (h + m c) = W h + m (W c): a row per segment gives what a vector per token gives.
    torch.manual_seed(2)
    weight = quantize_nf4(torch.randn(48, 64) / 8)
    adapters = [LoRAAdapter(torch.randn(4, 64) / 8, torch.randn(48, 4) / 2, 2.0) for _ in range(2)]
    h = torch.randn(2, 10, 64, dtype=torch.double, requires_grad=True)
    c = torch.randn(5, 64, dtype=torch.double, requires_grad=True)
    index = torch.randint(-1, 5, (2, 10), dtype=torch.int32)
    factors = [LoRAAdapter(a.double(), b.double(), s) for a, b, s in adapters]
    grad = torch.randn(2, 10, 48, dtype=torch.double)

    table = qlora_linear(c, weight, factors)
    rows = qlora_linear(h, weight, factors, row_table=table, row_index=index)
    row_grads = torch.autograd.grad(rows, (h, c), grad)

    crayon = torch.where((index >= 0)[..., None], c[index.clamp_min(0).long()], 0.0)
    dense = qlora_linear(h + crayon, weight, factors)
    dense_grads = torch.autograd.grad(dense, (h, c), grad)
    torch.testing.assert_close(rows, dense)
    for ours, theirs in zip(row_grads, dense_grads, strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.skipif(not NATIVE, reason="the compiled module is not there")
@pytest.mark.parametrize("isa", ["baseline", "avx2", "avx512"])
def test_every_instruction_set(isa: str, request: pytest.FixtureRequest) -> None:
    from collavo_kernels import _native

    module = _native.native()
    assert module is not None
    if isa not in module.isas():
        pytest.skip(f"this processor or build has no {isa}")
    best = _native.ISA_CODES[module.best_isa()]
    request.addfinalizer(lambda: module.use_isa(best))
    module.use_isa(_native.ISA_CODES[isa])
    for case, dtype in itertools.product([*CASES, *PANEL_CASES], DTYPES):
        if case.dense:
            continue
        call = make_call(case, dtype)
        grad = torch.randn(*case.tokens, case.n).to(dtype)
        exact, exact_grads = call.double().gradients(grad)
        low, low_grads = call.gradients(grad, "reference")
        out, grads = call.gradients(grad, "cpu")
        assert_within_budget(out, low, exact, name=f"{case.name} {dtype}")
        for i, triple in enumerate(zip(grads, low_grads, exact_grads, strict=True)):
            assert_within_budget(*triple, name=f"{case.name} {dtype} gradient {i}")


@pytest.mark.skipif(not NATIVE, reason="the compiled module is not there")
def test_native_dequantisation_is_bit_equal() -> None:
    from collavo_kernels import _native

    module = _native.native()
    assert module is not None
    for (n, k), block, nested in itertools.product(
        [(33, 192), (46, 100), (7, 5)], (32, 64, 128), (False, True)
    ):
        weight = quantize_nf4(torch.randn(n, k), block, nested)
        in_panels = k % 64 == 0 and block >= 64
        orders = [weight, weight.to_panels()] if in_panels else [weight]
        codes = [code for isa, code in _native.ISA_CODES.items() if isa in ("best", *module.isas())]
        for order, dtype, code in itertools.product(orders, DTYPES, codes):
            pointers = (order.packed.data_ptr(), order.scales.data_ptr())
            facts = (*pointers, n, k, block, int(nested), int(order.in_panels))
            out = torch.full((n, k), float("nan"), dtype=dtype)
            panel, kind = (0, n, 0, k), _native.DTYPE_CODES[dtype]
            module.qlora_linear_dequantize(code, facts, panel, kind, out.data_ptr(), k)
            assert torch.equal(out, weight.dequantize(dtype)), (n, k, block, nested, code)
