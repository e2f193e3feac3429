"""The trainer: transformers' own, plus the stages and the alternation of Dual QLoRA."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import collavo._requirements  # noqa: F401  (before what it checks)

import torch
from torch import nn
from torch.utils.data import ConcatDataset, DataLoader, Dataset, IterableDataset, Sampler
from transformers import ProcessorMixin

from collavo._arguments import expect_like
from collavo.prepared.read import PreparedDataset
from collavo.train import checkpoint
from collavo.train.arguments import CollavoTrainingArguments
from collavo.train.collator import CrayonCollator
from collavo.train.dataset import CrayonInstructionDataset
from collavo.train.exports import export
from collavo.train.grouping import GroupedSchedule
from collavo.train.held_out import HeldOutLoss
from collavo.train.parts import part_parameters
from collavo.train.safe_saves import SafeSaves
from collavo.train.sampler import JoinedDataset, UnusableReport
from collavo.train.saving import SaveCheck, SaveError
from collavo.train.schedule import StepSchedule
from collavo.train.sharding import SHARDS_BYTES, replicated_parameters
from collavo.train.stages import (
    drop_idle_gradients,
    drop_unreached_gradients,
    give_rate,
    learns_from_text,
    prepare_stage,
    stage_of,
    without_text,
)
from collavo.train.streams import DrawnStreams, GroupedStreams, expect_images


def _check_crayons(dataset: Any, collator: object) -> None:
    """Raise for a data set whose crayons are of other image tokens than the collator's."""
    # A crayon does not tell of which grid its cells are; what was prepared does.
    if not isinstance(collator, CrayonCollator):
        return
    if isinstance(dataset, dict | ConcatDataset):
        parts = dataset.values() if isinstance(dataset, dict) else dataset.datasets
        for part in parts:
            _check_crayons(part, collator)
        return
    processor = collator.processor
    if isinstance(dataset, CrayonInstructionDataset) and processor.box_frame != "image":
        raise ValueError(
            "box_frame: expected 'image' for crayon instructions, whose boxes are fractions of the "
            f"image, got {processor.box_frame!r}; make the processor without it"
        )
    for samples in (
        getattr(dataset, "samples", None),
        getattr(getattr(dataset, "panoptic", None), "samples", None),
    ):
        if isinstance(samples, PreparedDataset):
            samples.check_processor(processor)


_log = logging.getLogger(__name__)


