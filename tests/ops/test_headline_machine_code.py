"""The machine code of the launches whose speed is claimed, on a Hopper GPU that is not there."""

from __future__ import annotations

import pytest

pytest.importorskip("triton", reason="triton is not installed")

from collavo_kernels.testing.aot import assembler_warnings
from collavo_kernels.testing.gpu_stand_in import StandIn, gpu_stand_in
from collavo_kernels.testing.headline import attend, multiply

# Matrix products are wgmma in all of them, by 64 rows or more.
ATTENTION = {"attend_kernel", "key_gradients_kernel", "query_gradients_kernel"}
LINEAR = {"linear_kernel", "grad_x_kernel"}


@pytest.fixture(scope="module")
def compiled() -> StandIn:
    with gpu_stand_in() as gpu:
        for tokens in (1, 16, 128, 1024, 2048):
            multiply(tokens)
        for kv_heads in (8, 32):
            attend(1325, kv_heads)
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
