"""The trainer: transformers' own, plus the two stages and the alternation of Dual QLoRA."""

from __future__ import annotations

import logging
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn, cast

import collavo._requirements  # noqa: F401  (before what it checks)

import torch
from torch import nn
from torch.utils.data import Dataset, IterableDataset, Sampler
from transformers import ProcessorMixin, Trainer
from transformers.trainer import TRAINER_STATE_NAME, TRAINING_ARGS_NAME

from collavo import writing
from collavo._arguments import expect_like
from collavo.model.files import weight_patterns
from collavo.prepared.read import PreparedDataset
from collavo.train import checkpoint
from collavo.train.arguments import CollavoTrainingArguments
from collavo.train.collator import CrayonCollator
from collavo.train.dataset import CrayonInstructionDataset
from collavo.train.sampler import JoinedDataset, StepSampler, UnusableReport, join
from collavo.train.saving import SaveCheck, SaveError, check_saving, in_a_line, rescue
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


_log = logging.getLogger(__name__)


class CollavoTrainer(Trainer):
    """Trains a CoLLaVO model in one of its two stages (paper, section 3).

    ``cpt`` trains the crayon prompt on crayon instructions. ``cit`` draws Image-CIT or VL-CIT for
    every optimizer step, takes all of the step's micro-batches on all ranks from that data set, and
    trains that adapter and the crayon prompt; the other adapter acts in the forward pass and does
    not change by one bit, nor does its optimizer state. Everything else (progress bars, mixed
    precision, accumulation, distribution) is ``transformers.Trainer``.

    Before the first step a small model is saved into the output folder and removed again, and free
    space is compared with what will be saved. Where saving fails all the same, a ``SaveError`` says
    where the trained tensors were written instead. Checkpoints are sealed when they are whole, and
    no other is resumed.

    A record that cannot be used does not end a run: it is listed in ``skipped_records.jsonl`` of
    the output folder, and the next of its data set that can be used stands in for it. A run that is
    not resumed begins that list anew.

    Args:
        model: A ``CollavoForConditionalGeneration``; for ``cit`` with the adapters ``image`` and
            ``vl``. Its ``requires_grad`` flags are set here, once.
        args: The stage and its hyperparameters.
        train_dataset: Crayon instructions (a map-style data set).
        vl_dataset: Visual instructions; needed where ``cit`` draws VL-CIT steps.
        kwargs: As for ``transformers.Trainer`` (``data_collator``, ``eval_dataset`` ...).

    Raises:
        ValueError: if the model lacks what the stage trains, a data set that the stage draws from
            is missing or empty or was prepared for another processor than the collator's, FSDP
            is asked for something it cannot do here, or DeepSpeed trains ``cit``.
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
        prepare_stage(model, args.stage)
        probability = args.vl_probability if args.stage == "cit" else 0.0
        self.schedule = StepSchedule(args.stream_seed, probability)
        self._sizes: dict[StepKind, int] = {}
        self._logged_kinds: Counter[StepKind] = Counter()
        _check_crayons(train_dataset, kwargs.get("data_collator"))
        self.unusable = UnusableReport(Path(str(args.output_dir)) / "skipped_records.jsonl")
        check = getattr(kwargs.get("data_collator"), "check", None)
        joined = self._join(train_dataset, vl_dataset if probability > 0.0 else None, check)
        if "eval_dataset" in kwargs:
            kwargs["eval_dataset"] = self._past_unusable(kwargs["eval_dataset"], check)
        super().__init__(model=cast(Any, model), args=args, train_dataset=joined, **kwargs)
        # Losses are divided by all of a step's labels. transformers 5.5.0 lets accelerate divide
        # them by the micro-batches once more; later ones set this themselves.
        self.accelerator.gradient_accumulation_steps = 1
        self._check_fsdp()
        self._check_deepspeed()
        self.add_callback(SaveCheck(self.check_saving))
        if joined is not None:
            self._get_train_sampler()  # complains now, not in train(), about an empty data set

    def _join(
        self,
        image: Dataset[Any] | None,
        vl: Dataset[Any] | None,
        check: Callable[[Any], None] | None,
    ) -> Dataset[Any] | None:
        if image is None and vl is None:
            return None
        joined = join(image, vl, on_unusable=self.unusable, check=check)
        self._sizes = {
            "image": 0 if image is None else len(cast(Any, image)),
            "vl": 0 if vl is None else len(cast(Any, vl)),
        }
        return joined

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

    def _check_deepspeed(self) -> None:
        # Its engine steps inside backward, before the idle adapter's gradients can be dropped.
        if self.is_deepspeed_enabled and self.args.stage == "cit":
            raise ValueError(
                "deepspeed: expected none with stage cit, got DeepSpeed, which would move the "
                "adapter that a step does not train; launch with DDP (torchrun) or fsdp"
            )

    def _get_train_sampler(self, train_dataset: Dataset[Any] | None = None) -> Sampler[int]:
        return StepSampler(
            self.schedule,
            self._sizes,
            self.args.step_size,
            self.args.stream_seed,
            global_step=lambda: self.state.global_step,
        )

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        # transformers asks after a step whether it was the last, and so trains one more when a run
        # that had all its steps, and whose final save failed, is resumed to be saved.
        if self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
            return
        super()._run_epoch(*args, **kwargs)  # type: ignore[no-untyped-call]

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
        if resume_from_checkpoint is True:
            folder = Path(str(self.args.output_dir))
            resume_from_checkpoint = str(checkpoint.last_whole(folder))
        if not resume_from_checkpoint and self.is_world_process_zero():
            self.unusable.begin()
        before = self.state
        try:
            return super().train(resume_from_checkpoint, *args, **kwargs)
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

    def check_saving(self) -> None:
        """Try on every process whether this run can save; :meth:`train` calls it before its steps.

        What killed runs have left in the output folder is cleared up.

        Raises:
            SaveError: naming what cannot be written, or the space that is wanted and found; on
                every process if it is so on one.
        """
        folder, fault = Path(str(self.args.output_dir)), ""
        for work in (self._settle, self._try_saving):
            try:
                if not fault:
                    work(folder)
            except Exception as error:
                fault = in_a_line(error)
            # Clearing up would remove what another process writes for its trial.
            self.accelerator.wait_for_everyone()
        failed = torch.tensor([int(bool(fault))], device=self.accelerator.device)
        failed = cast(torch.Tensor, self.accelerator.gather(failed))
        if fault:
            raise SaveError(f"output_dir: this run could not save, so it does not begin: {fault}")
        if bool(failed.any()):
            raise SaveError(
                f"output_dir: process {int(failed.argmax())} could not save in {folder}, so the "
                "run does not begin; its own message says why"
            )

    def _settle(self, folder: Path) -> None:
        if self.args.should_save:
            writing.settle(folder)

    def _try_saving(self, folder: Path) -> None:
        if self.args.should_save:
            check_saving(cast(nn.Module, self.model), self.args, self.state, super()._save)
        elif self.args.save_strategy != "no" and not self.args.save_only_model:
            folder.mkdir(parents=True, exist_ok=True)
            writing.check_file(folder / checkpoint.STREAMS)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save the model so that ``from_pretrained`` reads it; all processes have to call it.

        Args:
            output_dir: The folder, which keeps its old model until the new one is whole; None takes
                the run's.

        Raises:
            SaveError: if it could not be saved, saying where the trained tensors are instead.
        """
        if self.is_fsdp_enabled:
            self._save(output_dir, state_dict=full_state_dict(cast(nn.Module, self.model)))
        else:
            super().save_model(output_dir, _internal_call)

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        target = Path(output_dir or str(self.args.output_dir))
        if not self.args.should_save:
            super()._save(str(target), state_dict)
            return
        try:
            with writing.written_folder(target, weight_patterns()) as partial:
                super()._save(str(partial), state_dict)
        except KeyboardInterrupt as interrupt:
            try:
                self._fail(target, interrupt, state_dict)
            except SaveError as saved:
                raise KeyboardInterrupt(str(saved)) from interrupt
        except Exception as error:
            self._fail(target, error, state_dict)

    def save_state(self) -> None:
        """Write ``trainer_state.json`` into the output folder, on the first process.

        Raises:
            OSError: naming the file.
        """
        if self.is_world_process_zero():
            path = Path(str(self.args.output_dir)) / TRAINER_STATE_NAME
            with writing.written_file(path) as temporary:
                self.state.save_to_json(str(temporary))

    def _fail(self, target: Path, error: BaseException, state_dict: Any = None) -> NoReturn:
        """Rescue the trained tensors and say where they are."""
        # Gathering shards takes all processes, of which perhaps this one alone has failed.
        if not self.args.should_save or (self.is_fsdp_enabled and not state_dict):
            raise error
        # A checkpoint that could not be written is removed, with whatever lies in it.
        folder = target.parent if checkpoint.is_checkpoint(target) else target
        model = self.accelerator.unwrap_model(self.model, keep_torch_compile=False)
        raise rescue(model, folder, error, state_dict) from error

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        run = Path(self._get_output_dir(trial))
        folder, limit = run / f"checkpoint-{self.state.global_step}", self.args.save_total_limit
        try:
            if self.args.should_save:
                shutil.rmtree(folder, ignore_errors=True)  # an earlier run's, with other files
            self.accelerator.wait_for_everyone()
            self.args.save_total_limit = None  # no other goes before this one is whole
            super()._save_checkpoint(model, trial)
            self.accelerator.wait_for_everyone()
            self.args.save_total_limit = limit
            if self.args.should_save:
                torch.save(self.args, folder / TRAINING_ARGS_NAME)  # with the limit
                checkpoint.seal(folder, self.args.stream_facts())
        except BaseException as error:
            if self.args.should_save:
                shutil.rmtree(folder, ignore_errors=True)
            if isinstance(error, Exception) and not isinstance(error, SaveError):
                self._fail(folder, error)
            raise
        finally:
            self.args.save_total_limit = limit
        if self.args.should_save:
            best = self.state.best_model_checkpoint
            checkpoint.rotate(run, limit, [folder, *([Path(best)] if best else [])])

    def _load_from_checkpoint(
        self, resume_from_checkpoint: str, model: nn.Module | None = None
    ) -> None:
        folder = Path(resume_from_checkpoint)
        checkpoint.check_weights(folder, cast(nn.Module, self.model))
        checkpoint.check_resume(folder, self.args.stream_facts())
        super()._load_from_checkpoint(resume_from_checkpoint, cast(Any, model))
