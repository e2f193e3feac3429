"""The operator as PyTorch knows it: schema, fake, autograd, autocast, and its backends."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.autograd.function import once_differentiable

from collavo_kernels._backends import Backend, Operator, triton_reason
from collavo_kernels.ops.qlora_linear import cpu, cuda, reference
from collavo_kernels.ops.qlora_linear.inputs import GradientMask, QLoRAGradients, QLoRAInputs
from collavo_kernels.ops.qlora_linear.validation import validate, validate_backward

_PLAIN = (Tensor, torch.nn.Parameter)
_AUTOCAST = torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastCPU) | torch._C.DispatchKeySet(
    torch._C.DispatchKey.AutocastCUDA
)
_ARGUMENTS = (
    "Tensor x, Tensor weight, Tensor? scales, SymInt out_features, int block_size, "
    "bool double_quant, Tensor[] a, Tensor[] b, float[] scaling, Tensor? adapter_mask, "
    "Tensor? row_table, Tensor? row_index, Tensor? bias"
)
_LIBRARY: Any = cast(Any, torch.library).Library("collavo", "FRAGMENT")
_LIBRARY.define(
    f'qlora_linear({_ARGUMENTS}, *, bool int8_activations=False, str backend="") -> Tensor'
)
# The gradients come as one flat list: x, weight, row_table, bias, every a, every b.
_LIBRARY.define(
    f"qlora_linear_backward(Tensor grad, {_ARGUMENTS}, bool[] output_mask, *, "
    'str backend="") -> Tensor[]'
)


def _panels_decline(inputs: QLoRAInputs) -> str | None:
    return "the weight lies in panels, for CPU kernels: to_rows()" if inputs.in_panels else None


def _cuda_declines(inputs: QLoRAInputs) -> str | None:
    return _panels_decline(inputs) or cuda.declines(inputs)


def _triton_declines(inputs: QLoRAInputs) -> str | None:
    reason = cpu.declines(inputs) or _panels_decline(inputs)
    if reason is None and inputs.x.shape[1] % 2:
        return f"K = {inputs.x.shape[1]} is odd: rows start in the middle of a byte"
    return reason


def _triton_forward(inputs: QLoRAInputs) -> Tensor:
    from collavo_kernels.ops.qlora_linear.triton import launch

    return launch.forward(inputs)


def _triton_backward(inputs: QLoRAInputs, grad: Tensor, mask: GradientMask) -> QLoRAGradients:
    from collavo_kernels.ops.qlora_linear.triton import launch

    return launch.backward(inputs, grad, mask)


OPERATOR: Operator[QLoRAInputs] = Operator(
    "qlora_linear",
    (
        Backend(
            "cpu",
            forward=cpu.forward,
            backward=cpu.backward,
            devices=("cpu",),
            unavailable=cpu.unavailable,
            declines=cpu.declines,
        ),
        Backend(
            "cuda",
            forward=cuda.forward,
            backward=cuda.backward,
            devices=("cuda",),
            unavailable=cuda.unavailable,
            declines=_cuda_declines,
            declines_backward=cuda.declines_backward,
            opt_in=True,
        ),
        Backend(
            "triton",
            forward=_triton_forward,
            backward=_triton_backward,
            devices=("cuda",),
            unavailable=triton_reason,
            declines=_triton_declines,
        ),
        Backend("reference", forward=reference.forward, backward=reference.backward),
    ),
)


def _forward(x: Tensor, *rest: Any, int8_activations: bool = False, backend: str = "") -> Tensor:
    validate(x, *rest)
    inputs = _bundle(x, *rest, int8_activations=int8_activations)
    if int8_activations and x.numel() and inputs.out_features:
        # Asked for by name like a backend: nothing else serves in its place.
        backend = OPERATOR.requested(backend)
        if backend not in ("", "cpu"):
            raise ValueError(f"int8_activations: backend {backend!r} does not round x to 8 bits")
        backend = "cpu"
    chosen = OPERATOR.select(inputs, x.device.type, backend)
    out: Tensor = chosen.forward(inputs)
    if x.dim() == 2:
        return out
    # Unlike view(), the result does not count as a view, which FSDP warns of.
    shape = [*x.shape[:-1], inputs.out_features]
    shaped: Tensor = torch.ops.aten._unsafe_view.default(out, shape)
    return shaped


def _backward(grad: Tensor, x: Tensor, *rest: Any, backend: str = "") -> list[Tensor]:
    *call, flags = rest
    validate(x, *call)
    inputs = _bundle(x, *call)
    nf4 = inputs.scales is not None
    validate_backward(grad, x, inputs.out_features, flags, len(inputs.a), nf4=nf4)
    mask = GradientMask.from_flags(flags, len(inputs.a))
    chosen = OPERATOR.select_backward(inputs, x.device.type, backend)
    if chosen.backward is None:
        raise RuntimeError(f"qlora_linear: backend {chosen.name!r} has no backward")
    # A backward inside an autocast region has the same bits as one outside.
    with torch._C._ExcludeDispatchKeyGuard(_AUTOCAST):
        found = chosen.backward(inputs, grad.reshape(inputs.x.shape[0], inputs.out_features), mask)
    grad_x = None if found.x is None else found.x.view(x.shape)
    every = [grad_x, found.weight, found.row_table, found.bias, *found.a, *found.b]
    return [x.new_empty(0) if each is None else each for each in every]


def _bundle(
    x: Tensor,
    weight: Tensor,
    scales: Tensor | None,
    out_features: int,
    block_size: int,
    double_quant: bool,
    a: list[Tensor],
    b: list[Tensor],
    scaling: list[float],
    adapter_mask: Tensor | None,
    row_table: Tensor | None,
    row_index: Tensor | None,
    bias: Tensor | None,
    *,
    int8_activations: bool = False,
) -> QLoRAInputs:
    return QLoRAInputs(
        x.reshape(-1, x.shape[-1]) if x.dim() != 2 else x,
        # Kernels read the bytes one after the other.
        weight if scales is None else weight.contiguous(),
        None if scales is None else scales.contiguous(),
        out_features,
        block_size,
        double_quant,
        list(a),
        list(b),
        list(scaling),
        None if adapter_mask is None else adapter_mask.reshape(-1),
        row_table,
        None if row_index is None else row_index.reshape(-1),
        bias,
        int8_activations,
    )


def _forward_fake(x: Tensor, *rest: Any, **_: Any) -> Tensor:
    validate(x, *rest)
    return x.new_empty((*x.shape[:-1], rest[2]))


def _backward_fake(grad: Tensor, x: Tensor, *rest: Any, backend: str = "") -> list[Tensor]:
    *call, flags = rest
    weight, a, b, table, bias = call[0], call[5], call[6], call[9], call[11]
    every = [x, weight, table, bias, *a, *b]
    return [
        torch.empty_like(each, memory_format=torch.contiguous_format)
        if flag and each is not None
        else x.new_empty(0)
        for flag, each in zip(flags, every, strict=True)
    ]


class _QLoRALinear(torch.autograd.Function):
    """Carries the adapters one by one, since tensors inside a list get no gradient."""

    @staticmethod
    def forward(ctx: Any, facts: tuple[Any, ...], *tensors: Tensor | None) -> Tensor:
        ctx.facts = facts
        ctx.save_for_backward(*tensors)
        with torch._C._AutoDispatchBelowAutograd():
            out: Tensor = _call(torch.ops.collavo.qlora_linear.default, (), facts, tensors, ())
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        tensors = ctx.saved_tensors
        needed = ctx.needs_input_grad[1:]
        # Position in `tensors`: x, weight, scales, mask, table, index, bias, every a, every b.
        flags = [needed[0], needed[1], needed[4], needed[6], *needed[7:]]
        op = torch.ops.collavo.qlora_linear_backward.default
        grads = _call(op, (grad,), ctx.facts, tensors, (flags,))
        found = [each if flag else None for flag, each in zip(flags, grads, strict=True)]
        x, weight, table, bias, *adapters = found
        return None, x, weight, None, None, table, None, bias, *adapters


def _call(
    op: Any,
    head: tuple[Tensor, ...],
    facts: tuple[Any, ...],
    tensors: tuple[Tensor | None, ...],
    tail: tuple[Any, ...],
) -> Any:
    out_features, block_size, double_quant, scaling, backend = facts
    x, weight, scales, adapter_mask, row_table, row_index, bias, *adapters = tensors
    count = len(scaling)
    call = (x, weight, scales, out_features, block_size, double_quant)
    branches = (adapters[:count], adapters[count:], scaling)
    epilogue = (adapter_mask, row_table, row_index, bias)
    return op(*head, *call, *branches, *epilogue, *tail, backend=backend)


def _wants_gradient(tensors: tuple[Tensor | None, ...]) -> bool:
    if forward_ad._current_level >= 0:
        return True  # a tangent: the Function says that there is no such derivative
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def _nobody_listens(tensors: tuple[Tensor | None, ...]) -> bool:
    """Say whether no dispatch key below autograd would do anything: no mode, subclass or lazy view.

    Only then may the operator's own code be called in place of the dispatcher.
    """
    if torch._C._len_torch_dispatch_stack() or torch._C._functorch.peek_interpreter_stack():
        return False
    return all(
        t is None or (type(t) in _PLAIN and not t.is_neg() and not t._is_zerotensor())
        for t in tensors
    )


def _autograd(
    x: Tensor,
    weight: Tensor,
    scales: Tensor | None,
    out_features: int,
    block_size: int,
    double_quant: bool,
    a: list[Tensor],
    b: list[Tensor],
    scaling: list[float],
    adapter_mask: Tensor | None,
    row_table: Tensor | None,
    row_index: Tensor | None,
    bias: Tensor | None,
    *,
    int8_activations: bool = False,
    backend: str = "",
) -> Tensor:
    tensors = (x, weight, scales, adapter_mask, row_table, row_index, bias, *a, *b)
    if not _wants_gradient(tensors):
        facts = (out_features, block_size, double_quant, a, b, scaling)
        call = (x, weight, scales, *facts, adapter_mask, row_table, row_index, bias)
        options: Any = {"int8_activations": int8_activations, "backend": backend}
        if _nobody_listens(tensors):
            # Dispatching again costs as much as all checks.
            return _forward(*call, **options)
        with torch._C._AutoDispatchBelowAutograd():
            plain: Tensor = torch.ops.collavo.qlora_linear.default(*call, **options)
        return plain
    if int8_activations:
        raise ValueError(
            "int8_activations: it is for inference, but an argument asks for gradients; call under "
            "torch.no_grad()"
        )
    kept = (out_features, block_size, double_quant, list(scaling), backend)
    out: Tensor = cast(Any, _QLoRALinear).apply(kept, *tensors)
    return out


def _autocast(device_type: str) -> Any:
    keys = torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, f"Autocast{device_type}"))

    def kernel(x: Tensor, weight: Tensor, *rest: Any, **options: Any) -> Tensor:
        dtype = torch.get_autocast_dtype(device_type.lower())

        def cast(value: Tensor | None) -> Tensor | None:
            if value is None or value.dtype not in (torch.float32, torch.bfloat16, torch.float16):
                return value
            return value.to(dtype)

        scales, out_features, block_size, double_quant, a, b, scaling, mask, table, index, bias = (
            rest
        )
        # The operator takes float32 adapters beside a 16-bit x.
        a, b = ([t if t.dtype == torch.float32 else cast(t) for t in each] for each in (a, b))
        with torch._C._ExcludeDispatchKeyGuard(keys):
            out: Tensor = torch.ops.collavo.qlora_linear.default(
                cast(x),
                cast(weight),
                scales,
                out_features,
                block_size,
                double_quant,
                a,
                b,
                scaling,
                mask,
                cast(table),
                index,
                cast(bias),
                **options,
            )
        return out

    return kernel


_LIBRARY.impl("qlora_linear", _forward, "CompositeExplicitAutograd")
_LIBRARY.impl("qlora_linear_backward", _backward, "CompositeExplicitAutograd")
_LIBRARY.impl("qlora_linear", _autograd, "Autograd")
_LIBRARY.impl("qlora_linear", _autocast("CPU"), "AutocastCPU")
_LIBRARY.impl("qlora_linear", _autocast("CUDA"), "AutocastCUDA")
torch.library.register_fake("collavo::qlora_linear", _forward_fake, lib=_LIBRARY)
torch.library.register_fake("collavo::qlora_linear_backward", _backward_fake, lib=_LIBRARY)
