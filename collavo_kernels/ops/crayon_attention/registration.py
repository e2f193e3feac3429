"""``collavo::crayon_attention``: its fake, its derivative, its autocast and its backends."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from collavo_kernels._backends import Backend, LazyModule, triton_reason
from collavo_kernels._register import Derivative, Operator
from collavo_kernels._validation import lowered
from collavo_kernels.ops.crayon_attention import cpu, library, reference
from collavo_kernels.ops.crayon_attention.inputs import (
    AttentionGradients,
    AttentionInputs,
    AttentionOutputGrads,
    AttentionResult,
    AttentionSaved,
)
from collavo_kernels.ops.crayon_attention.validation import lse_dtype, validate, validate_backward

if TYPE_CHECKING:
    from collavo_kernels.ops.crayon_attention.triton import launch as triton
else:
    triton = LazyModule("collavo_kernels.ops.crayon_attention.triton.launch")


def _fake(inputs: AttentionInputs) -> AttentionResult:
    q, k, v = inputs.q, inputs.k, inputs.v
    batch, length, heads, _ = q.shape
    return AttentionResult(
        out=q.new_empty(q.shape),
        key=k.new_empty(k.shape if inputs.changes_key else 0),
        value=v.new_empty(v.shape if inputs.changes_value else 0),
        lse=q.new_empty((batch, heads, length), dtype=lse_dtype(q)),
    )


def _keep(
    inputs: AttentionInputs, result: AttentionResult
) -> tuple[AttentionInputs, AttentionSaved]:
    """Keep the prepared key and value in place of k and v: the backward needs no more of them."""
    key = result.key if inputs.changes_key else inputs.k
    value = result.value if inputs.changes_value else inputs.v
    saved = AttentionSaved(key, value, result.out, result.lse)
    return inputs._replace(k=key, v=value), saved


def _empty(inputs: AttentionInputs) -> tuple[str, ...]:
    key = () if inputs.changes_key else ("key",)
    return key if inputs.changes_value else (*key, "value")


def _autocast(inputs: AttentionInputs, dtype: torch.dtype) -> AttentionInputs:
    """Lower q, k, v and the tables; cos and sin keep their precision."""
    # All fields by name: _replace() costs three times as much.
    return AttentionInputs(
        q=lowered(inputs.q, dtype),
        k=lowered(inputs.k, dtype),
        v=lowered(inputs.v, dtype),
        cos=inputs.cos,
        sin=inputs.sin,
        crayon_q=lowered(inputs.crayon_q, dtype),
        crayon_k=lowered(inputs.crayon_k, dtype),
        crayon_v=lowered(inputs.crayon_v, dtype),
        row_index=inputs.row_index,
        key_range=inputs.key_range,
        causal=inputs.causal,
        window=inputs.window,
        scale=inputs.scale,
    )


OPERATOR = Operator(
    "crayon_attention",
    inputs=AttentionInputs,
    result=AttentionResult,
    backends=(
        Backend(
            "cpu",
            cpu.forward,
            cpu.backward,
            devices=("cpu",),
            unavailable=cpu.unavailable,
            declines=cpu.declines,
        ),
        Backend(
            "library",
            library.forward,
            library.backward,
            devices=("cuda",),
            unavailable=library.unavailable,
            declines=library.declines,
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
        saved=AttentionSaved,
        grads=AttentionOutputGrads,
        gradients=AttentionGradients,
        keep=_keep,
        validate=validate_backward,
        empty=_empty,
    ),
    former={"cuda": "library"},
)
