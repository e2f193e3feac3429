"""``collavo::crayon_attention`` in torch.library: schemas, fakes, autograd, autocast, backends."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd.function import Function, FunctionCtx

from collavo_kernels._backends import Backend, Operator, triton_reason
from collavo_kernels.ops.crayon_attention import cpu, library, reference
from collavo_kernels.ops.crayon_attention.inputs import (
    AttentionInputs,
    BackwardInputs,
    ForwardResult,
    Gradients,
)
from collavo_kernels.ops.crayon_attention.validation import lse_dtype, validate, validate_backward

_ARGUMENTS = (
    "Tensor q, Tensor k, Tensor v, Tensor? cos, Tensor? sin, Tensor? crayon_q, Tensor? crayon_k, "
    "Tensor? crayon_v, Tensor? row_index, Tensor? key_range, bool causal=True, int? window=None, "
    'float? scale=None, str backend=""'
)
_library: Any = cast(Any, torch.library).Library("collavo", "FRAGMENT")
_library.define(
    f"crayon_attention({_ARGUMENTS}) -> (Tensor out, Tensor key, Tensor value, Tensor lse)"
)
# In the backward, k and v are the prepared key and value: it needs no more of them than that.
_library.define(
    "crayon_attention_backward(Tensor grad_out, Tensor? grad_key, Tensor? grad_value, Tensor out, "
    f"Tensor lse, bool[6] output_mask, {_ARGUMENTS}) -> "
    "(Tensor dq, Tensor dk, Tensor dv, Tensor dcrayon_q, Tensor dcrayon_k, Tensor dcrayon_v)"
)

_Outputs = tuple[Tensor, Tensor, Tensor, Tensor]
_FLOATING = 8  # q, k, v, cos, sin and the three tables come first in every signature


def _triton_declines(inputs: AttentionInputs) -> str | None:
    from collavo_kernels.ops.crayon_attention.triton import launch

    return launch.declines(inputs)


def _triton_forward(inputs: AttentionInputs) -> ForwardResult:
    from collavo_kernels.ops.crayon_attention.triton import launch

    return launch.forward(inputs)


def _triton_backward(given: BackwardInputs) -> Gradients:
    from collavo_kernels.ops.crayon_attention.triton import launch

    return launch.backward(given)


OPERATOR: Operator[AttentionInputs] = Operator(
    "crayon_attention",
    (
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
            _triton_forward,
            _triton_backward,
            devices=("cuda",),
            unavailable=triton_reason,
            declines=_triton_declines,
        ),
        Backend("reference", reference.forward, reference.backward),
    ),
)


def _forward(*arguments: Any) -> _Outputs:
    values, backend = _without_backend(arguments)
    inputs = AttentionInputs(*values)
    validate(inputs)
    chosen = OPERATOR.select(inputs, inputs.q.device.type, backend)
    return cast(_Outputs, tuple(chosen.forward(inputs)))


def _backward(
    grad_out: Tensor,
    grad_key: Tensor | None,
    grad_value: Tensor | None,
    out: Tensor,
    lse: Tensor,
    output_mask: tuple[bool, bool, bool, bool, bool, bool],
    *arguments: Any,
) -> Gradients:
    values, backend = _without_backend(arguments)
    inputs = AttentionInputs(*values)
    given = BackwardInputs(grad_out, grad_key, grad_value, inputs, out, lse, output_mask)
    validate_backward(given)
    chosen = OPERATOR.select_backward(inputs, inputs.q.device.type, backend)
    run = chosen.backward or reference.backward
    return cast(Gradients, run(given))


def _without_backend(arguments: tuple[Any, ...]) -> tuple[tuple[Any, ...], str]:
    """Split ``_ARGUMENTS``' values, trailing defaults possibly left out, from the backend name."""
    complete = (*arguments, *(True, None, None, "")[len(arguments) - 10 :])
    return complete[:13], complete[13]


def _fake_forward(*arguments: Any) -> _Outputs:
    values, _ = _without_backend(arguments)
    inputs = AttentionInputs(*values)
    validate(inputs)
    q, k, v = inputs.q, inputs.k, inputs.v
    batch, length, heads, _size = q.shape
    return (
        q.new_empty(q.shape),
        k.new_empty(k.shape if inputs.changes_key else 0),
        v.new_empty(v.shape if inputs.changes_value else 0),
        q.new_empty((batch, heads, length), dtype=lse_dtype(q)),
    )


def _fake_backward(
    grad_out: Tensor,
    grad_key: Tensor | None,
    grad_value: Tensor | None,
    out: Tensor,
    lse: Tensor,
    output_mask: tuple[bool, bool, bool, bool, bool, bool],
    *arguments: Any,
) -> Gradients:
    q, k, v, _cos, _sin, crayon_q, crayon_k, crayon_v = arguments[:_FLOATING]
    leaves = (q, k, v, crayon_q, crayon_k, crayon_v)
    gradients = tuple(
        x.new_empty(x.shape) if want and x is not None else q.new_empty(0)
        for x, want in zip(leaves, output_mask, strict=True)
    )
    return cast(Gradients, gradients)


