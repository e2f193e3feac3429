"""crayon_attention's Triton kernels on the CPU, through Triton's interpreter."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from triton.runtime.interpreter import interpreter_builder

from collavo_kernels import check
from collavo_kernels.ops.crayon_attention import OPERATOR, reference
from collavo_kernels.ops.crayon_attention.inputs import (
    AttentionInputs,
    AttentionResult,
    Gradients,
)
from collavo_kernels.ops.crayon_attention.triton import backward as triton_backward
from collavo_kernels.ops.crayon_attention.triton import backward_query as triton_backward_query
from collavo_kernels.ops.crayon_attention.triton import forward as triton_forward
from collavo_kernels.ops.crayon_attention.triton import launch
from collavo_kernels.testing import (
    assert_within_budget,
    backward_arguments,
    offset_view,
    poisoned_empty,
)
from collavo_kernels.testing.cases.crayon_attention import CASES, AttentionCase, eager

# The interpreter computes bfloat16 on its bits, so its dtypes are these.
DTYPES = (torch.float32, torch.float16)
LEAVES = ("q", "k", "v", "crayon_q", "crayon_k", "crayon_v")


def case_of(name: str) -> AttentionCase:
    return next(c for c in CASES if c.name == name)


def upstream(inputs: AttentionInputs) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Gradients of out, and of key and value where the forward makes them."""
    generator = torch.Generator().manual_seed(1)
    out, key, value = (
        torch.randn(x.shape, generator=generator, dtype=torch.float64).to(x.dtype)
        for x in (inputs.q, inputs.k, inputs.v)
    )
    return out, key if inputs.changes_key else None, value if inputs.changes_value else None


def arguments(
    inputs: AttentionInputs,
    done: AttentionResult,
    grads: tuple[Tensor, Tensor | None, Tensor | None],
    wanted: list[bool] | None = None,
) -> tuple[Any, Any, Any, Any]:
    """What autograd hands to the backward."""
    return backward_arguments(OPERATOR, inputs, done, grads, wanted)


def run(
    inputs: AttentionInputs, wanted: list[bool] | None = None
) -> tuple[AttentionResult, Gradients]:
    done = launch.forward(inputs)
    return done, launch.backward(*arguments(inputs, done, upstream(inputs), wanted))


def assert_equal(found: Gradients, expected: Gradients) -> None:
    for one, other in zip(found, expected, strict=True):
        assert one is other is None or torch.equal(one, other)


def in_float64(bundle: tuple[object, ...]) -> list[object]:
    return [
        x.detach().double() if isinstance(x, Tensor) and x.is_floating_point() else x
        for x in bundle
    ]


def honest(inputs: AttentionInputs) -> tuple[list[Tensor], list[Tensor]]:
    """What the usual PyTorch gives in the inputs' dtype: results, and gradients of the leaves."""
    results = list(eager(inputs))
    pairs = [(x, g) for x, g in zip(results, upstream(inputs), strict=True) if g is not None]
    leaves = [x for n in LEAVES if (x := getattr(inputs, n)) is not None]
    outputs, grads = zip(*pairs, strict=True)
    found = torch.autograd.grad(outputs, leaves, grads, allow_unused=True)
    gradients = [
        torch.zeros_like(x) if g is None else g for g, x in zip(found, leaves, strict=True)
    ]
    return results, gradients


def assert_cancels(value: Tensor, inputs: AttentionInputs, name: str) -> None:
    """A query that sees one key has gradients of exactly zero for q: dP - delta cancels.

    What is left is the rounding of the D products that cancel, each at most |dOut v k|; |dOut|
    stays below 5 for unit variance. Without a token the tables' gradients are zeros outright.
    """
    if inputs.q.numel() == 0:
        assert bool((value == 0).all()), name
        return
    largest = float(5 * inputs.v.detach().abs().max() * inputs.k.detach().abs().max())
    bound = torch.finfo(value.dtype).eps * inputs.q.shape[-1] * largest
    assert float(value.detach().abs().max()) <= bound, name


