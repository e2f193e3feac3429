"""What a call allocates: never a dense weight, in either order, forward or backward."""

from __future__ import annotations

import pytest
import torch

from collavo_kernels import LoRAAdapter, NF4Weight, qlora_linear, quantize_nf4
from collavo_kernels._native import native
from collavo_kernels.testing import peak_megabytes

pytestmark = pytest.mark.skipif(native() is None, reason="the compiled module is not there")
SIZE = 4096


@pytest.fixture(scope="module")
def weight() -> NF4Weight:
    return quantize_nf4(torch.randn(SIZE, SIZE) / SIZE**0.5)


@pytest.mark.parametrize("tokens", [1, 80], ids=["few", "many"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("in_panels", [True, False], ids=["panels", "rows"])
def test_no_dense_weight(
    weight: NF4Weight, tokens: int, dtype: torch.dtype, in_panels: bool
) -> None:
    base = weight.to_panels() if in_panels else weight
    a = (torch.randn(8, SIZE) / SIZE**0.5).to(dtype).requires_grad_()
    b = (torch.randn(SIZE, 8) / 8**0.5).to(dtype).requires_grad_()
    x = torch.randn(tokens, SIZE).to(dtype).requires_grad_()

    def step() -> None:
        out = qlora_linear(x, base, [LoRAAdapter(a, b)], backend="cpu")
        torch.autograd.grad(out, (x, a, b), torch.ones_like(out))

    # Half of the smallest dense copy there could be leaves room for strips and copies of x.
    assert peak_megabytes(step, torch.device("cpu")) < SIZE * SIZE * 2 / 2 / 1e6


def test_the_measure_sees_a_dense_weight(weight: NF4Weight) -> None:
    # The reference makes strips of 16 MiB, far above the bound.
    x = torch.randn(4, SIZE)

    def call() -> None:
        qlora_linear(x, weight, backend="reference")

    assert peak_megabytes(call, torch.device("cpu")) > SIZE * SIZE * 2 / 2 / 1e6
