"""crayon_attention's Triton kernels on the CPU, through Triton's interpreter."""

from __future__ import annotations

import pytest
import torch

from collavo_kernels import check
from collavo_kernels.ops.crayon_attention import reference, triton_kernels
from collavo_kernels.ops.crayon_attention.inputs import AttentionInputs
from collavo_kernels.testing import assert_within_budget, offset_view, poisoned_empty
from collavo_kernels.testing.crayon_attention_cases import CASES, AttentionCase, eager

# The interpreter computes bfloat16 on its bits, so its dtypes are these.
DTYPES = (torch.float32, torch.float16)


def in_float64(inputs: AttentionInputs) -> AttentionInputs:
    return AttentionInputs(
        *(
            x.double() if isinstance(x, torch.Tensor) and x.is_floating_point() else x
            for x in inputs
        )
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_forward(case: AttentionCase, dtype: torch.dtype) -> None:
    inputs = case.make(dtype)
    with poisoned_empty():
        found = triton_kernels.forward(inputs)
    exact = reference.forward(in_float64(inputs))
    out, key, value = eager(inputs)
    assert_within_budget(found.out, out, exact.out, name="out")
    assert_within_budget(found.key, key, exact.key, name="key")
    if inputs.crayon_v is not None:
        assert_within_budget(found.value, value, exact.value, name="value")
    finite = exact.lse.isfinite()
    assert bool((found.lse[~finite] == float("-inf")).all())
    torch.testing.assert_close(
        found.lse[finite].double(),
        exact.lse[finite],
        rtol=1e-5,
        atol=1e-2 if dtype == torch.float16 else 1e-5,
    )
    check()


def test_views_with_odd_offsets() -> None:
    inputs = CASES[0].make(torch.float32)
    views = [offset_view(x) if isinstance(x, torch.Tensor) else x for x in inputs]
    found = triton_kernels.forward(AttentionInputs(*views))
    for one, other in zip(found, triton_kernels.forward(inputs), strict=True):
        assert torch.equal(one, other)


def test_padding_is_never_read() -> None:
    case = next(c for c in CASES if c.name == "left_padding")
    inputs = case.make(torch.float32)
    clean = triton_kernels.forward(inputs).out
    for x in (inputs.q, inputs.k, inputs.v):
        x[0, :6] = float("nan")
    assert torch.equal(triton_kernels.forward(inputs).out, clean)


def test_bad_values_are_reported_and_harmless() -> None:
    inputs = CASES[0].make(torch.float32)
    rows = inputs.row_index.clone()
    rows[0, 5] = 99
    found = triton_kernels.forward(inputs._replace(row_index=rows))
    with pytest.raises(ValueError, match="row_index"):
        check()
    rows[0, 5] = -1
    assert torch.equal(found.out, triton_kernels.forward(inputs._replace(row_index=rows)).out)
    ranges = torch.tensor([[9, 3], [0, 99]], dtype=torch.int32)
    found = triton_kernels.forward(inputs._replace(key_range=ranges))
    with pytest.raises(ValueError, match="key_range"):
        check()
    assert bool((found.out[0] == 0).all()) and bool(found.out.isfinite().all())
