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


def assert_within_budget(
    actual: Tensor, low_precision: Tensor, exact: Tensor, *, name: str = "output"
) -> None:
    """Assert that a kernel errs at most twice as much as PyTorch does in the same precision.

    The budget is ``2 * (max|low_precision - exact| + eps(dtype) * max|exact|)``: twice the error
    that plain PyTorch makes in the same dtype, and a rounding band for tensors that plain PyTorch
    happens to hit exactly.

    Args:
        actual: The kernel's result, any shape, float32 / bfloat16 / float16.
        low_precision: The reference computed by PyTorch in the kernel's dtypes, same shape.
        exact: The reference computed in float64, same shape.
        name: What to call the tensor in the message.

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
    honest = (low_precision.detach().double() - truth).abs().max()
    band = torch.finfo(actual.dtype).eps * truth.abs().max()
    budget = 2 * (honest + band)
    if not bool(error <= budget):
        raise AssertionError(
            f"{name}: error {error:.3e} above its budget {budget:.3e} "
            f"(plain PyTorch errs by {honest:.3e}, largest value {truth.abs().max():.3e})"
        )
