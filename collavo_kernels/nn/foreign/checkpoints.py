"""The crayon of a checkpointed forward pass, there again when the backward runs it once more.

What a checkpoint runs sees the crayon that is bound; the backward runs it later, outside of the
context and on a GPU in another thread. So the crayon is kept with the function at the checkpoint's
call, and its table goes beside the other tensors: re-entrant checkpointing takes gradients to those
alone.
"""

from __future__ import annotations

from collections.abc import Callable
from contextvars import ContextVar
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from collavo_kernels.nn.attention.projections import CrayonInputs
from collavo_kernels.nn.bound import bound_crayon, current_crayon

# Where transformers' layers and decoders, and torch's CheckpointWrapper, keep what they call.
_ATTRIBUTES = ("_gradient_checkpointing_func", "checkpoint_fn")
_KEPT: ContextVar[bool] = ContextVar("kept_crayon", default=False)


class KeepsCrayon:
    """A checkpoint function that keeps the crayon which is bound when it is called.

    Args:
        checkpoint: The function: ``torch.utils.checkpoint.checkpoint``, its options bound.
    """

    def __init__(self, checkpoint: Callable[..., Any]) -> None:
        self.checkpoint = checkpoint

    @property
    def keywords(self) -> dict[str, Any]:
        """Options that are bound in the function, as a ``partial`` has them."""
        return dict(getattr(self.checkpoint, "keywords", {}))

    def __call__(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Run a function under the checkpoint.

        Raises:
            ValueError: if there is a crayon and the checkpoint is none of torch's: whether it takes
                a gradient to one tensor more is not known.
        """
        crayon = current_crayon()
        if crayon is None or crayon.table is None:
            return self.checkpoint(partial(_again, function, crayon), *args, **kwargs)
        kind = self.checkpoint
        while isinstance(kind, partial):
            kind = kind.func
        if getattr(kind, "__module__", None) != "torch.utils.checkpoint":
            raise ValueError(
                "crayon_context: expected torch.utils.checkpoint.checkpoint behind gradient "
                f"checkpointing, got {getattr(kind, '__module__', '')}."
                f"{getattr(kind, '__qualname__', kind)}, which may leave the crayon without its "
                "gradient; use torch's, or turn checkpointing off"
            )
        return self.checkpoint(
            partial(_with_table, function, crayon), crayon.table, *args, **kwargs
        )


def _again(function: Callable[..., Any], crayon: CrayonInputs | None, *args: Any, **kw: Any) -> Any:
    token = _KEPT.set(True)
    try:
        with bound_crayon(crayon):
            return function(*args, **kw)
    finally:
        _KEPT.reset(token)


def _with_table(
    function: Callable[..., Any], crayon: CrayonInputs, table: Tensor, *args: Any, **kwargs: Any
) -> Any:
    return _again(function, crayon._replace(table=table), *args, **kwargs)


def keep_crayon(decoder: nn.Module) -> None:
    """Let every checkpoint function that a decoder and its layers have keep the crayon.

    Args:
        decoder: May have been seen before; nothing is put on twice.
    """
    for module in decoder.modules():
        for name in _ATTRIBUTES:
            function = vars(module).get(name)
            if function is not None and not isinstance(function, KeepsCrayon):
                setattr(module, name, KeepsCrayon(function))


def refuse_lost_crayon() -> None:
    """Raise inside a layer that the backward runs once more, by a checkpoint that keeps no crayon.

    Raises:
        RuntimeError: there; with or without a crayon: it cannot be seen which it was.
    """
    if torch.compiler.is_compiling() or _KEPT.get() or current_crayon() is not None:
        return
    if torch._C._current_graph_task_id() != -1:
        raise RuntimeError(
            "crayon_context: a checkpoint runs a layer again without the crayon of its forward "
            "pass; turn it off, and checkpointing on by transformers' "
            "gradient_checkpointing_enable or torch's CheckpointWrapper, which keep the crayon"
        )
