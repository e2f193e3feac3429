"""qlora_linear's Triton kernels on the CPU, through Triton's interpreter."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from collavo_kernels import check
from collavo_kernels.ops.qlora_linear import OPERATOR, reference
from collavo_kernels.ops.qlora_linear.inputs import (
    Gradients,
    QLoRAInputs,
    QLoRAResult,
)
from collavo_kernels.ops.qlora_linear.triton import launch, tiles
from collavo_kernels.testing import (
    assert_within_budget,
    backward_arguments,
    poisoned_empty,
    relative_error,
)
from collavo_kernels.testing.cases.qlora_linear import CASES, QLoRACase, make_call

# The interpreter computes bfloat16 on its bits, so its dtypes are these.
DTYPES = (torch.float32, torch.float16)
# The backend declines a dense weight and an odd K.
SERVED = [c for c in CASES if not c.dense and c.k % 2 == 0]
SPLIT = (
    QLoRACase("split_few", "decoding shares K out, hidden values too; a last share is shorter",
              (3,), 70, 1344, (5, 16), mask=True, rows=4, bias=True),
    QLoRACase("split_more", "shares with wide adapters, above 16 tokens, scales of 128",
              (20,), 40, 1152, (4, 8), block_size=128, wide_adapters=True, mask=True),
    QLoRACase("split_unaligned", "shares whose rows are no whole chunks", (2,), 35, 1100, (3,)),
    QLoRACase("split_joined", "three adapters are joined", (2,), 35, 1088, (3, 4, 2), mask=True),
)  # fmt: skip


def backward(
    inputs: QLoRAInputs, grad: Tensor, wanted: list[bool] | None = None, module: Any = launch
) -> Gradients:
    result = QLoRAResult(inputs.x)  # nothing of it is kept
    return module.backward(*backward_arguments(OPERATOR, inputs, result, (grad,), wanted))


def listed(found: Gradients) -> list[Tensor | None]:
    """The gradients in the order of a call's leaves."""
    factors = [each for pair in zip(found.a, found.b, strict=True) for each in pair]
    some = [each for each in (found.row_table, found.bias) if each is not None]
    return [found.x, *factors, *some]


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("case", [*SERVED, *SPLIT], ids=lambda c: c.name)
def test_forward_and_gradients(case: QLoRACase, dtype: torch.dtype) -> None:
    call = make_call(case, dtype)
    grad = torch.randn(*case.tokens, case.n).to(dtype)
    exact, exact_grads = call.double().gradients(grad)
    low, low_grads = call.gradients(grad, "reference")
    inputs = call.inputs()
    with poisoned_empty():
        out = launch.forward(inputs).out
        found = backward(inputs, grad.flatten(0, -2))
    assert_within_budget(out.view(exact.shape), low, exact)
    grads = listed(found)
    assert len(grads) == len(low_grads)
    for i, (each, *others) in enumerate(zip(grads, low_grads, exact_grads, strict=True)):
        assert each is not None
        assert_within_budget(each.view(others[0].shape), *others, name=f"gradient {i}")
    check()


