"""Decoding on a GPU folds query heads that share keys; the algebra holds on any device."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F

from collavo_kernels._sdpa import folded, grouped_attention


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
