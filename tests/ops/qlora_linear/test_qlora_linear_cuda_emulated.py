"""The CUDA backend without a GPU: its kernels, compiled for the CPU, on an emulated one.

``cuda_emulation/emulated_gpu.h`` stands in for the few instructions that C++ has no word for. All
else is the code that a GPU runs: kernels, launchers, and ``cuda.py`` on CPU tensors. What it cannot
show: speed, and faults of the replaced instructions themselves.
"""

from __future__ import annotations

import ctypes
import itertools
import shutil
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

import collavo_kernels
from collavo_kernels import quantize_nf4
from collavo_kernels.ops.qlora_linear import OPERATOR, cuda
from collavo_kernels.ops.qlora_linear.inputs import Gradients, QLoRAInputs, QLoRAResult
from collavo_kernels.testing import assert_within_budget, backward_arguments, poisoned_empty
from collavo_kernels.testing.cases.qlora_linear import CASES, QLoRACall, QLoRACase, make_call

ROOT = Path(__file__).resolve().parents[3]
HERE = Path(__file__).with_name("cuda_emulation")
SOURCES = (
    HERE / "library.cpp",
    *(ROOT / f"csrc/qlora_linear/cuda/{n}.cu" for n in ("rows", "strip")),
)
FLAGS = (
    "-std=c++17 -O1 -fPIC -shared -ffp-contract=off -Wall -Wextra -Werror -Wno-unknown-pragmas "
    "-Wno-unused-function -Wno-clobbered -DCOLLAVO_EMULATED -x c++"
)
NF4_CASES = [case for case in CASES if not case.dense]
HALVES = (torch.bfloat16, torch.float16)
EVERYTHING = QLoRACase("few", "", (7,), 150, 320, (3, 20), mask=True, rows=5, bias=True)
# Clusters or not, processors, shared memory of one.
H200 = (1, 132, 228 * 1024)
A100 = (0, 108, 164 * 1024)


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("needs g++")
    target = tmp_path_factory.mktemp("emulated") / "library.so"
    folders = [f"-I{ROOT / 'csrc'}", f"-I{HERE}"]
    command = [compiler, *FLAGS.split(), *folders, *map(str, SOURCES), "-o", str(target)]
    subprocess.run(command, check=True)
    loaded = ctypes.CDLL(str(target))
    loaded.emulated_memory.restype = ctypes.c_void_p
    return loaded


@pytest.fixture(autouse=True)
def device(
    library: ctypes.CDLL, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Callable[[int, int, int], None]]:
    def check(error: int, what: str) -> None:
        if error:
            raise RuntimeError(f"{what}: {error}")
        library.emulated_finish()

    monkeypatch.setattr(cuda, "_library", lambda: library)
    monkeypatch.setattr(cuda, "cuda_check", check)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    library.emulated_device(*H200)
    yield library.emulated_device
    torch.set_num_threads(threads)


def forward(inputs: QLoRAInputs) -> Tensor:
    return cuda.forward(inputs).out


def backward(inputs: QLoRAInputs, grad: Tensor, wanted: list[bool] | None = None) -> Gradients:
    result = QLoRAResult(inputs.x)  # nothing of it is kept
    return cuda.backward(*backward_arguments(OPERATOR, inputs, result, (grad,), wanted))


def in_order_of_leaves(found: Gradients) -> list[Tensor]:
    factors = itertools.chain.from_iterable(zip(found.a, found.b, strict=True))
    return [g for g in (found.x, *factors, found.row_table, found.bias) if g is not None]


def check_forward(case: QLoRACase, dtype: torch.dtype) -> None:
    call = make_call(case, dtype)
    with poisoned_empty():
        out = cuda.forward(call.inputs()).out.view(*case.tokens, case.n)
    assert_within_budget(out, call.run("reference"), call.double().run("reference"))