def test_the_longest_programs_come_first(monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU starts programs in the order of x, then y. With a causal mask those with most blocks to
    go over must be the first of *all* heads, else the last head's long ones end alone."""
    jobs: dict[str, dict[tuple[int, int], int]] = {}

    def watch(module: Any, name: str) -> None:
        count = getattr(module, name)

        def counted(*arguments: Any) -> Any:
            begin, before, whole, cut = count(*arguments)
            x, y, _ = interpreter_builder.grid_idx
            blocks = int(whole.handle.data.item()) + int(cut.handle.data.item())
            jobs.setdefault(module.__name__, {})[y, x] = blocks
            return begin, before, whole, cut

        monkeypatch.setattr(module, name, counted)

    watch(triton_forward, "keys_of")
    watch(triton_backward, "queries_of")
    watch(triton_backward_query, "keys_of")
    case = AttentionCase("order", "", 2, 300, heads=4, kv_heads=2, head_dim=16, images=())
    run(case.make(torch.float32))
    assert len(jobs) == 3
    for name, of_program in jobs.items():
        in_order = [of_program[place] for place in sorted(of_program)]
        assert len(set(in_order)) > 1, name
        assert in_order == sorted(in_order, reverse=True), name


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_within_budget(case: AttentionCase, dtype: torch.dtype) -> None:
    usual, usual_gradients = honest(case.make(dtype, gradients=True))
    inputs = case.make(dtype)
    with poisoned_empty():
        found, gradients = run(inputs)
    wide = AttentionInputs(*in_float64(inputs))
    exact = reference.forward(wide)
    grads = tuple(in_float64(upstream(inputs)))
    exact_gradients = reference.backward(*arguments(wide, exact, grads))

    assert_within_budget(found.out, usual[0], exact.out, name="out")
    for name, changed, low in (
        ("key", inputs.changes_key, usual[1]),
        ("value", inputs.changes_value, usual[2]),
    ):
        value = getattr(found, name)
        if changed:
            assert_within_budget(value, low, getattr(exact, name), name=name)
        else:
            assert value.shape == (0,)
    finite = exact.lse.isfinite()
    assert bool((found.lse[~finite] == float("-inf")).all())
    # PyTorch returns no log-sum-exp on a CPU; the reference computes it in the same precision.
    usual_lse = reference.forward(inputs).lse[finite]
    assert_within_budget(found.lse[finite], usual_lse, exact.lse[finite], name="lse")
    names = [n for n in LEAVES if getattr(inputs, n) is not None]
    there = [g for n, g in zip(LEAVES, gradients, strict=True) if n in names]
    truths = [g for n, g in zip(LEAVES, exact_gradients, strict=True) if n in names]
    for name, value, low, truth in zip(names, there, usual_gradients, truths, strict=True):
        if truth.numel() and float(truth.abs().max()) < 1e-9:
            assert_cancels(value, inputs, f"d{name}")
        else:
            assert_within_budget(value, low, truth, name=f"d{name}")
    check()


@pytest.mark.parametrize("name", ["plain", "padding_window", "attention_alone"])
def test_same_bits_from_odd_views_and_from_run_to_run(name: str) -> None:
    inputs = case_of(name).make(torch.float32)
    done, gradients = run(inputs)
    views = AttentionInputs(*(offset_view(x) if isinstance(x, Tensor) else x for x in inputs))
    grads = tuple(None if g is None else offset_view(g) for g in upstream(inputs))
    again = launch.forward(views)
    kept, saved, output_grads, wanted = arguments(views, again, grads)
    saved = type(saved)(*map(offset_view, saved))
    for one, other in zip(again, done, strict=True):
        assert torch.equal(one, other)
    assert_equal(launch.backward(kept, saved, output_grads, wanted), gradients)


@pytest.mark.parametrize("name", ["left_padding", "padding_window", "empty_range"])
def test_nan_in_padding_stays_there(name: str) -> None:
    inputs = case_of(name).make(torch.float32)
    token = torch.arange(inputs.q.shape[1])
    padding = (token < inputs.key_range[:, :1]) | (token >= inputs.key_range[:, 1:])
    grads = (upstream(inputs)[0], None, None)
    done = launch.forward(inputs)
    clean = launch.backward(*arguments(inputs, done, grads))
    for x in (*inputs[:3], grads[0]):
        x[padding] = float("nan")
    dirty = launch.forward(inputs)
    assert torch.equal(dirty.out, done.out) and torch.equal(dirty.lse, done.lse)
    found = launch.backward(*arguments(inputs, dirty, grads))
    assert_equal(found, clean)
    for gradient in (found.q, found.k, found.v):
        assert bool((gradient[padding] == 0).all())


def test_gradients_of_key_and_value_reach_padding() -> None:
    """A padded key sees nothing and is seen by nothing, but it lies in the cache."""
    inputs = case_of("left_padding").make(torch.float32)
    done = launch.forward(inputs)
    grads = (torch.zeros_like(inputs.q), *upstream(inputs)[1:])
    found = launch.backward(*arguments(inputs, done, grads))
    unrotated = reference.unrotate(grads[1], inputs.cos, inputs.sin)
    torch.testing.assert_close(found.k, unrotated)
    assert torch.equal(found.v, grads[2])
    assert bool((found.q == 0).all())


def test_only_wanted_gradients_are_computed() -> None:
    inputs = case_of("plain").make(torch.float32)
    _, everything = run(inputs)
    for wanted in ((0,), (1, 5), (3,), (2, 4), ()):
        flags = [i in wanted for i in range(6)]
        for i, gradient in enumerate(run(inputs, flags)[1]):
            if i in wanted:
                assert torch.equal(gradient, everything[i])
            else:
                assert gradient is None


def test_a_strange_gradient_stays_in_its_row() -> None:
    """NaN and infinity reach the row of their token, in the place of their column, and no other."""
    inputs = case_of("plain").make(torch.float32)
    index = inputs.row_index
    done = launch.forward(inputs)
    out, key, value = upstream(inputs)
    clean = launch.backward(*arguments(inputs, done, (out, key, value)))
    sample, token = (int(n) for n in (index == 1).nonzero()[0])
    value[sample, token, 0, 3] = float("nan")
    value[sample, token, 1, 5] = float("inf")
    found = launch.backward(*arguments(inputs, done, (out, key, value)))
    strange = torch.zeros(clean[5].shape, dtype=torch.bool)
    strange[1, 0, 3] = strange[1, 1, 5] = True
    assert bool(found[5][1, 0, 3].isnan()) and float(found[5][1, 1, 5]) == float("inf")
    assert torch.equal(found[5][~strange], clean[5][~strange])
    assert torch.equal(found[4], clean[4])
    for gradient in found[3:]:
        assert bool((gradient[-1] == 0).all())  # no token has the last row


def test_bad_values_are_reported_and_harmless() -> None:
    inputs = case_of("plain").make(torch.float32)
    rows = inputs.row_index.clone()
    rows[0, 5] = 99
    found, gradients = run(inputs._replace(row_index=rows))
    with pytest.raises(ValueError, match="row_index"):
        check()
    rows[0, 5] = -1
    expected, others = run(inputs._replace(row_index=rows))
    assert torch.equal(found.out, expected.out)
    assert_equal(gradients, others)
    check()
    ranges = torch.tensor([[9, 3], [0, 99]], dtype=torch.int32)
    found, gradients = run(inputs._replace(key_range=ranges))
    with pytest.raises(ValueError, match="key_range"):
        check()
    assert bool((found.out[0] == 0).all()) and bool(found.out.isfinite().all())
    assert bool((gradients[0][0] == 0).all())
    assert all(bool(g.isfinite().all()) for g in gradients)


def test_the_backward_reports_bad_values_too() -> None:
    """It reads rows and ranges again, and may be called alone."""
    inputs = case_of("left_padding").make(torch.float32)
    done = launch.forward(inputs)
    given = arguments(inputs, done, upstream(inputs))
    inputs.row_index[1, 4] = -7
    launch.backward(*given)
    with pytest.raises(ValueError, match="row_index"):
        check()
    inputs.row_index[1, 4] = -1
    inputs.key_range[0, 0] = -2
    launch.backward(*given)
    with pytest.raises(ValueError, match="key_range"):
        check()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("where", ["q", "k", "v"])
def test_what_is_no_number_stays_visible(where: str, value: float) -> None:
    """An overflow becomes no zeros: the rows that see it are not finite, as the reference's."""
    case = next(c for c in CASES if c.name == "attention_alone")
    inputs = case.make(torch.float32)
    getattr(inputs, where)[0, 7, 0, 3] = value
    found, expected = launch.forward(inputs), reference.forward(inputs)
    rows = (7, case.length - 1)
    broken = [~expected.out[0, row].isfinite() for row in rows]
    assert bool(torch.stack(broken).any())
    for row, there in zip(rows, broken, strict=True):
        assert torch.equal(~found.out[0, row].isfinite(), there), row
    check()
