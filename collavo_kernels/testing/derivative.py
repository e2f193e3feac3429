"""A backend's backward, called by its own function and not by autograd."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from collavo_kernels._register import AnyOperator


def backward_arguments(
    operator: AnyOperator,
    inputs: Any,
    result: Any,
    grads: Sequence[Tensor | None],
    wanted: Sequence[bool] | None = None,
) -> tuple[Any, Any, Any, Any]:
    """Return what autograd hands to a backend's ``backward``.

    Args:
        operator: The operator, which has a derivative.
        inputs: A bundle of its inputs.
        result: What a backend's ``forward`` returned for them.
        grads: The gradients of the results that have one, in order.
        wanted: For each input that can get a gradient, lists taken apart, whether it is wanted;
            None: all that are there.

    Returns:
        ``inputs``, ``saved``, ``grads`` and ``wanted``.

    Raises:
        ValueError: if there are more or fewer flags than such inputs.
    """
    derivative = operator.derivative
    if derivative is None:
        raise ValueError(f"operator: expected one with a derivative, got {operator.name}")
    saved = derivative.keep(inputs, result)
    replaced = {name: getattr(saved, each) for name, each in derivative.replaced.items()}
    if wanted is None:
        leaves = derivative.leaves(inputs)
        wanted = [leaf is not None and leaf.is_floating_point() for leaf in leaves]
    grouped = derivative.grouped(inputs, list(wanted))
    return inputs._replace(**replaced), saved, derivative.output_grads(*grads), grouped
