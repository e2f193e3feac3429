"""The Triton kernels compiled for GPUs that are not here: they fit and keep to their registers."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")

from collavo_kernels.ops.crayon_attention import triton_kernels
from collavo_kernels.testing.aot import TARGETS, compile_ahead
from collavo_kernels.testing.crayon_attention_cases import AttentionCase

POINTERS = ("q", "k", "v", "table_q", "table_k", "table_v", "key", "value", "out")
INTEGERS = ("row_index", "key_range", "flags")


def signature(element: str) -> dict[str, str]:
    types = {name: f"*{element}" for name in POINTERS}
    types |= {name: "*i32" for name in INTEGERS}
    types |= {"cos": "*fp32", "sin": "*fp32", "lse": "*fp32", "scale_log2": "fp32"}
    strides = [f"{x}_{axis}" for x in "qkv" for axis in ("batch", "token", "head")]
    scalars = ("angle_batch", "length", "heads", "groups", "rows", "window")
    return types | dict.fromkeys((*strides, *scalars), "i32")


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize(
    ("size", "element"),
    [(64, "bf16"), (80, "bf16"), (128, "bf16"), (256, "bf16"), (256, "fp32")],
)
def test_attend_fits(size: int, element: str, target: str) -> None:
    """With every switch on. 96 shares 128's blocks and padding, float16 shares bfloat16's, and in
    float32 the largest head dim needs most."""
    options = triton_kernels.tuning(size, 4 if element == "fp32" else 2)
    launch = {name: options.pop(name) for name in ("num_warps", "num_stages")}
    switches = dict.fromkeys(("ADD_Q", "HAS_RANGE", "CAUSAL", "WINDOW"), True)
    precision = "ieee" if element == "fp32" else "tf32"
    constants = {**triton_kernels.padded(size), **options, **switches, "PRECISION": precision}
    kernel = triton_kernels.attend_kernel
    built = compile_ahead(kernel, signature(element), constants, target, **launch)
    assert built.shared_bytes <= built.shared_limit
    assert built.spill_bytes == 0, built


@pytest.mark.parametrize("target", TARGETS)
def test_prepare_fits(target: str) -> None:
    constants = {**triton_kernels.padded(256), "BLOCK": triton_kernels.prepare_block(256)}
    constants |= dict.fromkeys(("ADD_K", "ADD_V", "HAS_ROWS"), True)
    del constants["WHOLE"]
    built = compile_ahead(triton_kernels.prepare_kernel, signature("bf16"), constants, target)
    assert built.shared_bytes <= built.shared_limit
    assert built.spill_bytes == 0, built


def test_what_a_launch_cannot_hold_is_declined_or_copied() -> None:
    """Heads of all samples are a launch's second dimension; a head's offset is an int32."""
    inputs = AttentionCase("big", "", 2, 1, heads=32, groups=32, size=2, images=()).make(
        torch.float32
    )
    many = inputs.q.to("meta").expand(2, 1, 32, 2).repeat(1024, 1, 1, 1)
    assert triton_kernels.declines(inputs) is None
    assert "65535" in (triton_kernels.declines(inputs._replace(q=many)) or "")
    far = torch.empty_strided((1, 2, 4, 8), (2**33, 8, 2**30, 1), device="meta")
    assert triton_kernels._dense(far).is_contiguous()
    assert triton_kernels._dense(many) is many
