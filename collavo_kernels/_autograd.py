"""The autograd functions behind every operator, and what all operators refuse.

``First`` is the derivative: its backward is an operator of its own. ``Second`` stands around that
operator where a second derivative could be asked for, and raises when it is.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.autograd.function import Function

from collavo_kernels._schema import Places

_PLAIN = (Tensor, torch.nn.Parameter)
_BEFORE_LEAVES = 4  # what ``First.apply`` takes before them


def wants_gradient(tensors: Iterable[Tensor]) -> bool:
    """Tell whether autograd will ask for a gradient of any of these."""
    # Plain loops here and below: a generator costs more than what it does.
    if torch.is_grad_enabled():
        for each in tensors:
            if each.requires_grad:
                return True
    return False


def runs_directly(tensors: Iterable[Tensor]) -> bool:
    """Tell whether no dispatch key below autograd would do anything but run the operator.

    That is: no mode, no transform, no subclass, no lazy view, no tensor without memory.
    """
    if torch._C._len_torch_dispatch_stack() or torch._C._functorch.peek_interpreter_stack():
        return False
    for each in tensors:
        if type(each) not in _PLAIN or each.is_meta or each.is_neg() or each._is_zerotensor():
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


class First(Function):
    """An operator's first derivative: ``apply(operator, inputs, tensors, backend, *leaves)``.

    The bundle of inputs, and the list of all its tensors, pass as objects; the leaves beside them
    are what can get a gradient, one by one, since tensors in a list get none.
    """

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
        derivative, result = operator.derivative, operator.bundled(outputs)
        kept, saved = derivative.keep(inputs, result)
        pack = Pack.of((*kept, *saved), operator.backward.kept_places)
        ctx.save_for_backward(*pack.tensors)
        ctx.call = operator.backward, pack._replace(tensors=()), backend
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(*derivative.without_gradient(inputs, result))
        return outputs

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        if all(each is None for each in grads):
            return (None,) * len(ctx.needs_input_grad)
        operator, pack, backend = ctx.call
        inputs, saved = operator.kept(pack.restored(ctx.saved_tensors))
        flags = list(ctx.needs_input_grad[_BEFORE_LEAVES:])
        found = iter(operator.call(inputs, saved, operator.upstream(grads, saved), flags, backend))
        return (*[None] * _BEFORE_LEAVES, *(next(found) if flag else None for flag in flags))


class Second(Function):
    """A backward operator where grad mode is on: ``apply(operator, arguments, backend, *tensors)``.

    Raises:
        NotImplementedError: when a derivative of the backward is asked for.
    """

    @staticmethod
    def forward(
        ctx: Any, operator: Any, arguments: Sequence[Any], backend: str, *tensors: Tensor
    ) -> tuple[Tensor, ...]:
        ctx.operator = operator.name
        with torch._C._AutoDispatchBelowAutograd():
            return tuple(operator.op(*arguments, backend=backend))

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        raise unsupported(ctx.operator, "a second derivative (double backward)")


class Pack(NamedTuple):
    """Arguments with their tensors taken out, each of them once: hooks see every tensor once.

    Attributes:
        values: The arguments; None where a tensor was, a list where a list of them was.
        places: For each tensor's place: the argument, the entry of its list or -1, the tensor.
        tensors: What was taken out.
    """

    values: list[Any]
    places: list[tuple[int, int, int]]
    tensors: Sequence[Tensor]

    @staticmethod
    def of(arguments: Sequence[Any], where: Places) -> Pack:
        """Take the tensors out."""
        values: list[Any] = list(arguments)
        numbers: dict[int, int] = {}
        tensors: list[Tensor] = []

        def number(tensor: Tensor) -> int:
            found = numbers.setdefault(id(tensor), len(tensors))
            if found == len(tensors):
                tensors.append(tensor)
            return found

        places = [(i, -1, number(values[i])) for i in where.single if values[i] is not None]
        for i in where.lists:
            places += [(i, j, number(each)) for j, each in enumerate(values[i])]
            values[i] = [None] * len(values[i])
        for i in where.single:
            values[i] = None
        return Pack(values, places, tensors)

    def restored(self, tensors: Sequence[Tensor]) -> list[Any]:
        """Return the arguments with the tensors in their places."""
        values = [list(each) if isinstance(each, list) else each for each in self.values]
        for argument, entry, number in self.places:
            if entry < 0:
                values[argument] = tensors[number]
            else:
                cast("list[Any]", values[argument])[entry] = tensors[number]
        return values
