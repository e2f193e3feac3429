"""Backends work on tokens in one dimension; callers have any number of them."""

from __future__ import annotations

from dataclasses import replace
from typing import TypeAlias

import torch

from collavo_kernels._backends import Backend
from collavo_kernels._derivative import Nothing
from collavo_kernels.ops.qlora_linear.inputs import (
    Gradients,
    QLoRAInputs,
    QLoRAOutputGrads,
    QLoRAResult,
    Wanted,
)

_Backend: TypeAlias = Backend[
    QLoRAInputs, QLoRAResult, Nothing, QLoRAOutputGrads, Wanted, Gradients
]


def on_tokens(*backends: _Backend) -> tuple[_Backend, ...]:
    """Return the backends, each between a flattening and its inverse.

    Args:
        *backends: They take x as ``[M, K]`` and its output's gradient as ``[M, N]``.
    """
    return tuple(_on_tokens(each) for each in backends)


def _on_tokens(backend: _Backend) -> _Backend:
    def forward(inputs: QLoRAInputs) -> QLoRAResult:
        result = backend.forward(inputs.flattened())
        if inputs.x.dim() == 2:
            return result
        # Unlike view(), the result does not count as a view, which FSDP warns of.
        shape = [*inputs.x.shape[:-1], inputs.out_features]
        return QLoRAResult(torch.ops.aten._unsafe_view.default(result.out, shape))

    own = backend.backward
    if own is None:
        return replace(backend, forward=forward)

    def backward(
        inputs: QLoRAInputs, saved: Nothing, grads: QLoRAOutputGrads, wanted: Wanted
    ) -> Gradients:
        flat = inputs.flattened()
        out = grads.out.reshape(flat.x.shape[0], inputs.out_features)
        found = own(flat, saved, QLoRAOutputGrads(out), wanted)
        return found if found.x is None else found._replace(x=found.x.view(inputs.x.shape))

    return replace(backend, forward=forward, backward=backward)
