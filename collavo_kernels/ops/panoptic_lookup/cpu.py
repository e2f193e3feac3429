"""C++ on the CPU: one pass over every map, rows of cells in parallel."""

from __future__ import annotations

from collavo_kernels._native import native, native_reason
from collavo_kernels.ops.panoptic_lookup import reference
from collavo_kernels.ops.panoptic_lookup.inputs import LookupInputs, LookupResult


def reason_against() -> str | None:
    """Say why the compiled kernel cannot run here, or None."""
    module = native()
    if module is None:
        return native_reason()
    return None if hasattr(module, "panoptic_lookup") else "the compiled module is older"


def forward(inputs: LookupInputs) -> LookupResult:
    return reference.forward(inputs)
