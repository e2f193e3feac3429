"""What each stage trains, and how the idle adapter of a step is kept still.

These functions are all that CoLLaVO adds to an ordinary training loop, so a loop without
:class:`~collavo.train.trainer.CollavoTrainer` (FSDP2 by hand, for example) uses them as they are.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import suppress
from typing import Protocol, runtime_checkable

import torch
from torch import nn

from collavo.train.schedule import STEP_KINDS, StepKind


@runtime_checkable
class CrayonModel(Protocol):
    """A model with a crayon prompt and named adapters."""

    def crayon_parameters(self) -> Iterable[nn.Parameter]:
        """Return queries, crayon MLP and, in projection mode, every ``A_seg`` and ``B_seg``."""
        ...

    def adapter_parameters(self, name: str) -> Iterable[nn.Parameter]:
        """Return A and B of the named adapter, of all layers; ``ValueError`` if it has none."""
        ...


def _crayon_model(model: nn.Module) -> CrayonModel:
    # DistributedDataParallel keeps the model under this name; FSDP2 changes it in place.
    inner = getattr(model, "module", model)
    if not isinstance(inner, CrayonModel):
        raise ValueError(
            f"model: expected a CoLLaVO model with crayon_parameters() and adapter_parameters(), "
            f"got {type(inner).__name__}"
        )
    return inner


def trainable_parameters(model: nn.Module, stage: str) -> list[nn.Parameter]:
    """Return the parameters that a stage trains.

    Args:
        model: A CoLLaVO model, wrapped or not.
        stage: ``"cpt"``: the crayon. ``"cit"``: the crayon and both adapters (one per step).

    Raises:
        ValueError: if the stage is unknown, or the model lacks what the stage trains.
    """
    if stage not in ("cpt", "cit"):
        came = repr(stage) if isinstance(stage, str) else type(stage).__name__
        raise ValueError(f"stage: expected 'cpt' or 'cit', got {came}")
    crayon_model = _crayon_model(model)
    parameters = list(crayon_model.crayon_parameters())
    if stage == "cpt":
        if not parameters:
            raise ValueError("model: stage 'cpt' trains the crayon, and crayon_mode is 'none'")
        return parameters
    for kind in STEP_KINDS:
        try:
            parameters.extend(crayon_model.adapter_parameters(kind))
        except ValueError as error:
            raise ValueError(
                f"model: stage 'cit' trains the adapters 'image' and 'vl', and the model has no "
                f"{kind!r}; call model.add_dual_qlora() first"
            ) from error
    return parameters


def prepare_stage(model: nn.Module, stage: str) -> list[nn.Parameter]:
    """Let exactly the stage's parameters require gradients, and return them.

    Call it once, before the model is wrapped (DDP, FSDP) and before the optimizer is made:
    ``requires_grad`` does not change afterwards. Crayon and adapters in 16 bits become float32
    (the paper's learning rates are below the resolution of bfloat16); the rest keeps its dtype.

    Args:
        model: A CoLLaVO model.
        stage: ``"cpt"`` or ``"cit"``.

    Raises:
        ValueError: as :func:`trainable_parameters`.
    """
    parameters = trainable_parameters(model, stage)
    # Both stages alike: a saved model has one dtype for crayon and adapters.
    for parameter in _own_parameters(_crayon_model(model)):
        if parameter.dtype in (torch.bfloat16, torch.float16):
            parameter.data = parameter.data.float()
    model.requires_grad_(False)
    for parameter in parameters:
        parameter.requires_grad_(True)
    return parameters


def _own_parameters(model: CrayonModel) -> Iterator[nn.Parameter]:
    yield from model.crayon_parameters()
    for name in STEP_KINDS:
        with suppress(ValueError):
            yield from model.adapter_parameters(name)


def drop_idle_gradients(model: nn.Module, kind: StepKind) -> None:
    """Take the gradients of the adapter that this step does not train away.

    Both adapters act in the forward pass. Without a gradient, neither weight decay nor the moments
    of an optimizer move a parameter: it stays as it is to the last bit, and so does its state.
    Call it after the backward pass, before gradients are clipped and applied.

    Args:
        model: A CoLLaVO model, wrapped or not.
        kind: The step's kind: the adapter of that name keeps its gradients.
    """
    crayon_model = _crayon_model(model)
    for name in STEP_KINDS:
        if name != kind:
            for parameter in crayon_model.adapter_parameters(name):
                parameter.grad = None