class CollavoTrainer(HeldOutLoss, SafeSaves):
    """Trains a CoLLaVO model in one of the stages: CoLLaVO's two (section 3) and LLaVA's two.

    ``cpt`` trains the crayon prompt on crayon instructions. ``cit`` draws Image-CIT or VL-CIT for
    every optimizer step, takes all of the step's micro-batches on all ranks from that data set, and
    trains that adapter and the crayon prompt; the other adapter acts in the forward pass and does
    not change by one bit, nor does its optimizer state. ``align`` and ``instruct`` train the
    projector, and projector and decoder or adapters, on one data set of samples with and without
    images; every step is of one kind (``GroupedSchedule``). Everything else (progress bars, mixed
    precision, accumulation, distribution) is ``transformers.Trainer``.

    Before the first step a small model is saved into the output folder and removed again, and free
    space is compared with what will be saved. Where saving fails all the same, a ``SaveError`` says
    where the trained tensors were written instead. Checkpoints are sealed when they are whole, and
    no other is resumed.

    A record that cannot be used does not end a run: it is listed in ``skipped_records.jsonl`` of
    the output folder, and the next of its data set that can be used stands in for it. A run that is
    not resumed begins that list anew.

    Args:
        model: A ``CollavoForConditionalGeneration``, or a LLaVA that ``apply_to_llava`` changed;
            for ``cit`` with the adapters ``image`` and ``vl``. Its ``requires_grad`` flags are set
            here, once.
        args: The stage and its hyperparameters.
        train_dataset: Crayon instructions (a map-style data set); in ``align`` and ``instruct``
            conversations, with ``with_image`` and, for the grouping, ``lengths``.
        vl_dataset: Visual instructions; needed where ``cit`` draws VL-CIT steps.
        kwargs: As for ``transformers.Trainer`` (``data_collator``, ``eval_dataset`` ...).

    Raises:
        ValueError: if the model lacks what the stage trains, a data set that the stage draws from
            is missing or empty or was prepared for another processor than the collator's,
            samples have no image and train nothing without one, FSDP is asked for something it
            cannot do here, or DeepSpeed trains ``cit``.
    """

    args: CollavoTrainingArguments

    def __init__(
        self,
        model: nn.Module,
        args: CollavoTrainingArguments,
        train_dataset: Dataset[Any] | None = None,
        vl_dataset: Dataset[Any] | None = None,
        **kwargs: Any,
    ) -> None:
        if not isinstance(args, CollavoTrainingArguments):
            raise TypeError(f"args: expected CollavoTrainingArguments, got {type(args).__name__}")
        for name, data in (("train_dataset", train_dataset), ("vl_dataset", vl_dataset)):
            if data is not None:
                expect_like(name, data, "a data set", has=("__getitem__", "__len__"))
        if isinstance(kwargs.get("data_collator"), ProcessorMixin):
            raise TypeError(
                "data_collator: expected CrayonCollator(processor), got the processor itself"
            )
        self.stage = stage_of(args.stage)
        prepare_stage(model, args.stage, cast(Any, args.parts), args.adapters)
        self._logged_kinds: Counter[str] = Counter()
        collator = kwargs.get("data_collator")
        for data in (train_dataset, vl_dataset, kwargs.get("eval_dataset")):
            _check_crayons(data, collator)
        self.unusable = UnusableReport(Path(str(args.output_dir)) / "skipped_records.jsonl")
        check = getattr(collator, "check", None)
        self.streams = self._open(args, train_dataset, vl_dataset, check)
        self.schedule = self.streams.schedule
        self.data_facts: dict[str, Any] = {}
        if not self.stage.drawn:  # earlier versions have sealed checkpoints of the others
            self.data_facts |= checkpoint.data_facts(train_dataset, collator)
            self.data_facts["adapter_sizes"] = checkpoint.adapter_facts(model)
        self.data_facts |= self.streams.facts()  # last: they follow from those
        if "eval_dataset" in kwargs:
            kwargs["eval_dataset"] = self._past_unusable(kwargs["eval_dataset"], check)
        super().__init__(
            model=cast(Any, model), args=args, train_dataset=self.streams.dataset, **kwargs
        )
        # Losses are divided by all of a step's labels. transformers 5.5.0 lets accelerate divide
        # them by the micro-batches once more; later ones set this themselves.
        self.accelerator.gradient_accumulation_steps = 1
        self._check_fsdp()
        self._check_deepspeed()
        self.add_callback(SaveCheck(self.check_saving))
        if self.streams.dataset is not None:
            self._get_train_sampler()  # complains now, not in train(), about an empty data set

    def _open(
        self,
        args: CollavoTrainingArguments,
        train: Dataset[Any] | None,
        vl: Dataset[Any] | None,
        check: Callable[[Any], None] | None,
    ) -> DrawnStreams | GroupedStreams:
        tools: Any = {"on_unusable": self.unusable, "check": check}
        if self.stage.drawn:
            probability = args.vl_probability if self.stage.alternating else 0.0
            schedule = StepSchedule(args.stream_seed, probability)
            return DrawnStreams.open(schedule, train, vl if probability > 0.0 else None, **tools)
        if vl is not None:
            raise ValueError(
                f"vl_dataset: expected None in stage {args.stage!r}, whose samples all come from "
                "train_dataset"
            )
        if not learns_from_text(args.trained_parts):
            expect_images(train, without_text(args.trained_parts))
        size, seed, by_length = args.step_size, args.stream_seed, args.group == "length"
        return GroupedStreams.open(train, size, seed, by_length=by_length, **tools)

    def _past_unusable(self, data: Any, check: Callable[[Any], None] | None) -> Any:
        """Return evaluation data that reports a bad record instead of ending the run at it."""
        if isinstance(data, dict):
            return {name: self._past_unusable(one, check) for name, one in data.items()}
        by_index = isinstance(data, Dataset) and not isinstance(data, IterableDataset)
        if by_index and hasattr(data, "__len__"):
            return JoinedDataset([data], on_unusable=self.unusable, check=check)
        return data

    def _check_fsdp(self) -> None:
        if not self.is_fsdp_enabled:
            return
        if not self.accelerator.is_fsdp2:
            raise ValueError("fsdp_config: expected fsdp_version 2; version 1 cannot shard bytes")
        if replicated_parameters(cast(nn.Module, self.model)):
            raise ValueError(
                f"fsdp: 4-bit weights are sharded from torch {SHARDS_BYTES} on, and this is "
                f"{torch.__version__}; train with DDP, or keep the weights dense"
            )
        if self.args.save_strategy != "no" and not self.args.save_only_model:
            raise ValueError(
                "save_only_model: expected True with FSDP, whose checkpoints hold the model alone; "
                "train with DDP to resume from checkpoints"
            )
        for name in ("save_trained_only", "export"):
            if getattr(self.args, name):
                raise ValueError(
                    f"{name}: expected none with FSDP, whose processes hold shards; save the model "
                    "and give what load_folder makes of it to collavo.train.export"
                )
        held_out = (
            self.eval_dataset if isinstance(self.eval_dataset, dict) else {"": self.eval_dataset}
        )
        for data in held_out.values():
            flags = getattr(data, "with_image", None)
            if flags is not None and len(set(flags.tolist())) > 1:
                raise ValueError(
                    "eval_dataset: expected records with images or without with FSDP, got both; a "
                    "process would wait in the vision tower for one without: give them by name, "
                    "{'image': ..., 'text': ...}"
                )

    def _check_deepspeed(self) -> None:
        # Its engine steps inside backward, before gradients can be dropped, and takes one that is
        # missing for zero.
        if not self.is_deepspeed_enabled:
            return
        moved = "the adapter that a step does not train" if self.stage.alternating else ""
        of_images = [part for part in self.args.trained_parts if not learns_from_text([part])]
        schedule = self.schedule
        if isinstance(schedule, GroupedSchedule) and of_images and "text" in schedule.kinds:
            moved = f"{' and '.join(of_images)} in steps without images too"
        if moved:
            raise ValueError(
                f"deepspeed: expected none with stage {self.args.stage}, got DeepSpeed, which "
                f"would move {moved}; launch with DDP (torchrun) or fsdp"
            )

    def _get_train_sampler(self, train_dataset: Dataset[Any] | None = None) -> Sampler[Any]:
        return self.streams.sampler(self.args, lambda: self.state.global_step)

    def get_train_dataloader(self) -> DataLoader[Any]:
        """Return the loader of training batches; places that a small step leaves empty are none."""
        collator = self.data_collator
        self.data_collator = self.streams.collator(collator)
        try:
            return super().get_train_dataloader()
        finally:
            self.data_collator = collator

    def create_optimizer(self, *args: Any, **kwargs: Any) -> torch.optim.Optimizer:
        """Make the optimizer, with the projector's own learning rate if it has one."""
        rate = self.args.projector_learning_rate if self.optimizer is None else None
        made = super().create_optimizer(*args, **kwargs)
        if rate is not None and "projector" in self.args.trained_parts:
            model = cast(nn.Module, args[0] if args else self.model)
            give_rate(made, part_parameters(model, "projector"), rate)
        return made

    def create_scheduler(self, num_training_steps: int, *args: Any, **kwargs: Any) -> Any:
        """Make the schedule, and say so if all of it is warm-up, which begins with a rate of 0."""
        if self.args.get_warmup_steps(num_training_steps) >= num_training_steps:
            _log.warning(
                "all steps (%d) are warm-up, whose first has a learning rate of 0: have more steps "
                "with a smaller global_batch, or set warmup_steps",
                num_training_steps,
            )
        return super().create_scheduler(num_training_steps, *args, **kwargs)

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        # transformers asks after a step whether it was the last, and so trains one more when a run
        # that had all its steps, and whose final save failed, is resumed to be saved.
        if self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
            return
        super()._run_epoch(*args, **kwargs)  # type: ignore[no-untyped-call]

    def training_step(self, model: nn.Module, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Run one micro-batch forward and backward, and drop the gradients of what is idle."""
        kind = self.schedule.kind(self.state.global_step)
        loss = super().training_step(model, *args, **kwargs)
        if self.stage.alternating:
            drop_idle_gradients(cast(nn.Module, self.model), self.trained_adapter(kind))
        elif not self.stage.drawn:
            drop_unreached_gradients(cast(nn.Module, self.model), kind)
        if self.accelerator.sync_gradients:
            self._logged_kinds[kind] += 1
        return loss

    def trained_adapter(self, kind: str) -> str:
        """Return the adapter that a ``cit`` step of a kind trains: the one of its name.

        Args:
            kind: The step's data set.
        """
        return kind

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Log, and where steps are of several kinds, how many of each since the last log."""
        if len(self.stage.streams) > 1 and "loss" in logs:
            logs |= {f"{kind}_steps": self._logged_kinds[kind] for kind in self.stage.streams}
            self._logged_kinds.clear()
        super().log(logs, *args, **kwargs)

    def train(
        self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any
    ) -> Any:
        """Train as transformers does.

        Args:
            resume_from_checkpoint: A ``checkpoint-N`` folder, or True for the last one in the
                output folder that is whole.
            *args: As for ``transformers.Trainer``.
            **kwargs: As for ``transformers.Trainer``.

        Raises:
            SaveError: if nothing can be saved, before the first step; or if saving failed later,
                saying where the trained tensors are. With FSDP, what fails after the last step
                beside :meth:`save_model` is raised as it is.
            ValueError: if the checkpoint is not whole or is another run's, or none is.
            FileNotFoundError: naming what the checkpoint lacks.
        """
        if resume_from_checkpoint and self.is_fsdp_enabled:
            raise ValueError(
                "resume_from_checkpoint: expected none with FSDP, whose checkpoints hold the model "
                "alone; train with DDP to resume"
            )
        if resume_from_checkpoint is True:
            folder = Path(str(self.args.output_dir))
            resume_from_checkpoint = str(checkpoint.last_whole(folder))
        if not resume_from_checkpoint and self.is_world_process_zero():
            self.unusable.begin()
        before, self._base = self.state, None
        try:
            result = super().train(resume_from_checkpoint, *args, **kwargs)
            if self.args.export and self.args.should_save:
                export(self._trained_model(), self.processing_class, self.args.export)
            return result
        except SaveError:
            raise
        except Exception:
            # All steps are done, and what comes after them (a callback, the best model, a log whose
            # reader has gone) failed: the model is saved before that is said.
            finished = self.state is not before and self.control.should_training_stop
            if finished and not self.is_fsdp_enabled:  # gathering shards takes all processes
                self.save_model()
                _log.warning(
                    "%s: the model is saved, and what follows failed", self.args.output_dir
                )
            raise
