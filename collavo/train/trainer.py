"""The trainer: transformers' own, plus the two stages and the alternation of Dual QLoRA."""

from __future__ import annotations

import shutil
from collections import Counter
from pathlib import Path
from typing import Any, cast

import collavo._requirements  # noqa: F401  (before what it checks)

import torch
from torch import nn
from torch.utils.data import Dataset, Sampler
from transformers import Trainer

from collavo.prepared.read import PreparedDataset
from collavo.train import checkpoint
from collavo.train.arguments import CollavoTrainingArguments
from collavo.train.collator import CrayonCollator
from collavo.train.dataset import CrayonInstructionDataset
from collavo.train.sampler import StepSampler, join
from collavo.train.schedule import StepKind, StepSchedule
from collavo.train.sharding import SHARDS_BYTES, full_state_dict, replicated_parameters
from collavo.train.stages import drop_idle_gradients, prepare_stage


def _check_crayons(dataset: Dataset[Any] | None, collator: object) -> None:
    # A crayon does not tell of which grid its cells are; what was prepared does.
    if not (isinstance(dataset, CrayonInstructionDataset) and isinstance(collator, CrayonCollator)):
        return
    if isinstance(dataset.samples, PreparedDataset):
        processor = collator.processor
        dataset.samples.check_crayon(
            grid=processor.grid, max_number=processor.max_number, reduce=processor.reduce
        )


class CollavoTrainer(Trainer):
    """Trains a CoLLaVO model in one of its two stages (paper, section 3).

    ``cpt`` trains the crayon prompt on crayon instructions. ``cit`` draws Image-CIT or VL-CIT for
    every optimizer step, takes all of the step's micro-batches on all ranks from that data set, and
    trains that adapter and the crayon prompt; the other adapter acts in the forward pass and does
    not change by one bit, nor does its optimizer state. Everything else (progress bars, mixed
    precision, accumulation, distribution, checkpoints) is ``transformers.Trainer``.

    Args:
        model: A ``CollavoForConditionalGeneration``; for ``cit`` with the adapters ``image`` and
            ``vl``. Its ``requires_grad`` flags are set here, once.
        args: The stage and its hyperparameters.
        train_dataset: Crayon instructions (a map-style data set).
        vl_dataset: Visual instructions; needed where ``cit`` draws VL-CIT steps.
        kwargs: As for ``transformers.Trainer`` (``data_collator``, ``eval_dataset`` ...).

    Raises:
        ValueError: if the model lacks what the stage trains, a data set that the stage draws from
            is missing or empty or was prepared for another processor than the collator's, or FSDP
            is asked for something it cannot do here.
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
        prepare_stage(model, args.stage)
        probability = args.vl_probability if args.stage == "cit" else 0.0
        self.schedule = StepSchedule(args.stream_seed, probability)
        self._sizes: dict[StepKind, int] = {}
        self._logged_kinds: Counter[StepKind] = Counter()
        _check_crayons(train_dataset, kwargs.get("data_collator"))
        joined = self._join(train_dataset, vl_dataset if probability > 0.0 else None)
        super().__init__(model=cast(Any, model), args=args, train_dataset=joined, **kwargs)
        self._check_fsdp()
        if joined is not None:
            self._get_train_sampler()  # complains now, not in train(), about an empty data set

    def _join(self, image: Dataset[Any] | None, vl: Dataset[Any] | None) -> Dataset[Any] | None:
        if image is None and vl is None:
            return None
        joined = join(image, vl)
        self._sizes = {
            "image": 0 if image is None else len(cast(Any, image)),
            "vl": 0 if vl is None else len(cast(Any, vl)),
        }
        return joined

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

    def _get_train_sampler(self, train_dataset: Dataset[Any] | None = None) -> Sampler[int]:
        return StepSampler(
            self.schedule,
            self._sizes,
            self.args.step_size,
            self.args.stream_seed,
            global_step=lambda: self.state.global_step,
        )

    def training_step(self, model: nn.Module, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Run one micro-batch forward and backward, and drop the idle adapter's gradients."""
        kind = self.schedule.kind(self.state.global_step)
        loss = super().training_step(model, *args, **kwargs)
        if self.args.stage == "cit":
            drop_idle_gradients(cast(nn.Module, self.model), self.trained_adapter(kind))
            if self.accelerator.sync_gradients:
                self._logged_kinds[kind] += 1
        return loss

    def trained_adapter(self, kind: StepKind) -> StepKind:
        """Return the adapter that a ``cit`` step of a kind trains: the one of its name.

        Args:
            kind: The step's data set.
        """
        return kind

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Log, and in ``cit`` add how many steps of each kind there were since the last log."""
        if self.args.stage == "cit" and "loss" in logs:
            logs["image_steps"] = self._logged_kinds["image"]
            logs["vl_steps"] = self._logged_kinds["vl"]
            self._logged_kinds.clear()
        super().log(logs, *args, **kwargs)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save the model so that ``from_pretrained`` reads it; all processes have to call it."""
        if self.is_fsdp_enabled:
            self._save(output_dir, state_dict=full_state_dict(cast(nn.Module, self.model)))
        else:
            super().save_model(output_dir, _internal_call)

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        target = Path(output_dir or str(self.args.output_dir))
        if not self.args.should_save:
            super()._save(str(target), state_dict)
            return
        with checkpoint.written_whole(target) as partial:
            super()._save(str(partial), state_dict)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        folder = Path(self._get_output_dir(trial)) / f"checkpoint-{self.state.global_step}"
        try:
            super()._save_checkpoint(model, trial)
            if self.args.should_save:
                checkpoint.write_streams(folder, self.args.stream_facts())
        except BaseException:
            if self.args.should_save:
                shutil.rmtree(folder, ignore_errors=True)
            raise

    def _load_from_checkpoint(
        self, resume_from_checkpoint: str, model: nn.Module | None = None
    ) -> None:
        folder = Path(resume_from_checkpoint)
        checkpoint.check_weights(folder, cast(nn.Module, self.model))
        checkpoint.check_resume(folder, self.args.stream_facts())
        super()._load_from_checkpoint(resume_from_checkpoint, cast(Any, model))
