"""What each stage trains, on what, with which defaults; and how an idle adapter is kept still.

``STAGES`` is the one place that says how stages differ. The functions are all that CoLLaVO adds to
an ordinary training loop, so a loop without :class:`~collavo.train.trainer.CollavoTrainer` (FSDP2
by hand, for example) uses them as they are.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass

import torch
from torch import nn

from collavo.train.parts import CrayonModel, Part, crayon_model, part_parameters
from collavo.train.schedule import STEP_KINDS


@dataclass(frozen=True)
class Stage:
    """One way to train: parts, streams of samples, and the defaults of its paper.

    Args:
        parts: What it trains where nothing else is asked for.
        streams: Kinds of optimizer steps; all samples of a step, on all ranks, are of one kind.
        drawn: Whether a step's kind is drawn (``StepSchedule``); else every kind has its steps in
            each epoch.
        adapters: Adapters that it trains; empty takes those that the run names.
        alternating: Whether a step trains the adapter of its kind alone.
        learning_rate: Peak.
        adapter_learning_rate: Peak where adapters are trained in the decoder's place.
        global_batch: Samples of an optimizer step.
        epochs: Passes over the data.
        scheduler: Of transformers.
        warmup: Share of the steps.
        template: Name of the chat template that its data are for; None keeps the processor's.
    """

    parts: tuple[Part, ...]
    streams: tuple[str, ...]
    drawn: bool = False
    adapters: tuple[str, ...] = ()
    alternating: bool = False
    learning_rate: float = 1e-4
    adapter_learning_rate: float | None = None
    global_batch: int = 32
    epochs: float = 1.0
    scheduler: str = "cosine"
    warmup: float = 0.0
    template: str | None = None


STAGES: dict[str, Stage] = {
    "cpt": Stage(
        ("crayon",), ("image",), drawn=True, learning_rate=1e-4, scheduler="cosine_with_min_lr"
    ),
    "cit": Stage(
        ("crayon", "adapters"),
        STEP_KINDS,
        drawn=True,
        adapters=STEP_KINDS,
        alternating=True,
        learning_rate=1e-5,
        scheduler="cosine_with_min_lr",
    ),
    "align": Stage(
        ("projector",),
        ("image",),
        learning_rate=1e-3,
        global_batch=256,
        warmup=0.03,
        template="plain",
    ),
    "instruct": Stage(
        ("projector", "decoder"),
        ("image", "text"),
        learning_rate=2e-5,
        adapter_learning_rate=2e-4,
        global_batch=128,
        warmup=0.03,
        template="vicuna_v1",
    ),
}
"""The stages by name: CoLLaVO's two (paper, section 4), and LLaVA's two (LLaVA-1.5, table 9)."""


def stage_of(name: str) -> Stage:
    """Return the stage of a name.

    Raises:
        ValueError: naming those that there are.
    """
    if isinstance(name, str) and name in STAGES:
        return STAGES[name]
    came = repr(name) if isinstance(name, str) else type(name).__name__
    raise ValueError(f"stage: expected one of {', '.join(map(repr, STAGES))}, got {came}")


def trainable_parameters(
    model: nn.Module,
    stage: str,
    parts: Sequence[Part] | None = None,
    adapters: Sequence[str] | None = None,
) -> list[nn.Parameter]:
    """Return the parameters that a stage trains.

    Args:
        model: A CoLLaVO model, wrapped or not.
        stage: A name of ``STAGES``.
        parts: In place of the stage's own.
        adapters: Names of the adapters, if they are among the parts; None takes the stage's own.

    Raises:
        ValueError: if the stage is unknown, or the model lacks what the stage trains.
    """
    known = stage_of(stage)
    names = known.adapters if adapters is None else tuple(adapters)
    found: list[nn.Parameter] = []
    for part in known.parts if parts is None else parts:
        try:
            found += part_parameters(model, part, names)
        except ValueError as error:
            if not isinstance(getattr(model, "module", model), CrayonModel):
                raise
            raise ValueError(_lacking(stage, part, error)) from error
    return found


def _lacking(stage: str, part: str, error: ValueError) -> str:
    way = "; call model.add_dual_qlora() first" if part == "adapters" else ""
    return f"stage {stage!r} trains the {part}; {error}{way}"


def prepare_stage(
    model: nn.Module,
    stage: str,
    parts: Sequence[Part] | None = None,
    adapters: Sequence[str] | None = None,
) -> list[nn.Parameter]:
    """Let exactly the stage's parameters require gradients, and return them.

    Call it once, before the model is wrapped (DDP, FSDP) and before the optimizer is made:
    ``requires_grad`` does not change afterwards. What is trained becomes float32 where it has 16
    bits (the papers' learning rates are below the resolution of bfloat16), and so do crayon and
    adapters in every stage; the rest keeps its dtype.

    Args:
        model: A CoLLaVO model.
        stage: A name of ``STAGES``.
        parts: As :func:`trainable_parameters`.
        adapters: As :func:`trainable_parameters`.

    Raises:
        ValueError: as :func:`trainable_parameters`.
    """
    parameters = trainable_parameters(model, stage, parts, adapters)
    # Crayon and adapters in all stages alike: a saved model has one dtype for them.
    for parameter in (*_own_parameters(crayon_model(model)), *parameters):
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


def drop_idle_gradients(model: nn.Module, kind: str) -> None:
    """Take the gradients of the adapter that this step does not train away.

    Both adapters act in the forward pass. Without a gradient, neither weight decay nor the moments
    of an optimizer move a parameter: it stays as it is to the last bit, and so does its state.
    Call it after the backward pass, before gradients are clipped and applied.

    Args:
        model: A CoLLaVO model, wrapped or not.
        kind: The step's kind: the adapter of that name keeps its gradients.
    """
    inner = crayon_model(model)
    for name in STEP_KINDS:
        if name != kind:
            for parameter in inner.adapter_parameters(name):
                parameter.grad = None
