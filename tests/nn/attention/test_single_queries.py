"""Decoding on a GPU folds heads that share keys and leaves cuDNN out; both hold on any device."""

from __future__ import annotations

from collections.abc import Iterator
from threading import Thread
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from collavo_kernels._sdpa import cudnn_left_out, folded, grouped_attention


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(("heads", "kv_heads"), [(8, 2), (6, 1), (4, 4)])
def test_a_single_query_is_folded_and_attends_to_the_same(
    heads: int, kv_heads: int, masked: bool
) -> None:
    """Every query head must meet its own group's keys, in the heads' order."""
    query = torch.randn(2, heads, 1, 16, dtype=torch.float64)
    key, value = torch.randn(2, 2, kv_heads, 7, 16, dtype=torch.float64).unbind()
    mask = (torch.arange(7) > 2).expand(2, 1, 1, 7) if masked else None
    options: dict[str, Any] = {"attn_mask": mask, "scale": 0.3}
    expected = grouped_attention(query, key, value, **options)
    q, k, v, given = folded(query, key, value, options)
    assert q.shape == (2, kv_heads, heads // kv_heads, 16)
    found = F.scaled_dot_product_attention(q, k, v, **given).reshape(query.shape)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-15 * float(value.abs().max()) * 8)


@pytest.mark.parametrize(
    ("length", "options"),
    [
        (2, {}),
        (1, {"is_causal": True}),
        (1, {"attn_mask": torch.ones(2, 8, 1, 7, dtype=torch.bool)}),
        (1, {"attn_mask": torch.ones(1, 7, dtype=torch.bool)}),
    ],
    ids=["two_queries", "causal", "a_mask_per_head", "a_mask_of_two_dimensions"],
)
def test_what_differs_between_heads_or_queries_is_left_alone(
    length: int, options: dict[str, Any]
) -> None:
    """Folded heads would take each other's mask, or see one another as earlier queries."""
    query, key = torch.randn(2, 8, length, 16), torch.randn(2, 2, 7, 16)
    assert folded(query, key, key, options)[0] is query


def switches() -> tuple[bool, ...]:
    cuda = torch.backends.cuda
    return (
        cuda.cudnn_sdp_enabled(),
        cuda.flash_sdp_enabled(),
        cuda.mem_efficient_sdp_enabled(),
        cuda.math_sdp_enabled(),
    )


@pytest.fixture
def chosen(request: pytest.FixtureRequest) -> Iterator[tuple[bool, ...]]:
    """Set PyTorch's switches as a user might have, and put them back."""
    cuda, before = torch.backends.cuda, switches()
    setters = (
        cuda.enable_cudnn_sdp,
        cuda.enable_flash_sdp,
        cuda.enable_mem_efficient_sdp,
        cuda.enable_math_sdp,
    )
    for values in (request.param, before):
        for setter, value in zip(setters, values, strict=True):
            setter(value)
        if values is request.param:
            yield request.param


@pytest.mark.parametrize(
    "chosen",
    [(True, True, True, True), (True, False, False, True), (False, True, True, True)],
    indirect=True,
)
def test_only_cudnn_is_switched_off_and_comes_back(chosen: tuple[bool, ...]) -> None:
    """The others are the user's choice; inside of one another or of an error alike."""
    with pytest.raises(ZeroDivisionError), cudnn_left_out(), cudnn_left_out():
        assert switches() == (False, *chosen[1:])
        raise ZeroDivisionError
    assert switches() == chosen


@pytest.mark.parametrize("chosen", [(True, False, False, False)], indirect=True)
def test_where_cudnn_is_all_there_is_it_stays(chosen: tuple[bool, ...]) -> None:
    """Whoever left only cuDNN on would get "no available kernel"."""
    with cudnn_left_out():
        assert switches() == chosen


@pytest.mark.parametrize("chosen", [(True, True, True, True)], indirect=True)
def test_two_threads_that_overlap_leave_the_switch_as_it_was(chosen: tuple[bool, ...]) -> None:
    """Each put back what it had found: the second found it off, and left it off for good."""
    first, second = cudnn_left_out(), cudnn_left_out()
    first.__enter__()
    thread = Thread(target=second.__enter__)
    thread.start()
    thread.join()
    first.__exit__(None, None, None)
    assert not switches()[0]
    second.__exit__(None, None, None)
    assert switches() == chosen
