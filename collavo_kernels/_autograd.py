"""The autograd functions behind every operator, and what all operators refuse.

``FirstDerivative`` has a backward that is an operator of its own. ``NoSecondDerivative``
stands around that operator where a second derivative could be asked for, and raises when it is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, cast

import torch
from torch import Tensor, _ops
from torch.autograd import forward_ad
from torch.autograd.function import Function

_PLAIN = (Tensor, torch.nn.Parameter)
_BEFORE_LEAVES = 4  # what ``FirstDerivative.apply`` takes before them


def _ordinary_keys() -> frozenset[int]:
    """Return the dispatch keys of tensors with memory of their own that nothing wraps."""
    found = set()
    for device in ("CPU", "CUDA"):
        names = (device, f"Autocast{device}", f"Autograd{device}", "ADInplaceOrView")
        keys = [torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, name)) for name in names]
        inference = keys[0] | keys[1]
        found |= {inference.raw_repr(), (inference | keys[2] | keys[3]).raw_repr()}
    return frozenset(found)


_ORDINARY = _ordinary_keys()
_modes_before_dispatch: Callable[[], int] = cast(Any, _ops)._len_torch_dispatch_stack_pre_dispatch


def wants_gradient(tensors: Iterable[Tensor]) -> bool:
    """Tell whether autograd will ask for a gradient of any of these."""
    # Plain loops here and below: a generator costs more than what it does.
    if torch.is_grad_enabled():
        for each in tensors:
            if each.requires_grad:
                return True
    return False


def runs_directly(tensors: Iterable[Tensor]) -> bool:
    """Tell whether the operator may be called in place of the dispatcher below autograd.

    Not while anything is compiled or traced, under a mode or a transform, with a subclass, a
    wrapper (batched, functional), a lazy view, or a tensor that is not a plain one on CPU or CUDA.
    """
    if torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack():
        return False
    if torch._C._functorch.peek_interpreter_stack() or _modes_before_dispatch():
        return False
    for each in tensors:
        if type(each) not in _PLAIN or torch._C._dispatch_keys(each).raw_repr() not in _ORDINARY:
            return False
    return True


def unsupported(operator: str, what: str) -> NotImplementedError:
    """Return the error for every derivative that operators do not have."""
    return NotImplementedError(
        f"{operator}: {what} is not supported; it has first derivatives in reverse mode only"
    )


def refuse_tangents(operator: str, tensors: Iterable[Tensor]) -> None:
    """Raise where a tensor carries a tangent of forward-mode differentiation.

    Raises:
        NotImplementedError: naming the operator.
    """
    if forward_ad._current_level < 0:
        return
    unpack = cast(Any, forward_ad).unpack_dual
    if any(unpack(each).tangent is not None for each in tensors):
        raise unsupported(operator, "forward-mode differentiation (jvp)")


def refuse_functorch(operator: str) -> None:
    """Raise inside ``torch.func.grad`` and its kin, which know nothing of such operators.

    Raises:
        NotImplementedError: naming the operator.
    """
    if torch._C._functorch.peek_interpreter_stack() is not None:
        raise NotImplementedError(
            f"{operator}: torch.func's derivatives are not supported; use torch.autograd.grad "
            "(torch.func.functional_call works under it)"
        )


class FirstDerivative(Function):
    """An operator's derivative: ``apply(operator, inputs, tensors, backend, *leaves)``.

    The bundle of inputs, and the list of all its tensors, pass as objects; the leaves beside them
    are what can get a gradient, one by one, since tensors in a list get none.
    """

    @staticmethod
    def named(operator: str) -> type[FirstDerivative]:
        """Return a class of an operator's own, by which graphs, profiles and errors name it."""
        name = "".join(part.title() for part in operator.split("_"))
        return cast("type[FirstDerivative]", type(name, (FirstDerivative,), {}))

    @staticmethod
    def forward(
        ctx: Any,
        operator: Any,
        inputs: Any,
        tensors: Sequence[Tensor],
        backend: str,
        *leaves: Tensor | None,
    ) -> Any:
        outputs = operator.call_below_autograd(inputs, tensors, backend)
        result, backward = operator.bundled(outputs), operator.backward
        saved = operator.derivative.keep(inputs, result)
        kept, lengths = backward.places.take(inputs)
        ctx.save_for_backward(*kept, *saved)
        ctx.call = backward, backward.places.rest(inputs), lengths, backend
        ctx.set_materialize_grads(False)
        if dead := backward.without_gradient(inputs, result):
            ctx.mark_non_differentiable(*dead)
        return outputs

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        if all(each is None for each in grads):
            return (None,) * len(ctx.needs_input_grad)
        backward, rest, lengths, backend = ctx.call
        inputs, saved = backward.restored(ctx.saved_tensors, rest, lengths)
        flags = list(ctx.needs_input_grad[_BEFORE_LEAVES:])
        upstream = backward.upstream(grads, saved)
        found = iter(backward.call(inputs, saved, upstream, flags, backend))
        return (*[None] * _BEFORE_LEAVES, *(next(found) if flag else None for flag in flags))


class NoSecondDerivative(Function):
    """A backward operator with grad mode on: ``apply(backward, arguments, backend, *tensors)``.

    One of the tensors has to ask for a gradient, so that nothing passes unseen.

    Raises:
        NotImplementedError: when a derivative of the backward is asked for.
    """

    @staticmethod
    def forward(
        ctx: Any, backward: Any, arguments: Sequence[Any], backend: str, *tensors: Tensor
    ) -> tuple[Tensor, ...]:
        ctx.operator = backward.name
        with torch._C._AutoDispatchBelowAutograd():
            return tuple(backward.op(*arguments, backend=backend))

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        raise unsupported(ctx.operator, "a second derivative (double backward)")
