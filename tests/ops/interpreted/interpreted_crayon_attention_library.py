"""crayon_attention's cuda backend on the CPU: the preparation pass interpreted, aten stood in for.

The stand-in calls the real operator on tensors without values, so the arguments are checked by
PyTorch and its output has the real one's shapes and strides, and fills it with the plain formula.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from collavo_kernels.ops.crayon_attention import OPERATOR, library, reference
from collavo_kernels.ops.crayon_attention.inputs import AttentionInputs, AttentionOutputGrads
from collavo_kernels.ops.crayon_attention.triton import launch
from collavo_kernels.testing import (
    assert_within_budget,
    backward_arguments,
    offset_view,
    poisoned_empty,
)
from collavo_kernels.testing.cases.crayon_attention import CASES, AttentionCase, eager

LIBRARIES = ("cudnn", "flash")
TAKEN = (
    "head_dim_80",
    "head_dim_128",
    "one_kv_head",
    "three_heads_per_kv_head",
    "not_causal",
    "no_tables",
)
TAKEN += ("key_table", "query_value_tables", "no_rotation", "attention_alone", "scale", "no_rows")


def case_of(name: str) -> AttentionCase:
    return next(c for c in CASES if c.name == name)


def attention(query: Tensor, key: Tensor, value: Tensor, causal: bool, scale: float) -> Any:
    """Out and log-sum-exp of ``[B, H, S, D]`` in float32, for any number of key heads."""
    q, k, v = (x.float() for x in (query, key, value))
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    scores = q @ k.mT * scale
    if causal:
        hidden = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
        scores = scores.masked_fill(hidden, float("-inf"))
    return scores.softmax(-1) @ v, scores.logsumexp(-1)


def stand_in(name: str, seen: list[tuple[Tensor, ...]]) -> Callable[..., Any]:
    real = library.operator_of(name)

    def call(*arguments: Any, **options: Any) -> list[Any]:
        tensors = arguments[:3]
        for x in tensors:
            assert x.stride(-1) == 1 and x.data_ptr() % 16 == 0
            assert all(n % 8 == 0 for n in x.stride()[:-1])
        seen.append(tensors)
        meta = real(*(x.to("meta") if isinstance(x, Tensor) else x for x in arguments), **options)
        names = [a.name for a in real._schema.arguments]
        given = dict(zip(names, arguments, strict=False)) | options
        assert given["dropout_p"] == 0.0 and given["return_debug_mask"] is False
        assert name == "flash" or (
            given["attn_bias"] is None and given["compute_log_sumexp"] is True
        )
        out = torch.empty_strided(meta[0].shape, meta[0].stride(), dtype=meta[0].dtype)
        lse = torch.empty_strided(meta[1].shape, meta[1].stride(), dtype=meta[1].dtype)
        attended, log_sum = attention(*tensors, given["is_causal"], given["scale"])
        out.copy_(attended)
        lse.copy_(log_sum.view(lse.shape))
        return [out, lse, *meta[2:]]

    return call


@pytest.fixture(params=LIBRARIES)
def seen(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Let one library be there; return the tensors that it was called with."""
    calls: list[Any] = []
    replacement = stand_in(request.param, calls)
    monkeypatch.setattr(library, "libraries", lambda device: (request.param,))
    monkeypatch.setattr(library, "operator_of", lambda name: replacement)
    return calls


