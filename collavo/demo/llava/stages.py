"""LLaVA's two stages on the tiny model, through ``ConversationDataset`` and ``CollavoTrainer``."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import PrinterCallback, ProgressCallback

from collavo.conversations import ConversationDataset
from collavo.demo.tuning import Watch
from collavo.processing.chat_templates import chat_template
from collavo.processing.processor import CollavoProcessor
from collavo.train import CollavoTrainer, CollavoTrainingArguments, CrayonCollator
from collavo.train.stages import stage_of

ADAPTER = "instruct"
PARTS = ("projector", "adapters", "crayon")
"""What the demo's ``instruct`` trains: LLaVA-1.5's projector and LoRA, and the crayon."""


@dataclass(frozen=True)
class StageRun:
    """What came of a stage.

    Args:
        losses: As they were logged, one per ten steps.
        moved: Names of the tensors of the model that are not what they were, bit for bit.
        held: Whether all of these are of the parts that the stage trains.
    """

    losses: list[float]
    moved: list[str] = field(default_factory=list)
    held: bool = True


def run_stage(
    model: nn.Module,
    processor: CollavoProcessor,
    data: ConversationDataset,
    stage: str,
    *,
    folder: Path,
    steps: int,
    batch_size: int,
    learning_rate: float,
    seed: int,
    parts: Sequence[str] | None = None,
    progress: bool = True,
) -> StageRun:
    """Train one stage.

    Args:
        model: A CoLLaVO model; trained in place.
        processor: Its processor; ``align`` reads by LLaVA's template for it, ``plain``.
        data: LLaVA's records.
        stage: ``"align"`` or ``"instruct"``.
        folder: Where the trainer may write; it saves nothing.
        steps: Optimizer steps.
        batch_size: Conversations per step.
        learning_rate: Peak of the cosine.
        seed: Of the order of the data.
        parts: In place of the stage's own.
        progress: Whether to show a bar.
    """
    arguments = CollavoTrainingArguments(
        output_dir=str(folder),
        stage=stage,  # type: ignore[arg-type]
        parts=None if parts is None else list(parts),
        adapters=[ADAPTER] if parts is not None and "adapters" in parts else None,
        global_batch=batch_size,
        per_device_train_batch_size=batch_size,
        max_steps=steps,
        learning_rate=learning_rate,
        projector_learning_rate=learning_rate,
        logging_steps=10,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        seed=seed,
        use_cpu=True,
        bf16=False,
        dataloader_pin_memory=False,
    )
    watch = Watch(stage, progress)
    trainer = CollavoTrainer(
        model,
        arguments,
        train_dataset=data,
        data_collator=CrayonCollator(for_stage(processor, stage), object_text=False),
        processing_class=processor,
        callbacks=[watch],
    )
    trained = {id(parameter) for parameter in model.parameters() if parameter.requires_grad}
    everyone = model.named_parameters(remove_duplicate=False)  # a tied head has a name of its own
    owned = {name for name, parameter in everyone if id(parameter) in trained}
    before = state_of(model)
    for unwanted in (PrinterCallback, ProgressCallback):
        trainer.remove_callback(unwanted)
    trainer.train()
    moved = moved_tensors(before, state_of(model))
    return StageRun(watch.losses, moved, set(moved) <= owned)


def for_stage(processor: CollavoProcessor, stage: str) -> CollavoProcessor:
    """Return a processor with the chat template that a stage's data are for.

    Args:
        processor: The model's, which stays as it is.
        stage: A name of ``STAGES``.
    """
    name = stage_of(stage).settings["template"]
    made = copy.copy(processor)
    made.chat_template = chat_template(name)
    return made


def state_of(model: nn.Module) -> dict[str, Tensor]:
    """Copy every tensor of a model's state, 4-bit weights as they are stored.

    Args:
        model: Any.
    """
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def moved_tensors(before: Mapping[str, Tensor], now: Mapping[str, Tensor]) -> list[str]:
    """List the tensors that are not what they were, to the last bit.

    Args:
        before: From :func:`state_of`.
        now: The same, later; of the same names.
    """
    return [name for name, tensor in now.items() if not torch.equal(before[name], tensor)]
