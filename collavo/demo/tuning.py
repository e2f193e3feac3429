"""The two stages of CoLLaVO on the tiny model, through ``CollavoTrainer``, and their controls."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import PrinterCallback, ProgressCallback, TrainerCallback

from collavo.demo.conversations import Talk, Talks
from collavo.demo.storage import Scenes
from collavo.evaluation.answering import with_crayon
from collavo.processing.processor import CollavoProcessor
from collavo.train import CollavoTrainer, CollavoTrainingArguments
from collavo.train.collator import CrayonCollator
from collavo.train.schedule import STEP_KINDS

Stage = Literal["cpt", "cit"]


@dataclass(frozen=True)
class Phase:
    """One run of the trainer.

    Args:
        name: What the progress bar and the report call it.
        stage: ``"cpt"`` or ``"cit"``.
        steps: Optimizer steps.
        learning_rate: Peak of the cosine.
        image_talk: Makes the crayon instructions (CPT, Image-CIT); None if no step takes any.
        vl_talk: Makes the visual instructions (VL-CIT); None if no step takes any.
        vl_probability: Of a VL-CIT step.
        one_adapter: Whether both kinds of steps train the one adapter ``"image"`` (an ablation).
    """

    name: str
    stage: Stage
    steps: int
    learning_rate: float
    image_talk: Talk | None
    vl_talk: Talk | None = None
    vl_probability: float = 0.0
    one_adapter: bool = False


@dataclass(frozen=True)
class Trained:
    """What came of a phase.

    Args:
        losses: As they were logged, one per ten steps.
        steps: Optimizer steps of each kind.
        idle_kept: Whether no step moved the adapter that it did not train by one bit.
    """

    losses: list[float]
    steps: dict[str, int]
    idle_kept: bool


class _OneAdapter(CollavoTrainer):
    """Both kinds of steps train one adapter; the other stays without effect."""

    def trained_adapter(self, kind: str) -> str:
        return "image"


class PhaseCollator:
    """The package's collator; a control's batches come without their crayon.

    Args:
        processor: The model's processor.
        crayon: Whether batches keep it.
    """

    def __init__(self, processor: CollavoProcessor, crayon: bool = True) -> None:
        self.collator = CrayonCollator(processor, object_text=False)
        self.crayon = crayon

    def __call__(self, records: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        """Make one batch.

        Args:
            records: As for ``CrayonCollator``.
        """
        return with_crayon(self.collator(records), "on" if self.crayon else "off")


@dataclass
class Watch(TrainerCallback):
    """A progress bar, the losses that the trainer logs, and the bits of the idle adapter.

    Args:
        label: What the bar calls the run.
        show: Whether there is a bar.
    """

    label: str
    show: bool
    losses: list[float] = field(default_factory=list)
    idle_kept: bool = True
    trainer: CollavoTrainer | None = None
    _idle: list[Tensor] = field(default_factory=list)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Open the bar."""
        self.bar = tqdm(total=state.max_steps, desc=self.label, disable=not self.show, leave=False)

    def _idle_parameters(self, step: int, model: Any) -> list[nn.Parameter]:
        if self.trainer is None or not self.trainer.stage.alternating:
            return []
        trained = self.trainer.trained_adapter(self.trainer.schedule.kind(step))
        idle = [name for name in STEP_KINDS if name != trained]
        return [p for name in idle for p in model.adapter_parameters(name)]

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Copy what the step must leave."""
        self._idle = snapshot(self._idle_parameters(state.global_step, kwargs["model"]))

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Compare it."""
        self.bar.update(1)
        now = self._idle_parameters(state.global_step - 1, kwargs["model"])
        self.idle_kept &= same_bits(self._idle, now)

    def on_log(
        self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **_: Any
    ) -> None:
        """Keep the loss."""
        if logs and "loss" in logs:
            self.losses.append(float(logs["loss"]))
            self.bar.set_postfix(loss=f"{logs['loss']:.3f}")

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Close the bar."""
        self.bar.close()


def run_phase(
    model: nn.Module,
    processor: CollavoProcessor,
    scenes: Scenes,
    phase: Phase,
    *,
    folder: Path,
    seed: int,
    batch_size: int,
    crayon: bool = True,
    progress: bool = True,
) -> Trained:
    """Train one phase.

    Args:
        model: A ``CollavoForConditionalGeneration``; trained in place.
        processor: Its processor.
        scenes: The training scenes.
        phase: What to train.
        folder: Where the trainer may write; it saves nothing.
        seed: Of the order and the draws of the data.
        batch_size: Samples per step.
        crayon: False trains the control: the same data without the Crayon Prompt.
        progress: Whether to show a bar.
    """
    arguments = CollavoTrainingArguments(
        output_dir=str(folder),
        stage=phase.stage,
        vl_probability=phase.vl_probability,
        max_steps=phase.steps,
        per_device_train_batch_size=batch_size,
        learning_rate=phase.learning_rate,
        min_learning_rate=phase.learning_rate / 50,
        warmup_steps=min(20, phase.steps // 5),
        logging_steps=10,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        seed=seed,
        use_cpu=True,
        dataloader_pin_memory=False,
    )
    rounds = -(-phase.steps * batch_size // len(scenes))

    def talks(talk: Talk | None) -> Talks | None:
        return None if talk is None else Talks(scenes, talk, seed, rounds=rounds)

    watch = Watch(phase.name, progress)
    trainer = (_OneAdapter if phase.one_adapter else CollavoTrainer)(
        model,
        arguments,
        train_dataset=talks(phase.image_talk),
        vl_dataset=talks(phase.vl_talk),
        data_collator=PhaseCollator(processor, crayon),
        processing_class=processor,
        callbacks=[watch],
    )
    watch.trainer = trainer
    for unwanted in (PrinterCallback, ProgressCallback):
        trainer.remove_callback(unwanted)
    trainer.train()
    steps = trainer.schedule.counts(0, phase.steps)
    return Trained(watch.losses, steps, watch.idle_kept)


def snapshot(parameters: Any) -> list[Tensor]:
    """Copy parameters, to compare them bit for bit later.

    Args:
        parameters: An iterable of parameters.
    """
    return [parameter.detach().clone() for parameter in parameters]


def same_bits(before: Sequence[Tensor], parameters: Any) -> bool:
    """Say whether parameters are what they were, to the last bit.

    Args:
        before: From :func:`snapshot`.
        parameters: The same parameters now.
    """
    now = list(parameters)
    return len(before) == len(now) and all(
        torch.equal(old, new.detach()) for old, new in zip(before, now, strict=True)
    )