@pytest.mark.parametrize("name", TAKEN)
def test_forward_and_backward(name: str, seen: list[Any]) -> None:
    inputs = case_of(name).make(torch.float16)
    assert library.declines(inputs) is None
    with poisoned_empty():
        found = library.forward(inputs)
    wide = AttentionInputs(
        *(x.double() if isinstance(x, Tensor) and x.is_floating_point() else x for x in inputs)
    )
    exact = reference.forward(wide)
    usual = eager(inputs)
    assert_within_budget(found.out, usual[0], exact.out, name="out")
    assert found.out.is_contiguous() and found.lse.is_contiguous()
    assert (found.key.numel() > 0) == inputs.changes_key
    assert (found.value.numel() > 0) == inputs.changes_value
    # The library gets the heads there are: no key or value is copied to serve several queries.
    (tensors,) = seen
    heads = [inputs.q.shape[2], inputs.k.shape[2], inputs.k.shape[2]]
    assert [x.shape[1] for x in tensors] == heads
    prepared = launch.forward(inputs)
    assert torch.equal(found.key, prepared.key) and torch.equal(found.value, prepared.value)
    assert_within_budget(found.lse, reference.forward(inputs).lse, exact.lse, name="lse")

    grad = torch.randn(inputs.q.shape, generator=torch.Generator().manual_seed(1)).half()
    given = backward_arguments(OPERATOR, inputs, found, (grad, None, None))
    _, saved, _, wanted = given
    wide_saved = type(saved)(saved.key.double(), saved.value.double(), exact.out, exact.lse)
    wide = wide._replace(k=wide_saved.key, v=wide_saved.value)
    truth = (wide, wide_saved, AttentionOutputGrads(grad.double(), None, None), wanted)
    # Rounded to the dtype, the reference's own gradients in float16 are the honest measure.
    for i, values in enumerate(
        zip(
            library.backward(*given),
            reference.backward(*given),
            reference.backward(*truth),
            strict=True,
        )
    ):
        if values[0] is not None:
            assert_within_budget(*values, name=f"gradient {i}")


def test_views_are_made_readable(seen: list[Any]) -> None:
    """An odd offset or stride would be read in pieces of 16 bytes: such tensors are copied."""
    inputs = case_of("attention_alone").make(torch.float16)
    expected = library.forward(inputs)
    views = inputs._replace(**{n: offset_view(getattr(inputs, n)) for n in ("q", "k", "v")})
    shifted = torch.empty(inputs.v.numel() + 1, dtype=torch.float16)[1:].view(inputs.v.shape)
    shifted.copy_(inputs.v)
    for each in (views, inputs._replace(v=shifted)):
        for one, other in zip(library.forward(each), expected, strict=True):
            assert torch.equal(one, other)


def test_aligned_slices_are_passed_on(seen: list[Any]) -> None:
    """q, k and v are often parts of one product's output, which needs no copy."""
    batch, length, size = 2, 5, 16
    joined = torch.randn(batch, length, 8, size, generator=torch.Generator().manual_seed(1)).half()
    q, k, v = joined[:, :, :4], joined[:, :, 4:6], joined[:, :, 6:]
    inputs = AttentionInputs(q, k, v, *[None] * 7, True, None, None)
    library.forward(inputs)
    for x, part in zip(seen[0], (q, k, v), strict=True):
        assert x.data_ptr() == part.data_ptr()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"key_range": torch.zeros(2, 2, dtype=torch.int32)}, "key range"),
        ({"window": 3}, "window"),
        ({"scale": -1.0}, "positive scales"),
    ],
)
def test_what_the_libraries_lack_is_declined(
    change: dict[str, Any], message: str, seen: list[Any]
) -> None:
    inputs = case_of("no_tables").make(torch.float16)
    assert library.declines(inputs) is None
    assert message in (library.declines(inputs._replace(**change)) or "")


def test_dtypes_and_shapes_that_are_declined(seen: list[Any]) -> None:
    assert "bfloat16" in (library.declines(case_of("no_tables").make(torch.float32)) or "")
    assert library.declines(case_of("no_tables").make(torch.bfloat16)) is None
    assert "nothing" in (library.declines(case_of("no_tokens").make(torch.float16)) or "")
    assert "head dim 6" in (library.declines(case_of("head_dim_6").make(torch.float16)) or "")


def test_shapes_choose_the_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library, "libraries", lambda device: LIBRARIES)

    def chosen(name: str) -> str | None:
        return library.library_for(case_of(name).make(torch.float16))

    assert chosen("head_dim_128") == chosen("head_dim_80") == "cudnn"
    assert chosen("head_dim_256") == chosen("one_token") == "flash"
    assert chosen("head_dim_6") is None
    monkeypatch.setattr(library, "libraries", lambda device: ())
    assert chosen("head_dim_128") is None
    inputs = case_of("head_dim_128").make(torch.float16)
    assert "none is here" in (library.declines(inputs) or "")
    with pytest.raises(RuntimeError, match="none is here"):
        library.forward(inputs)


def test_a_cpu_has_no_library() -> None:
    assert library.libraries(torch.device("cpu")) == ()
