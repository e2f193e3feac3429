"""CUDA C++: none for this operator; its Triton kernels serve NVIDIA GPUs."""

from __future__ import annotations

from collavo_kernels.ops.panoptic_lookup.inputs import LookupInputs, LookupResult

UNAVAILABLE = "this operator has no CUDA C++ kernel; Triton serves the GPU"


def forward(inputs: LookupInputs) -> LookupResult:
    """Raise: there is no kernel to call.

    Raises:
        RuntimeError: always.
    """
    raise RuntimeError(f"panoptic_lookup: {UNAVAILABLE}")
