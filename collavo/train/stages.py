"""What each stage trains, on what, with which defaults; and how an idle adapter is kept still.

``STAGES`` is the one place that says how stages differ. The functions are all that CoLLaVO adds to
an ordinary training loop, so a loop without :class:`~collavo.train.trainer.CollavoTrainer` (FSDP2
by hand, for example) uses them as they are.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import cast

import torch
from torch import nn

from collavo.train.parts import (
    PARTS,
    CrayonModel,
    Part,
    crayon_model,
    parameters_of_images,
    part_parameters,
)
from collavo.train.presets import TUNING, Settings
from collavo.train.schedule import STEP_KINDS


@dataclass(frozen=True)
class Stage:
    """One way to train: parts, streams of samples, and the settings of its paper.

    Args:
        parts: What it trains where nothing else is asked for.
        streams: Kinds of optimizer steps; all samples of a step, on all ranks, are of one kind.
        drawn: Whether a step's kind is drawn (``StepSchedule``) and each kind has a data set; else
            every kind has its steps in each epoch (``GroupedSchedule``).
        adapters: Adapters that it trains; empty takes those that the run names.
        alternating: Whether a step trains the adapter of its kind alone.
        settings: Arguments of the trainer and of ``collavo train`` where nothing else is said.
        adapter_settings: Those that differ where adapters are trained in the decoder's place.
    """

    parts: tuple[Part, ...]
    streams: tuple[str, ...]
    drawn: bool = False
    adapters: tuple[str, ...] = ()
    alternating: bool = False
    settings: Settings = field(default_factory=dict)
    adapter_settings: Settings = field(default_factory=dict)

    def settings_of(self, adapters: Sequence[str] | None) -> Settings:
        """Return the settings of a run.

        Args:
            adapters: Which the run names.
        """
        return {**self.settings, **(self.adapter_settings if adapters else {})}


_CRAYON = {
    "num_train_epochs": 1.0,
    "lr_scheduler_type": "cosine_with_min_lr",
    "warmup_steps": 0.0,
    "bf16": False,
    "per_device_train_batch_size": 32,
    "lora_rank": 64,
    "lora_alpha": 64.0,
    "lora_dropout": 0.0,
}
_LORA = {"lora_rank": 128, "lora_alpha": 256.0, "lora_dropout": 0.05}

STAGES: dict[str, Stage] = {
    "cpt": Stage(("crayon",), ("image",), drawn=True, settings={**_CRAYON, "learning_rate": 1e-4}),
    "cit": Stage(
        ("crayon", "adapters"),
        STEP_KINDS,
        drawn=True,
        adapters=STEP_KINDS,
        alternating=True,
        settings={**_CRAYON, "learning_rate": 1e-5},
    ),
    "align": Stage(
        ("projector",),
        ("image", "text"),
        settings={
            **TUNING,
            "num_train_epochs": 1.0,
            "learning_rate": 1e-3,
            "global_batch": 256,
            "per_device_train_batch_size": 32,
            "template": "plain",
            **_LORA,
        },
    ),
    "instruct": Stage(
        ("projector", "decoder"),
        ("image", "text"),
        settings={
            **TUNING,
            "num_train_epochs": 1.0,
            "learning_rate": 2e-5,
            "global_batch": 128,
            "per_device_train_batch_size": 16,
            "template": "vicuna_v1",
            **_LORA,
        },
        adapter_settings={"learning_rate": 2e-4, "projector_learning_rate": 2e-5},
    ),
}
"""The stages by name: CoLLaVO's two (paper, section 4), and LLaVA's two (LLaVA-1.5, table 9)."""

# Parts that a sample without an image reaches.
_OF_TEXT: tuple[Part, ...] = ("decoder", "adapters")


def stage_of(name: str) -> Stage:
    """Return the stage of a name.

    Raises:
        ValueError: naming those that there are.
    """
    if isinstance(name, str) and name in STAGES:
        return STAGES[name]
    came = repr(name) if isinstance(name, str) else type(name).__name__
    raise ValueError(f"stage: expected one of {', '.join(map(repr, STAGES))}, got {came}")


def parts_of(
    stage: str, parts: Sequence[str] | None = None, adapters: Sequence[str] | None = None
) -> tuple[Part, ...]:
    """Return the parts that a run trains.

    Args:
        stage: A name of ``STAGES``.
        parts: In place of the stage's own; None takes those, and where the run names adapters
            these in the decoder's place.
        adapters: Which the run names.

    Raises:
        ValueError: if the stage or a part is unknown, or adapters are named that are not trained.

    Example:
        >>> parts_of("instruct"), parts_of("instruct", adapters=["mine"])
        (('projector', 'decoder'), ('projector', 'adapters'))
    """
    known = stage_of(stage)
    chosen = known.parts if parts is None else tuple(dict.fromkeys(parts))
    for part in chosen:
        if part not in PARTS:
            raise ValueError(f"parts: expected some of {', '.join(PARTS)}, got {part!r}")
    if not chosen:
        raise ValueError(f"parts: expected some of {', '.join(PARTS)}, got none")
    if not adapters:
        return cast(tuple[Part, ...], chosen)
    if known.adapters and tuple(adapters) != known.adapters:
        raise ValueError(
            f"adapters: stage {stage!r} trains {' and '.join(map(repr, known.adapters))}, got "
            f"{list(adapters)}"
        )
    if parts is None:
        chosen = tuple("adapters" if part == "decoder" else part for part in chosen)
    if "adapters" not in chosen:
        raise ValueError(
            f"adapters: got {list(adapters)}, but the parts to train are {', '.join(chosen)}; add "
            "adapters to them (parts=, on the command line --parts)"
        )
    return cast(tuple[Part, ...], chosen)


def learns_from_text(parts: Sequence[str]) -> bool:
    """Say whether a sample without an image trains any of the parts.

    Args:
        parts: Of :func:`parts_of`.
    """
    return any(part in _OF_TEXT for part in parts)


def without_text(parts: Sequence[str]) -> str:
    """Return the sentence on samples without an image, where no part learns from them.

    Args:
        parts: Of :func:`parts_of`.
    """
    return (
        f"they train nothing of what is to be trained ({', '.join(parts)}); leave them out, or "
        f"train {' or '.join(_OF_TEXT)} too (parts=, on the command line --parts)"
    )


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
        parts: As :func:`parts_of`.
        adapters: Names of the adapters; None takes the stage's own.

    Raises:
        ValueError: if the stage is unknown, or the model lacks what the stage trains.
    """
    known = stage_of(stage)
    names = tuple(adapters or known.adapters)
    found: list[nn.Parameter] = []
    for part in parts_of(stage, parts, adapters):
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
    inner = getattr(model, "module", model)
    if getattr(inner, "dtype_at_rest", inner) is None:
        inner.dtype_at_rest = inner.dtype
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


def drop_unreached_gradients(model: nn.Module, kind: str) -> None:
    """Take away the gradients, all zero, of what a step's samples do not reach.

    In a step without images those are the crayon and adapters of image tokens alone: an optimizer
    would move them by its momentum. Call it as :func:`drop_idle_gradients`.

    Args:
        model: A CoLLaVO model, wrapped or not.
        kind: The step's kind.
    """
    if kind == "text":
        for parameter in parameters_of_images(model):
            parameter.grad = None


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


def give_rate(
    optimizer: torch.optim.Optimizer, parameters: Sequence[nn.Parameter], rate: float
) -> None:
    """Move parameters into groups of their own, with their own learning rate.

    Args:
        optimizer: Has made no step.
        parameters: Those that it does not hold are passed over.
        rate: Their peak.
    """
    moved = {id(parameter) for parameter in parameters}
    for group in list(optimizer.param_groups):
        own = [p for p in group["params"] if id(p) in moved]
        if own:
            group["params"] = [p for p in group["params"] if id(p) not in moved]
            options = {name: value for name, value in group.items() if name != "params"}
            optimizer.add_param_group({**options, "params": own, "lr": rate})
