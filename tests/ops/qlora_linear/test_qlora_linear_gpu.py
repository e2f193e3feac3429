"""qlora_linear on an NVIDIA GPU: every backend there, without waiting for it, and as a graph."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from collavo_kernels import check
from collavo_kernels.ops.qlora_linear import OPERATOR
from collavo_kernels.testing import assert_within_budget
from collavo_kernels.testing.cases.qlora_linear import CASES, QLoRACall, QLoRACase, make_call
from collavo_kernels.testing.gpu import no_synchronisation, replayed, rougher

pytestmark = pytest.mark.gpu
BACKENDS = [b.name for b in OPERATOR.backends if not b.devices or "cuda" in b.devices]
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def served(case: QLoRACase, dtype: torch.dtype, backend: str) -> QLoRACall:
    """The case on the GPU; skips with the reason of a backend that declines it."""
    call = make_call(case, dtype, "cuda")
    try:
        call.run(backend)
    except ValueError as error:
        pytest.skip(str(error))
    return call


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_within_budget(case: QLoRACase, dtype: torch.dtype, backend: str) -> None:
    call = served(case, dtype, backend)
    grad = torch.randn(*case.tokens, case.n).to(dtype)
    exact, exact_grads = make_call(case, dtype).double().gradients(grad)
    low, low_grads = make_call(case, dtype).gradients(grad, "reference")
    on_gpu = grad.cuda()
    plain, plain_grads = call.gradients(on_gpu, "reference")
    call.gradients(on_gpu, backend)
    with no_synchronisation():
        out, grads = call.gradients(on_gpu, backend)
    again, _ = call.gradients(on_gpu, backend)
    assert torch.equal(out, again)
    honest = [
        rougher(*each)
        for each in zip(
            [low, *low_grads], [plain, *plain_grads], [exact, *exact_grads], strict=True
        )
        if each[0].numel()
    ]
    found = [each for each in (out, *grads) if each.numel()]
    true = [each for each in (exact, *exact_grads) if each.numel()]
    for i, (one, *others) in enumerate(zip(found, honest, true, strict=True)):
        assert_within_budget(one.cpu(), *others, name=f"result {i}")
    check()


@pytest.mark.parametrize("backend", BACKENDS)
def test_bad_rows_count_as_none_and_are_reported(backend: str) -> None:
    case = next(c for c in CASES if c.name == "few")
    call = served(replace(case, k=128), torch.bfloat16, backend)
    bad, none = call.row_index.clone(), call.row_index.clone()
    bad[2], bad[3] = 5, -7
    none[2] = none[3] = -1
    out = replace(call, row_index=bad).run(backend)
    assert torch.equal(out, replace(call, row_index=none).run(backend))
    with pytest.raises(ValueError, match="row_index: an entry lies outside"):
        check()


@pytest.mark.parametrize("backend", BACKENDS)
def test_replays_as_a_graph(backend: str) -> None:
    case = next(c for c in CASES if c.name == "few")
    call = served(replace(case, k=128), torch.bfloat16, backend)
    with torch.no_grad():
        assert torch.equal(replayed(lambda: call.run(backend)), call.run(backend))
