"""The budget of errors that kernels are held to."""

from __future__ import annotations

import pytest
import torch

from collavo_kernels.testing import assert_within_budget

EPS = torch.finfo(torch.float32).eps


def test_twice_the_error_of_pytorch_and_a_band() -> None:
    exact = torch.tensor([4.0, 1.0], dtype=torch.float64)
    low = (exact + torch.tensor([0.0, 8 * EPS])).float()
    # 2 (8 eps + 4 eps), one eps below and one above.
    assert_within_budget((exact + 23 * EPS).float(), low, exact)
    with pytest.raises(AssertionError, match=r"out: error .* above its budget"):
        assert_within_budget((exact + 26 * EPS).float(), low, exact, name="out")
    with pytest.raises(AssertionError, match="error nan"):
        assert_within_budget(torch.full((2,), float("nan")), low, exact)


def test_of_few_numbers_the_terms_count() -> None:
    """One sum that nearly cancels and that PyTorch happens to hit: its terms were rounded still."""
    exact = torch.tensor([0.001], dtype=torch.float64)
    low, found = exact.float(), (exact + 5 * EPS).float()
    with pytest.raises(AssertionError, match="above its budget"):
        assert_within_budget(found, low, exact)
    terms = torch.ones(1, dtype=torch.float64)
    assert_within_budget(found, low, exact, terms=terms)  # 2 eps 3
    with pytest.raises(AssertionError, match="above its budget"):
        assert_within_budget((exact + 7 * EPS).float(), low, exact, terms=terms)
