"""``collavo::crayon_attention``: its fake, its derivative, its autocast and its backends."""

from __future__ import annotations

from typing import TYPE_CHECKING

from collavo_kernels._backends import Backend, LazyModule, triton_reason
from collavo_kernels._derivative import Derivative
from collavo_kernels._register import Operator
from collavo_kernels.ops.crayon_attention import cpu, library, reference
from collavo_kernels.ops.crayon_attention.inputs import (
    AttentionGradients,
    AttentionInputs,
    AttentionOutputGrads,
    AttentionResult,
    AttentionSaved,
    empty,
    fake,
    in_dtype,
    keep,
)
from collavo_kernels.ops.crayon_attention.validation import validate, validate_backward

if TYPE_CHECKING:
    from collavo_kernels.ops.crayon_attention.triton import launch as triton
else:
    triton = LazyModule("collavo_kernels.ops.crayon_attention.triton.launch", triton_reason)


OPERATOR = Operator(
    "crayon_attention",
    inputs=AttentionInputs,
    result=AttentionResult,
    backends=(
        Backend.of("cpu", cpu, devices=("cpu",)),
        Backend.of("library", library, devices=("cuda",), opt_in=True),
        Backend.of("triton", triton, devices=("cuda",)),
        Backend("reference", reference.forward, reference.backward),
    ),
    validate=validate,
    fake=fake,
    autocast=in_dtype,
    derivative=Derivative(
        saved=AttentionSaved,
        output_grads=AttentionOutputGrads,
        gradients=AttentionGradients,
        keep=keep,
        validate=validate_backward,
        replaced={"k": "key", "v": "value"},
        empty=empty,
    ),
    former={"cuda": "library"},
)
