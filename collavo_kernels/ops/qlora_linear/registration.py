"""``collavo::qlora_linear``: its fake, its derivative, its autocast and its backends."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from collavo_kernels._backends import Backend, LazyModule, triton_reason
from collavo_kernels._register import Derivative, Nothing, Operator
from collavo_kernels._validation import lowered
from collavo_kernels.ops.qlora_linear import cpu, cuda, reference
from collavo_kernels.ops.qlora_linear.inputs import (
    QLoRAGradients,
    QLoRAInputs,
    QLoRAOutputGrads,
    QLoRAResult,
)
from collavo_kernels.ops.qlora_linear.tokens import on_tokens
from collavo_kernels.ops.qlora_linear.validation import validate, validate_backward

if TYPE_CHECKING:
    from collavo_kernels.ops.qlora_linear.triton import launch as triton
else:
    triton = LazyModule("collavo_kernels.ops.qlora_linear.triton.launch")


def _fake(inputs: QLoRAInputs) -> QLoRAResult:
    return QLoRAResult(inputs.x.new_empty((*inputs.x.shape[:-1], inputs.out_features)))


def _keep(inputs: QLoRAInputs, result: QLoRAResult) -> tuple[QLoRAInputs, Nothing]:
    return inputs, Nothing()


def _has_no_derivative(inputs: QLoRAInputs) -> str | None:
    if not inputs.int8_activations:
        return None
    return (
        "int8_activations: it is for inference, but an argument asks for gradients; call under "
        "torch.no_grad()"
    )


def _autocast(inputs: QLoRAInputs, dtype: torch.dtype) -> QLoRAInputs:
    """Lower everything but float32 adapters, which the operator takes beside a 16-bit x."""

    def factors(given: list[Tensor]) -> list[Tensor]:
        return [x if x.dtype == torch.float32 else lowered(x, dtype) for x in given]

    return inputs._replace(
        x=lowered(inputs.x, dtype),
        weight=lowered(inputs.weight, dtype),
        a=factors(inputs.a),
        b=factors(inputs.b),
        row_table=lowered(inputs.row_table, dtype),
        bias=lowered(inputs.bias, dtype),
    )


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
        Backend(
            "cpu",
            cpu.forward,
            cpu.backward,
            devices=("cpu",),
            unavailable=cpu.unavailable,
            declines=cpu.declines,
        ),
        Backend(
            "cuda",
            cuda.forward,
            cuda.backward,
            devices=("cuda",),
            unavailable=cuda.unavailable,
            declines=cuda.declines,
            opt_in=True,
        ),
        Backend(
            "triton",
            triton.forward,
            triton.backward,
            devices=("cuda",),
            unavailable=triton_reason,
            declines=triton.declines,
        ),
        Backend("reference", reference.forward, reference.backward),
    ),
    validate=validate,
    fake=_fake,
    autocast=_autocast,
    derivative=Derivative(
        saved=Nothing,
        grads=QLoRAOutputGrads,
        gradients=QLoRAGradients,
        keep=_keep,
        validate=validate_backward,
        refuses=_has_no_derivative,
    ),
    choose=_choose,
)
