"""qlora_linear's Triton kernels on the CPU, through Triton's interpreter."""

from __future__ import annotations

import pytest
import torch

from collavo_kernels import check
from collavo_kernels.ops.qlora_linear import triton_kernels
from collavo_kernels.ops.qlora_linear.inputs import GradientMask, QLoRAInputs
from collavo_kernels.testing import assert_within_budget, poisoned_empty
from collavo_kernels.testing.qlora_linear_cases import CASES, QLoRACall, QLoRACase, make_call

# The interpreter computes bfloat16 on its bits, so its dtypes are these.
DTYPES = (torch.float32, torch.float16)
SMALL = [c for c in CASES if not c.dense and c.k % 2 == 0 and c.n < 1000]


def bundle(call: QLoRACall) -> QLoRAInputs:
    def plain(value: torch.Tensor | None) -> torch.Tensor | None:
        return None if value is None else value.detach()

    weight = call.weight
    index, mask = call.row_index, call.adapter_mask
    return QLoRAInputs(
        call.x.detach().flatten(0, -2),
        weight.packed,
        weight.scales,
        weight.shape[0],
        weight.block_size,
        weight.double_quant,
        [each.a.detach() for each in call.adapters],
        [each.b.detach() for each in call.adapters],
        [each.scaling for each in call.adapters],
        None if mask is None else mask.flatten(),
        plain(call.row_table),
        None if index is None else index.flatten(),
        plain(call.bias),
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("case", SMALL, ids=lambda c: c.name)
def test_forward_and_gradient_of_x(case: QLoRACase, dtype: torch.dtype) -> None:
    call = make_call(case, dtype)
    grad = torch.randn(*case.tokens, case.n).to(dtype)
    exact, exact_grads = call.double().gradients(grad)
    low, low_grads = call.gradients(grad, "reference")
    inputs = bundle(call)
    everything = GradientMask(True, False, case.rows is not None, case.bias, *_both(case))
    with poisoned_empty():
        out = triton_kernels.forward(inputs)
        grads = triton_kernels.backward(inputs, grad.flatten(0, -2), everything)
    assert_within_budget(out.view(exact.shape), low, exact)
    assert grads.x is not None
    assert_within_budget(grads.x.view(call.x.shape), low_grads[0], exact_grads[0], name="dx")
    check()


def _both(case: QLoRACase) -> tuple[list[bool], list[bool]]:
    every = [True] * len(case.ranks)
    return every, every


def test_a_bad_row_counts_as_none_and_is_reported() -> None:
    case = next(c for c in SMALL if c.name == "few")
    call = make_call(case)
    inputs = bundle(call)
    assert inputs.row_index is not None
    inputs.row_index.fill_(-1)
    expected = triton_kernels.forward(inputs)
    inputs.row_index[2], inputs.row_index[3] = 5, -7
    assert torch.equal(triton_kernels.forward(inputs), expected)
    with pytest.raises(ValueError, match="row_index"):
        check()
