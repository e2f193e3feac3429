"""Tolerances that are computed, not chosen."""

from __future__ import annotations

import torch
from torch import Tensor


def relative_error(actual: Tensor, exact: Tensor) -> float:
    """Return ``max|actual - exact| / max|exact|`` in float64 (0 for empty tensors).

    Args:
        actual: Any shape and dtype.
        exact: The same shape, usually float64.

    Example:
        >>> import torch
        >>> relative_error(torch.tensor([1.0, 2.0]), torch.tensor([1.0, 2.0]))
        0.0
    """
    if exact.numel() == 0:
        return 0.0
    difference = (actual.detach().double() - exact.detach().double()).abs().max()
    return float(difference / exact.detach().double().abs().max().clamp_min(1e-300))


def error_budget(low_precision: Tensor, exact: Tensor, terms: Tensor | None = None) -> float:
    """Return ``2 * (max|low_precision - exact| + eps * max(|exact|, 3 terms))``.

    Twice the error that plain PyTorch makes in the same dtype, and a rounding band for tensors that
    it happens to hit exactly. Both largest values are those of many elements as a rule. Where a
    tensor has few, or few that are independent of each other (a product of two vectors), all of
    them can lie near zero by chance, PyTorch's errors as well as the values; what sums round is as
    large as ever then, since it is their terms that are rounded. ``terms`` says how large these
    are: a sum of n terms of either sign is a draw whose deviation is the root of their squares, and
    the largest of a hundred draws is three deviations.

    Args:
        low_precision: The reference computed by PyTorch in the kernel's dtypes, any shape.
        exact: The reference computed in float64, same shape.
        terms: For every element the root of the sum of the squares of its terms, same shape;
            default: as if ``exact`` had many independent elements.
    """
    truth = exact.detach().double()
    honest = (low_precision.detach().double() - truth).abs().max()
    largest = truth.abs().max()
    if terms is not None:
        largest = torch.maximum(largest, 3 * terms.detach().double().max())
    return float(2 * (honest + torch.finfo(low_precision.dtype).eps * largest))


def assert_within_budget(
    actual: Tensor,
    low_precision: Tensor,
    exact: Tensor,
    *,
    name: str = "output",
    terms: Tensor | None = None,
) -> None:
    """Assert that a kernel errs at most twice as much as PyTorch does in the same precision.

    The budget is ``2 * (max|low_precision - exact| + eps(dtype) * max|exact|)``, and for sums of
    which there are few, ``eps(dtype) * 3 max(terms)`` where that is more.

    Args:
        actual: The kernel's result, any shape, float32 / bfloat16 / float16.
        low_precision: The reference computed by PyTorch in the kernel's dtypes, same shape.
        exact: The reference computed in float64, same shape.
        name: What to call the tensor in the message.
        terms: For every element the root of the sum of the squares of its terms, same shape;
            wanted for tensors of few independent elements, whose largest value and largest error
            can be next to nothing by chance.

    Raises:
        AssertionError: naming the tensor, its error and its budget; also if shapes or dtypes
            differ, or on NaN.
    """
    if actual.shape != exact.shape or actual.dtype != low_precision.dtype:
        raise AssertionError(
            f"{name}: expected {low_precision.dtype} {list(exact.shape)}, "
            f"got {actual.dtype} {list(actual.shape)}"
        )
    if actual.numel() == 0:
        return
    truth = exact.detach().double()
    error = (actual.detach().double() - truth).abs().max()
    budget = error_budget(low_precision, exact, terms)
    if not bool(error <= budget):
        honest = (low_precision.detach().double() - truth).abs().max()
        raise AssertionError(
            f"{name}: error {error:.3e} above its budget {budget:.3e} "
            f"(plain PyTorch errs by {honest:.3e}, largest value {truth.abs().max():.3e})"
        )