@pytest.mark.parametrize("dtype", (torch.float32, *HALVES), ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("case", NF4_CASES, ids=lambda c: c.name)
def test_within_budget(case: QLoRACase, dtype: torch.dtype) -> None:
    call = make_call(case, dtype)
    grad = torch.randn(*case.tokens, case.n).to(dtype)
    exact, exact_grads = call.double().gradients(grad)
    low, low_grads = call.gradients(grad, "reference")
    inputs = call.inputs()
    assert cuda.declines(inputs) is None
    with poisoned_empty():
        out = cuda.forward(inputs).out.view(low.shape)
        found = backward(inputs, grad.view(-1, case.n))
    assert_within_budget(out, low, exact)
    for i, triple in enumerate(zip(in_order_of_leaves(found), low_grads, exact_grads, strict=True)):
        ours, low_grad, exact_grad = triple
        shaped = ours.view(low_grad.shape)
        assert_within_budget(shaped, low_grad, exact_grad, name=f"gradient {i}")


@pytest.mark.parametrize("dtype", HALVES, ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("tokens", range(1, 17))
def test_every_token_count(
    tokens: int, dtype: torch.dtype, device: Callable[[int, int, int], None]
) -> None:
    # A few processors: blocks of 128 rows, of which the last is not full; K ends in half a chunk.
    device(1, 16, 228 * 1024)
    check_forward(replace(EVERYTHING, tokens=(tokens,)), dtype)


@pytest.mark.parametrize(
    ("n", "k", "machine", "cluster"),
    [
        pytest.param(70, 2112, (1, 8, 228 * 1024), 8, id="8 blocks share out an odd K"),
        pytest.param(33, 1024, (1, 8, 228 * 1024), 4, id="4 blocks, one tile of rows"),
        pytest.param(200, 512, (1, 16, 228 * 1024), 2, id="2 blocks of 128 rows"),
        pytest.param(100, 4096, H200, 4, id="4 blocks of 32 rows"),
        pytest.param(150, 320, A100, 1, id="no clusters"),
        pytest.param(40, 2112, (0, 108, 90 * 1024), 1, id="x passes shared memory in windows"),
        pytest.param(40, 2112, (1, 8, 90 * 1024), 8, id="windows in clusters"),
        pytest.param(5, 64, (1, 1, 228 * 1024), 1, id="less than a chunk, fewer rows than a tile"),
    ],
)
def test_shapes_of_blocks(
    n: int,
    k: int,
    machine: tuple[int, int, int],
    cluster: int,
    library: ctypes.CDLL,
) -> None:
    library.emulated_device(*machine)
    for tokens, dtype in ((3, torch.float16), (16, torch.bfloat16)):
        check_forward(replace(EVERYTHING, n=n, k=k, tokens=(tokens,)), dtype)
        assert library.emulated_cluster() == cluster


@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("block_size", [64, 128, 4096])
def test_scales_of_every_kind(block_size: int, double_quant: bool) -> None:
    case = replace(EVERYTHING, block_size=block_size, double_quant=double_quant, k=192)
    check_forward(case, torch.bfloat16)


@pytest.mark.parametrize("tokens", [5, 20], ids=["decode", "strips"])
def test_reads_nothing_beyond_its_inputs(tokens: int, library: ctypes.CDLL) -> None:
    # Each input ends at a page that cannot be read: an access beyond it ends the process.
    def guarded(value: Tensor) -> Tensor:
        size = value.numel() * value.element_size()
        where = (ctypes.c_uint8 * size).from_address(library.emulated_memory(size))
        return torch.frombuffer(where, dtype=value.dtype).view(value.shape).copy_(value)

    inputs = make_call(replace(EVERYTHING, tokens=(tokens,)), torch.bfloat16).inputs()
    names = ("x", "weight", "scales", "adapter_mask", "row_table", "row_index", "bias")
    tensors = {name: guarded(getattr(inputs, name)) for name in names}
    lists = {name: [guarded(each) for each in getattr(inputs, name)] for name in ("a", "b")}
    at_the_edge = inputs._replace(**tensors, **lists)
    assert torch.equal(cuda.forward(at_the_edge).out, cuda.forward(inputs).out)
    grad = guarded(torch.randn(tokens, EVERYTHING.n).bfloat16())
    backward(at_the_edge, grad)


@pytest.mark.parametrize("tokens", [7, 20], ids=["decode", "strips"])
def test_bad_rows_count_as_none_and_are_reported(tokens: int) -> None:
    inputs = make_call(replace(EVERYTHING, tokens=(tokens,)), torch.bfloat16).inputs()
    bad, none = inputs.row_index.clone(), inputs.row_index.clone()
    bad[2], bad[3] = 5, -7
    none[2] = none[3] = -1
    grad = torch.randn(tokens, EVERYTHING.n).bfloat16()
    for run in (forward, lambda i: backward(i, grad).row_table):
        expected = run(inputs._replace(row_index=none))
        collavo_kernels.check("cpu")
        assert torch.equal(run(inputs._replace(row_index=bad)), expected)
        with pytest.raises(ValueError, match="row_index: an entry lies outside"):
            collavo_kernels.check("cpu")
        # The same without a table's rows, where no index is good.
        with_none = inputs._replace(row_table=inputs.row_table[:0])
        if run is forward:
            run(with_none)
            with pytest.raises(ValueError, match="row_index"):
                collavo_kernels.check("cpu")


@pytest.mark.parametrize("tokens", [9, 20], ids=["decode", "strips"])
def test_an_idle_adapter_sees_nothing(tokens: int) -> None:
    inputs = make_call(replace(EVERYTHING, tokens=(tokens,)), torch.bfloat16).inputs()
    mask = torch.full((tokens,), 3, dtype=torch.uint8)
    mask[4] = 2
    inputs = inputs._replace(adapter_mask=mask)
    grad = torch.randn(tokens, EVERYTHING.n).bfloat16()
    for poison in (float("nan"), float("inf")):
        x, g = inputs.x.clone(), grad.clone()
        x[4, 0] = g[4, 1] = poison
        out = forward(inputs._replace(x=x))
        assert out[torch.arange(tokens) != 4].isfinite().all()
        found = backward(inputs._replace(x=x), g)
        assert found.a[0].isfinite().all() and found.b[0].isfinite().all()
        assert not found.a[1].isfinite().all() and not found.b[1].isfinite().all()
    # Nor does the token see the adapter's A.
    a = [inputs.a[0].clone().fill_(float("nan")), inputs.a[1]]
    assert forward(inputs._replace(a=a))[4].isfinite().all()


def test_only_what_is_asked_for() -> None:
    inputs = make_call(replace(EVERYTHING, tokens=(20,)), torch.float32).inputs()
    grad = torch.randn(20, EVERYTHING.n)
    every = backward(inputs, grad)
    # In order: x, weight, a of both adapters, b of both, row_table, bias.
    found = backward(inputs, grad, [i == 3 for i in range(8)])
    assert torch.equal(found.a[1], every.a[1])
    assert [found.x, found.row_table, found.bias, found.a[0], *found.b] == [None] * 6
    only_x = backward(inputs, grad, [i == 0 for i in range(8)])
    assert torch.equal(only_x.x, every.x)
    assert [only_x.row_table, only_x.bias, *only_x.a, *only_x.b] == [None] * 6


@pytest.mark.parametrize("n", [70, 516])
@pytest.mark.parametrize("dtype", (torch.float32, *HALVES), ids=lambda d: str(d)[6:])
def test_sums_of_rows_keep_the_order_of_tokens(n: int, dtype: torch.dtype) -> None:
    # More tokens than a block looks at together, more columns than a block has, and rows that many,
    # one or no tokens have. In float32 a sum in another order would differ.
    inputs = make_call(replace(EVERYTHING, n=n, k=64, tokens=(300,)), dtype).inputs()
    index = torch.randint(0, 2, (300,), dtype=torch.int32)
    index[7], index[8] = 3, -1
    grad = torch.randn(300, n).to(dtype)
    expected = torch.zeros(5, n)
    for token, row in enumerate(index.tolist()):
        if row >= 0:
            expected[row] += grad[token].float()
    only_table = [i == 6 for i in range(8)]
    found = backward(inputs._replace(row_index=index), grad, only_table).row_table
    assert torch.equal(found, expected.to(dtype))


def test_decoded_weight_is_bit_equal() -> None:
    for (n, k), block, nested in itertools.product(
        [(33, 192), (46, 100), (7, 5)], (32, 64, 128), (False, True)
    ):
        weight = quantize_nf4(torch.randn(n, k), block, nested)
        for dtype in (torch.float32, *HALVES):
            x = torch.randn(1, k).to(dtype)
            call = QLoRACall(x, weight, (), None, None, None, None)
            inputs = call.inputs()
            for r, c in ((0, 0), (3, 0), (1, k // 2), (2, 8)):
                if c >= k:
                    continue
                out = torch.full((n - r, k - c), float("nan"), dtype=dtype)
                part = cuda.weight_fields(inputs), cuda.Branches([]), out
                cuda._fill_strip(*part, row=r, column=c)
                assert torch.equal(out, weight.dequantize(dtype)[r:, c:]), (n, k, block, nested)


@pytest.mark.parametrize("limit", [1 << 10, 40 << 10, 16 << 20])
def test_strips_are_few(limit: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each ends in a wave of the product that fills a part of the GPU; only memory asks for any."""
    monkeypatch.setattr(cuda, "_STRIP_BYTES", limit)
    for width, count in ((320, 150), (64, 3000), (100, 40)):
        strips = list(cuda._strips(torch.empty(1, width, dtype=torch.bfloat16), count))
        starts, stops = [s for s, _, _ in strips], [s for _, s, _ in strips]
        assert [0, *stops[:-1]] == starts and stops[-1] == count
        assert len({memory.untyped_storage().data_ptr() for *_, memory in strips}) == 1
        # Strips start at multiples of 8, so that rows of an output stay aligned.
        assert all(start % 8 == 0 for start in starts)
        assert all(m.numel() * 2 <= max(limit, 8 * width * 2) for *_, m in strips)
        # Rounding to 8 makes room for one more.
        assert len(strips) <= -(-width * count * 2 // max(limit, 8 * width * 2)) + 1
    call = make_call(replace(EVERYTHING, tokens=(20,)), torch.float32)
    grad = torch.randn(20, EVERYTHING.n)
    out, grads = call.gradients(grad, "reference")
    inputs = call.inputs()
    torch.testing.assert_close(forward(inputs), out, rtol=1e-4, atol=1e-4)
    found = in_order_of_leaves(backward(inputs, grad))
    torch.testing.assert_close(found[0], grads[0], rtol=1e-4, atol=1e-4)


def test_what_it_declines() -> None:
    inputs = make_call(EVERYTHING, torch.bfloat16).inputs()
    assert "dense" in str(cuda.declines(inputs._replace(scales=None)))
    assert "float64" in str(cuda.declines(inputs._replace(x=inputs.x.double())))
    assert "nothing to compute" in str(cuda.declines(inputs._replace(x=inputs.x[:0])))
    assert "8 adapters, not 9" in str(cuda.declines(inputs._replace(a=inputs.a[:1] * 9)))