class _CrayonAttention(Function):
    """The operator's Autograd-key implementation where a gradient is wanted."""

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> _Outputs:
        with torch._C._AutoDispatchBelowAutograd():
            out, key, value, lse = torch.ops.collavo.crayon_attention(*arguments)
        values, backend = _without_backend(arguments)
        inputs = AttentionInputs(*values)
        used_key = key if inputs.changes_key else inputs.k
        used_value = value if inputs.changes_value else inputs.v
        ctx.save_for_backward(inputs.q, used_key, used_value, *inputs[3:10], out, lse)
        ctx.options = (*inputs[10:], backend)
        ctx.arguments = len(arguments)
        ctx.set_materialize_grads(False)
        absent = [
            x
            for x, changed in ((key, inputs.changes_key), (value, inputs.changes_value))
            if not changed
        ]
        ctx.mark_non_differentiable(lse, *absent)
        return out, key, value, lse

    @staticmethod
    def backward(
        ctx: Any,
        grad_out: Tensor | None,
        grad_key: Tensor | None,
        grad_value: Tensor | None,
        _: Any,
    ) -> tuple[Tensor | None, ...]:
        *saved, out, lse = ctx.saved_tensors
        needs = ctx.needs_input_grad
        mask = (*needs[:3], *needs[5:8])
        if grad_out is None:
            grad_out = torch.zeros_like(out)
        found = torch.ops.collavo.crayon_attention_backward(
            grad_out, grad_key, grad_value, out, lse, mask, *saved, *ctx.options
        )
        dq, dk, dv, dtq, dtk, dtv = (
            g if want else None for g, want in zip(found, mask, strict=True)
        )
        padding = [None] * (int(ctx.arguments) - _FLOATING)
        return (dq, dk, dv, None, None, dtq, dtk, dtv, *padding)


class _Once(Function):
    """The backward operator's Autograd-key implementation: it has no derivative of its own."""

    @staticmethod
    def forward(ctx: FunctionCtx, *arguments: Any) -> Gradients:
        with torch._C._AutoDispatchBelowAutograd():
            return cast(Gradients, torch.ops.collavo.crayon_attention_backward(*arguments))

    @staticmethod
    def backward(ctx: FunctionCtx, *_: Any) -> Any:
        raise RuntimeError(
            "crayon_attention: double backward is not supported; it has first derivatives only"
        )


def _wants_gradient(arguments: tuple[Any, ...]) -> bool:
    if not torch.is_grad_enabled():
        return False
    return any(isinstance(x, Tensor) and x.requires_grad for x in arguments)


def _autograd_forward(*arguments: Any) -> Any:
    if _wants_gradient(arguments):
        return cast(Any, _CrayonAttention).apply(*arguments)
    with torch._C._AutoDispatchBelowAutograd():
        return torch.ops.collavo.crayon_attention(*arguments)


def _autograd_backward(*arguments: Any) -> Any:
    if _wants_gradient(arguments):
        return cast(Any, _Once).apply(*arguments)
    with torch._C._AutoDispatchBelowAutograd():
        return torch.ops.collavo.crayon_attention_backward(*arguments)


def _autocast(key: torch._C.DispatchKey, device: str) -> Any:
    """Cast q, k, v and the tables to autocast's dtype; cos and sin keep their precision."""
    keys = torch._C.DispatchKeySet(key)

    def cast_and_call(*arguments: Any) -> Any:
        dtype = torch.get_autocast_dtype(device)
        lowered = [
            x.to(dtype)
            if i not in (3, 4)
            and isinstance(x, Tensor)
            and x.dtype.is_floating_point
            and x.dtype != torch.float64
            else x
            for i, x in enumerate(arguments)
        ]
        with torch._C._ExcludeDispatchKeyGuard(keys):
            return torch.ops.collavo.crayon_attention(*lowered)

    return cast_and_call


_library.impl("crayon_attention", _forward, "CompositeExplicitAutograd")
_library.impl("crayon_attention_backward", _backward, "CompositeExplicitAutograd")
_library.impl("crayon_attention", _autograd_forward, "Autograd")
_library.impl("crayon_attention_backward", _autograd_backward, "Autograd")
_library.impl("crayon_attention", _autocast(torch._C.DispatchKey.AutocastCPU, "cpu"), "AutocastCPU")
_library.impl(
    "crayon_attention", _autocast(torch._C.DispatchKey.AutocastCUDA, "cuda"), "AutocastCUDA"
)
torch.library.register_fake("collavo::crayon_attention", _fake_forward, lib=_library)
torch.library.register_fake("collavo::crayon_attention_backward", _fake_backward, lib=_library)
