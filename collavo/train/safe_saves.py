"""Saves of a run that are tried before its first step, whole or not there, and on no other base."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any, NoReturn, cast

import collavo._requirements  # noqa: F401  (before what it checks)

import torch
from torch import nn
from transformers import Trainer
from transformers.trainer import TRAINER_STATE_NAME, TRAINING_ARGS_NAME

from collavo import writing
from collavo.model.files import weight_patterns
from collavo.model.projector import PROJECTOR_FILE
from collavo.train import checkpoint, trained_only
from collavo.train.arguments import CollavoTrainingArguments
from collavo.train.exports import PARTS_PATTERNS, check_export, check_names, write_parts
from collavo.train.saving import SaveError, check_saving, in_a_line, rescue
from collavo.train.sharding import full_state_dict


class SafeSaves(Trainer):
    """``transformers.Trainer`` whose models and checkpoints are there as a whole or not at all.

    Attributes:
        data_facts: What a resumed run has to share beside ``stream_facts`` of the arguments.
    """

    args: CollavoTrainingArguments
    data_facts: dict[str, Any]
    _base: dict[str, str] | None = None

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
            if self.args.export or self.args.save_trained_only:
                check_names(cast(nn.Module, self.model))
            check_saving(cast(nn.Module, self.model), self.args, self.state, self._save_trial)
            if self.args.export:
                check_export(cast(nn.Module, self.model), Path(self.args.export))
        elif self.args.save_strategy != "no" and not self.args.save_only_model:
            folder.mkdir(parents=True, exist_ok=True)
            writing.check_file(folder / checkpoint.STREAMS)

    def _save_trial(self, folder: str, tensors: dict[str, torch.Tensor]) -> None:
        super()._save(folder, tensors)
        if self.args.save_trained_only:
            trained_only.write_trained(tensors, self._base_fingerprint(), Path(folder))
            (Path(folder) / PROJECTOR_FILE).touch()

    def _trained_model(self) -> nn.Module:
        return cast(nn.Module, self.accelerator.unwrap_model(self.model, keep_torch_compile=False))

    def _base_fingerprint(self) -> dict[str, str]:
        """Return what tells this run's base; computed once a run, for it does not change."""
        if self._base is None:
            self._base = trained_only.base_fingerprint(self._trained_model())
        return self._base

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
            replaces = (*weight_patterns(), *PARTS_PATTERNS)
            with writing.written_folder(target, replaces) as partial:
                self._write(partial, state_dict, is_checkpoint=checkpoint.is_checkpoint(target))
        except KeyboardInterrupt as interrupt:
            try:
                self._fail(target, interrupt, state_dict)
            except SaveError as saved:
                raise KeyboardInterrupt(str(saved)) from interrupt
        except Exception as error:
            self._fail(target, error, state_dict)

    def _write(self, folder: Path, state_dict: Any, *, is_checkpoint: bool) -> None:
        """Write a model or, into a checkpoint with more to come, perhaps what is trained of it."""
        trained_only_here = self.args.save_trained_only and is_checkpoint
        if trained_only_here and self.state.global_step < self.state.max_steps:
            base = self._base_fingerprint()
            trained_only.save_trained(self._trained_model(), base, folder)
            return
        super()._save(str(folder), state_dict)
        if self.args.save_trained_only:
            write_parts(self._trained_model(), folder)

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
        raise rescue(self._trained_model(), folder, error, state_dict) from error

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
                checkpoint.seal(folder, self._facts())
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

    def _facts(self) -> dict[str, Any]:
        return {**self.args.stream_facts(), **self.data_facts}

    def _load_from_checkpoint(
        self, resume_from_checkpoint: str, model: nn.Module | None = None
    ) -> None:
        folder = Path(resume_from_checkpoint)
        # Of tensors that differ because an argument does, the argument is named.
        checkpoint.check_same_run(folder, self._facts())
        alone = trained_only.holds_trained_only(folder)
        if not alone:
            checkpoint.check_weights(folder, cast(nn.Module, self.model))
        checkpoint.check_resume(folder, self._facts())
        if alone:
            trained_only.load_trained(self._trained_model(), folder, self._base_fingerprint())
        else:
            super()._load_from_checkpoint(resume_from_checkpoint, cast(Any, model))

    def _load_best_model(self) -> None:
        folder = Path(str(self.state.best_model_checkpoint))
        if trained_only.holds_trained_only(folder):
            trained_only.load_trained(self._trained_model(), folder, self._base_fingerprint())
        else:
            super()._load_best_model()
