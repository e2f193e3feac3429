"""qlora_linear's Triton kernels, compiled for GPUs that are not there: no spills, memory fits."""

from __future__ import annotations

import pytest

pytest.importorskip("triton", reason="triton is not installed")

from collavo_kernels.ops.qlora_linear import triton_kernels
from collavo_kernels.testing.aot import TARGETS, compile_ahead

SCALES = {
    True: {"absmax": "*u8", "nested_absmax": "*fp32", "nested_code": "*fp32", "offset": "*fp32"},
    False: {"absmax": "*fp32", "nested_absmax": "*fp32", "nested_code": "*fp32", "offset": "*fp32"},
}
SIZES = {"m": "i32", "n": "i32", "k": "i32", "ranks": "i32"}
FACTS = {"BLOCK_SIZE": 64, "ALIGNED": True, "BLOCK_N": 64, "BLOCK_K": 64, "BLOCK_R": 16}


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("block_m", [16, 64])
@pytest.mark.parametrize("nested", [True, False], ids=["nested", "plain"])
def test_forward(target: str, block_m: int, nested: bool) -> None:
    half = "*bf16"
    types = {"x": half, "packed": "*u8", **SCALES[nested], "code": "*fp32", "hidden": half}
    types |= {"joined_b": half, "table": half, "row_index": "*i32", "bias": half}
    types |= {"errors": "*i32", "out": half, **SIZES, "table_rows": "i32"}
    values = FACTS | {"NESTED": nested, "HAS_TABLE": True, "HAS_BIAS": True, "BLOCK_M": block_m}
    kernel = compile_ahead(
        triton_kernels._forward_kernel,
        types,
        values,
        target,
        num_warps=triton_kernels.WARPS,
    )
    assert kernel.spill_bytes == 0
    assert kernel.shared_bytes <= kernel.shared_limit


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("block_m", [16, 64])
def test_gradient_of_x(target: str, block_m: int) -> None:
    half = "*bf16"
    types = {"grad": half, "packed": "*u8", **SCALES[True], "code": "*fp32", "upstream": half}
    types |= {"joined_a": half, "out": half, **SIZES}
    values = FACTS | {"NESTED": True, "BLOCK_M": block_m}
    kernel = compile_ahead(
        triton_kernels._grad_x_kernel,
        types,
        values,
        target,
        num_warps=triton_kernels.WARPS,
    )
    assert kernel.spill_bytes == 0
    assert kernel.shared_bytes <= kernel.shared_limit
