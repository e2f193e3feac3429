"""Helpers for testing kernels: error budgets, poisoned memory, odd views, compiling ahead."""

from collavo_kernels.testing.budget import assert_within_budget, relative_error
from collavo_kernels.testing.derivative import backward_arguments
from collavo_kernels.testing.memory import offset_view, poisoned_empty
from collavo_kernels.testing.peak_memory import peak_megabytes

__all__ = [
    "assert_within_budget",
    "backward_arguments",
    "offset_view",
    "peak_megabytes",
    "poisoned_empty",
    "relative_error",
]