@pytest.mark.parametrize("case", SPLIT, ids=lambda c: c.name)
def test_shares_give_the_same_bits_again_and_the_same_sums(
    case: QLoRACase, monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs = make_call(case).inputs()
    launched: list[int] = []
    shares = tiles.shares_of

    def recorded(steps: int, wanted: int) -> tuple[int, int]:
        launched.append(shares(steps, wanted)[0])
        return shares(steps, wanted)

    monkeypatch.setattr(tiles, "shares_of", recorded)
    split = launch.forward(inputs).out
    assert launched[-1] > 1, "the case does not share anything out"
    assert torch.equal(launch.forward(inputs).out, split)
    monkeypatch.setattr(tiles, "processors", lambda device: 0)
    launched.clear()
    whole = launch.forward(inputs).out
    assert max(launched) == 1
    assert relative_error(whole, split) < 1e-5


def test_only_what_is_asked_for_comes() -> None:
    inputs = make_call(next(c for c in SERVED if c.name == "few")).inputs()
    grad = torch.randn(inputs.x.shape[0], inputs.out_features)
    # x, weight, a of both adapters, b of both, row_table, bias
    wanted = [False, False, False, True, True, False, False, True]
    found = backward(inputs, grad, wanted)
    given = [each is not None for each in listed(found)]
    # x, a and b of the first adapter, of the second, bias; no table, which is left out of the list.
    assert given == [False, False, True, True, False, True]
    expected = backward(inputs, grad, wanted, reference)
    for ours, theirs in zip(listed(found), listed(expected), strict=True):
        assert (ours is None) == (theirs is None)
        assert ours is None or theirs is None or relative_error(ours, theirs) < 1e-5


@pytest.mark.parametrize("tokens", [6, 40], ids=["few", "many"])
def test_what_an_idle_token_holds_reaches_no_adapter(tokens: int) -> None:
    # 0 * NaN is NaN: the token's own rows must not take part, neither x's nor the gradient's.
    case = replace(next(c for c in SERVED if c.name == "few"), tokens=(tokens,))
    inputs = make_call(case).inputs()
    assert inputs.adapter_mask is not None
    inputs.adapter_mask.fill_(3)
    inputs.adapter_mask[2] = 2
    inputs.x[2] = float("nan")
    grad = torch.randn(tokens, inputs.out_features)
    grad[2] = float("inf")
    found = backward(inputs, grad)
    (a, idle_a), (b, idle_b) = found.a, found.b
    assert a is not None and b is not None and idle_a is not None and idle_b is not None
    assert a.isfinite().all() and b.isfinite().all()
    assert not idle_a.isfinite().any() and not idle_b.isfinite().any()
    # An adapter whose values are not finite reaches only the tokens that it is active for.
    inputs.x[2] = 1.0
    inputs.a[0].fill_(float("nan"))
    out = launch.forward(inputs).out
    assert torch.equal(out.isfinite().all(1), torch.arange(tokens) == 2)


@pytest.mark.parametrize("apart", [0, 640], ids=["together", "in_several_stretches"])
def test_rows_keep_infinity_and_nan_to_themselves(apart: int) -> None:
    # The sum over a row's tokens is a product with 0 and 1, where 0 * NaN would be NaN. Tokens far
    # apart are summed by several programs, which both infinities of a row then come from.
    tokens = 80 + apart
    case = replace(next(c for c in SERVED if c.name == "few"), tokens=(tokens,), rows=70)
    inputs = make_call(case).inputs()
    assert inputs.row_index is not None
    inputs.row_index.fill_(-1)
    place = torch.arange(75)
    place[60:] += apart
    inputs.row_index[place] = torch.arange(75, dtype=torch.int32) % 70
    grad = torch.randn(tokens, inputs.out_features)
    grad[place[1], 3], grad[place[71], 4] = float("inf"), float("nan")
    grad[place[2], 5], grad[place[72], 5] = float("inf"), -float("inf")
    grad[place[66], 6] = -float("inf")
    grad[place[74] + 3] = float("nan")
    found = backward(inputs, grad, [i == 6 for i in range(8)]).row_table
    exact = torch.zeros(70, inputs.out_features).index_add_(0, torch.arange(75) % 70, grad[place])
    assert found is not None
    torch.testing.assert_close(found, exact, equal_nan=True)
    assert found.isnan().sum() == 2 and found.isinf().sum() == 2


def test_a_bad_row_counts_as_none_and_is_reported() -> None:
    case = next(c for c in SERVED if c.name == "few")
    inputs = make_call(case).inputs()
    assert inputs.row_index is not None
    inputs.row_index.fill_(-1)
    grad = torch.randn(inputs.x.shape[0], inputs.out_features)
    expected = launch.forward(inputs).out
    none = backward(inputs, grad).row_table
    check()
    inputs.row_index[2], inputs.row_index[3] = 5, -7
    assert torch.equal(launch.forward(inputs).out, expected)
    with pytest.raises(ValueError, match="row_index"):
        check()
    found = backward(inputs, grad).row_table
    assert none is not None and found is not None and torch.equal(found, none)
    with pytest.raises(ValueError, match="row_index"):
        check()
