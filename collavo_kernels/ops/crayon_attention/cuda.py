"""CUDA C++: none for this operator; its Triton kernels serve NVIDIA GPUs."""

from __future__ import annotations

from collavo_kernels.ops.crayon_attention.inputs import AttentionInputs, ForwardResult

UNAVAILABLE = "this operator has no CUDA C++ kernel; Triton serves the GPU"


def forward(inputs: AttentionInputs) -> ForwardResult:
    """Raise: there is no kernel to call.

    Raises:
        RuntimeError: always.
    """
    raise RuntimeError(f"crayon_attention: {UNAVAILABLE}")
