"""The machine code of the launches whose speed is claimed, on a Hopper GPU that is not there."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")

from collavo_kernels import LoRAAdapter, NF4Weight, crayon_attention, qlora_linear
from collavo_kernels.ops.qlora_linear.nf4 import packed_bytes, scale_bytes
from collavo_kernels.testing.aot import assembler_warnings
from collavo_kernels.testing.gpu_stand_in import StandIn, gpu_stand_in

LOW = torch.bfloat16
# Matrix products are wgmma in all of them, by 64 rows or more.
ATTENTION = {"attend_kernel", "key_gradients_kernel", "query_gradients_kernel"}
LINEAR = {"linear_kernel", "grad_x_kernel"}


def attend(tokens: int, groups: int) -> None:
    """Forward and backward as a 7B LLaMA trains, one image."""
    sizes = [(1, tokens, heads, 128) for heads in (32, groups, groups)]
    sizes += [(12, heads, 128) for heads in (32, groups, groups)]
    q, k, v, *tables = leaves = [torch.empty(s, dtype=LOW).requires_grad_() for s in sizes]
    angles = torch.empty(1, tokens, 128, dtype=LOW)
    row_index = torch.zeros(1, tokens, dtype=torch.int32)
    given = dict(zip(("crayon_q", "crayon_k", "crayon_v"), tables, strict=True))
    given |= {"cos": angles, "sin": angles, "row_index": row_index}
    out = crayon_attention(q, k, v, **given, backend="triton").out
    torch.autograd.grad(out, leaves, torch.empty_like(out))


def multiply(tokens: int) -> None:
    """Forward and backward of a 4096 x 4096 layer with two adapters."""
    size = (4096, 4096)
    packed = torch.empty(packed_bytes(size), 1, dtype=torch.uint8)
    scales = torch.empty(scale_bytes(size, 64, True), dtype=torch.uint8)
    weight = NF4Weight(packed, scales, size, 64, True, LOW)
    factors = [torch.empty(64, 4096, dtype=LOW).requires_grad_() for _ in range(4)]
    adapters = [LoRAAdapter(factors[i], factors[i + 1].mT.contiguous(), 0.5) for i in (0, 2)]
    x = torch.empty(tokens, 4096, dtype=LOW).requires_grad_()
    out = qlora_linear(x, weight, adapters, backend="triton")
    torch.autograd.grad(out, [x, factors[0]], torch.empty_like(out))


@pytest.fixture(scope="module")
def compiled() -> StandIn:
    with gpu_stand_in() as gpu:
        for tokens in (1, 16, 128, 2048):
            multiply(tokens)
        for groups in (8, 32):
            attend(1325, groups)
    return gpu


@pytest.mark.parametrize("kernel", sorted(ATTENTION | LINEAR))
def test_matrix_products_do_not_wait_for_each_other(kernel: str, compiled: StandIn) -> None:
    """Hopper's products run on while the next tile is made ready. A use of their sums in between
    serialises them, which costs a third and more of the speed; the assembler says so, and Triton
    does not pass it on."""
    found = [each for each in compiled.compilations if each.kernel == kernel]
    code = [each.files["ptx"].read_text() for each in found]
    assert any("wgmma" in text for text in code), [each.kernel for each in compiled.compilations]
    for text in code:
        assert assembler_warnings(text) == ()
