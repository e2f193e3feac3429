"""``collavo::qlora_linear``: its fake, its derivative, its autocast and its backends."""

from __future__ import annotations

from typing import TYPE_CHECKING

from collavo_kernels._backends import Backend, LazyModule, triton_reason
from collavo_kernels._derivative import Derivative, Nothing
from collavo_kernels._register import Operator
from collavo_kernels.ops.qlora_linear import cpu, cuda, reference
from collavo_kernels.ops.qlora_linear.inputs import (
    QLoRAGradients,
    QLoRAInputs,
    QLoRAOutputGrads,
    QLoRAResult,
    fake,
    in_dtype,
    keep,
    without_derivative,
)
from collavo_kernels.ops.qlora_linear.tokens import on_tokens
from collavo_kernels.ops.qlora_linear.validation import validate, validate_backward

if TYPE_CHECKING:
    from collavo_kernels.ops.qlora_linear.triton import launch as triton
else:
    triton = LazyModule("collavo_kernels.ops.qlora_linear.triton.launch", triton_reason)


def _choose(inputs: QLoRAInputs, requested: str) -> str:
    """Let nothing serve in place of the backend that rounds x to 8 bits."""
    if not inputs.int8_activations or not inputs.x.numel() or not inputs.out_features:
        return requested
    requested = OPERATOR.requested(requested)
    if requested not in ("", "cpu"):
        raise ValueError(f"int8_activations: backend {requested!r} does not round x to 8 bits")
    return "cpu"


OPERATOR = Operator(
    "qlora_linear",
    inputs=QLoRAInputs,
    result=QLoRAResult,
    backends=on_tokens(
        Backend.of("cpu", cpu, devices=("cpu",)),
        Backend.of("cuda", cuda, devices=("cuda",), yields=cuda.yields),
        Backend.of("triton", triton, devices=("cuda",)),
        Backend("reference", reference.forward, reference.backward),
    ),
    validate=validate,
    fake=fake,
    autocast=in_dtype,
    derivative=Derivative(
        saved=Nothing,
        output_grads=QLoRAOutputGrads,
        gradients=QLoRAGradients,
        keep=keep,
        validate=validate_backward,
        refuses=without_derivative,
    ),
    choose=_choose,
)
