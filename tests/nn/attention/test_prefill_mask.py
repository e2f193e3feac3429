"""What stands in for a prefill's mask of S x S elements."""

from __future__ import annotations

import pytest
import torch

from collavo_kernels.nn.attention.masks import (
    interval_range,
    is_prefill_mask,
    prefill_mask,
    read_prefill_mask,
    visible_keys,
)


def test_a_prefill_mask_is_told_from_other_masks() -> None:
    """Also after what generate() and device maps do to masks: a copy in memory."""
    ranges = torch.tensor([[1, 5], [0, 2]], dtype=torch.int32)
    for window in (None, 1, 6):
        mask = prefill_mask(ranges, window)
        assert mask.untyped_storage().nbytes() == ranges.untyped_storage().nbytes()
        for copied in (mask, mask.contiguous()):
            assert is_prefill_mask(copied)
            found = read_prefill_mask(copied)
            assert torch.equal(found[0], ranges) and found[1] == window
    for other in (None, ranges, torch.ones(2, 1, 5, 2), torch.ones(2, 1, 5, 2).bool(), {}):
        assert not is_prefill_mask(other)


@pytest.mark.parametrize(
    ("mask", "expected"),
    [
        (None, (True, None)),
        ([[1, 1, 1], [1, 1, 1]], (True, None)),  # nothing to hide: the operator reads no range
        ([[0, 1, 1], [1, 1, 0]], (True, [[1, 3], [0, 2]])),
        ([[0, 0, 0], [0, 1, 0]], (True, [[0, 0], [1, 2]])),  # a sample without tokens
        ([[1, 0, 1], [1, 1, 1]], (False, None)),
        ([[[1, 1, 1]]], (False, None)),  # ready-made, of more dimensions
    ],
)
def test_which_padding_is_an_interval(mask: object, expected: tuple[bool, object]) -> None:
    is_interval, key_range = interval_range(None if mask is None else torch.tensor(mask))
    assert (is_interval, None if key_range is None else key_range.tolist()) == expected


def test_visible_keys_by_position() -> None:
    """A static cache counts in a tensor, a sliding one starts behind the keys it dropped."""
    window, ranges = 3, torch.tensor([[0, 9], [5, 7]], dtype=torch.int32)
    found = visible_keys(
        2, 5, window=window, key_range=ranges, query_offset=torch.tensor(6), key_offset=4
    )
    for sample, (first, end) in enumerate(ranges.tolist()):
        for query in range(2):
            for key in range(5):
                i, j = 6 + query, 4 + key
                expected = j <= i and i - j < window and first <= j < end
                assert bool(found[sample, 0, query, key]) == expected


def test_what_would_be_no_prefill_mask_is_refused() -> None:
    """A mask of int64 would be taken for another kind, without a word."""
    ranges = torch.tensor([[1, 5], [0, 2]], dtype=torch.int32)
    with pytest.raises(TypeError, match="key_range: expected dtype int32"):
        prefill_mask(ranges.long())
    with pytest.raises(ValueError, match=r"key_range: expected shape \[B, 2\]"):
        prefill_mask(ranges[0])
    with pytest.raises(ValueError, match="window: expected at least 1"):
        prefill_mask(ranges, 0)
