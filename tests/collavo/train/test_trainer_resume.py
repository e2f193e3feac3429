"""Checkpoints: a stopped and resumed run is the uninterrupted one; bad folders are named."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from toy_model import make_toy
from transformers import TrainerCallback
from transformers.utils import SAFE_WEIGHTS_NAME

from collavo.panoptic.coco_index import Skipped
from collavo.train import checkpoint
from collavo.train.sharding import replicated_parameters
from collavo.train.trainer import CollavoTrainer

WEIGHTS = SAFE_WEIGHTS_NAME
Build = Callable[..., CollavoTrainer]
EVERY_THIRD = {"save_strategy": "steps", "save_steps": 3}


class StopAfter(TrainerCallback):
    """Ends training in the middle of the schedule, as an interruption does."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        control.should_training_stop = state.global_step >= self.step


@pytest.mark.parametrize("stage", ["cpt", "cit"])
@pytest.mark.parametrize("stop", [3, 6])
def test_resumed_equals_straight_through(toy_trainer: Build, stage: str, stop: int) -> None:
    """An epoch has 6 steps in cit (22 samples, 4 a step), 3 in cpt: inside one and at its end."""
    options = {"stage": stage, "max_steps": 9, "gradient_accumulation_steps": 2, **EVERY_THIRD}
    straight = toy_trainer(folder="straight", **options)
    straight.train()
    first = toy_trainer(folder="stopped", **options)
    first.add_callback(StopAfter(stop))
    first.train()
    second = toy_trainer(folder="stopped", **options)
    second.train(resume_from_checkpoint=True)
    one, two = (run.model.state_dict() for run in (straight, second))  # type: ignore[union-attr]
    assert all(torch.equal(one[name], two[name]) for name in one)
    epochs = {run.train_dataset.datasets[0].epoch for run in (straight, second)}  # type: ignore[union-attr]
    assert epochs == {2 if stage == "cpt" else 1}
    losses = [
        [log["loss"] for log in t.state.log_history if "loss" in log] for t in (straight, second)
    ]
    assert losses[0] == losses[1]


def test_an_earlier_runs_list_of_left_out_records_is_not_this_runs(
    toy_trainer: Build, tmp_path: Path
) -> None:
    """A resumed run goes on with it; another counted the records of all runs before."""
    (tmp_path / "run").mkdir()
    toy_trainer().unusable.log(Skipped("[3]", "an earlier run's"))
    first = toy_trainer(max_steps=6, **EVERY_THIRD)
    first.train()
    assert first.unusable.summary() == ""
    first.unusable.log(Skipped("[4]", "this run's"))
    first.train()
    second = toy_trainer(max_steps=6, **EVERY_THIRD)
    second.train(resume_from_checkpoint=True)
    assert second.unusable.summary().startswith("1 records")


@pytest.fixture
def saved(toy_trainer: Build, tmp_path: Path) -> Path:
    toy_trainer(max_steps=3, **EVERY_THIRD).train()
    return tmp_path / "run" / "checkpoint-3"


def resume(toy_trainer: Build, folder: Path, **changes: Any) -> None:
    toy_trainer(max_steps=4, **changes).train(resume_from_checkpoint=str(folder))


def rewrite(folder: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})


def test_checkpoints_are_safetensors_and_whole(saved: Path) -> None:
    names = {path.name for path in saved.iterdir()}
    assert {WEIGHTS, checkpoint.STREAMS, "optimizer.pt", "trainer_state.json"} <= names
    assert load_file(saved / WEIGHTS)["codes"].dtype == torch.uint8
    assert [path.name for path in saved.parent.iterdir()] == ["checkpoint-3"]


def test_missing_tensors_are_named_and_nothing_is_loaded(toy_trainer: Build, saved: Path) -> None:
    """Trainer itself only warns and trains on with what the model happened to hold."""
    rewrite(saved, lambda tensors: tensors.pop("crayon.weight"))
    trainer = toy_trainer()
    before = trainer.model.head.weight.clone()  # type: ignore[union-attr, operator]
    trainer.model.head.weight.data.add_(1)  # type: ignore[union-attr, operator]
    with pytest.raises(ValueError, match=r"checkpoint-3.*missing: crayon\.weight"):
        trainer.train(resume_from_checkpoint=str(saved))
    assert torch.equal(trainer.model.head.weight, before + 1)  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.update(extra=torch.zeros(1)), "surplus: extra"),
        (
            lambda t: t.update(codes=torch.zeros(7, dtype=torch.uint8)),
            r"codes \(expected \(6,\), got",
        ),
    ],
    ids=["surplus", "shape"],
)
def test_foreign_tensors_are_named(
    toy_trainer: Build, saved: Path, change: Callable[[Any], Any], message: str
) -> None:
    rewrite(saved, change)
    with pytest.raises(ValueError, match=message):
        resume(toy_trainer, saved)


NAMES = ["optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json", checkpoint.STREAMS]


@pytest.mark.parametrize("name", NAMES)
def test_a_missing_file_is_named(toy_trainer: Build, saved: Path, name: str) -> None:
    """Without optimizer.pt Trainer would begin with fresh moments and say nothing."""
    (saved / name).unlink()
    with pytest.raises(FileNotFoundError, match=f"{name}: missing; it is not a whole checkpoint"):
        resume(toy_trainer, saved)


def test_truncated_weights_are_named(toy_trainer: Build, saved: Path) -> None:
    path = saved / WEIGHTS
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(ValueError, match=r"model\.safetensors: not a complete safetensors file"):
        resume(toy_trainer, saved)


@pytest.mark.parametrize("name", NAMES)
def test_truncated_files_are_named(toy_trainer: Build, saved: Path, name: str) -> None:
    """Without its generators a run would go on with other numbers and say nothing."""
    path = saved / name
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(ValueError, match=rf"{name}: (expected \d+ bytes, got|not a JSON file)"):
        resume(toy_trainer, saved)


def test_the_last_whole_checkpoint_is_resumed(
    toy_trainer: Build, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A run that was killed while it wrote its second one; transformers takes the highest N."""
    options = {"max_steps": 6, "save_strategy": "steps", "save_steps": 2}
    straight = toy_trainer(folder="straight", **options)
    straight.train()
    shutil.copytree(tmp_path / "straight", tmp_path / "run")
    (tmp_path / "run/checkpoint-6" / checkpoint.STREAMS).unlink()
    (tmp_path / "run/checkpoint-4/optimizer.pt").write_bytes(b"half")
    (tmp_path / "run/checkpoint-100").mkdir()
    second = toy_trainer(**options)
    second.train(resume_from_checkpoint=True)
    one, two = (run.model.state_dict() for run in (straight, second))  # type: ignore[union-attr]
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert second.state.log_history[0] == straight.state.log_history[0]
    passed = [record.args[0].name for record in caplog.records if "passed over" in record.message]  # type: ignore[union-attr, index]
    assert passed == ["checkpoint-100", "checkpoint-6", "checkpoint-4"]
    checkpoint.check_whole(tmp_path / "run/checkpoint-6")


def test_a_finished_run_trains_no_further_step(toy_trainer: Build, tmp_path: Path) -> None:
    """Resumed to be saved again: transformers took one more step than max_steps."""
    first = toy_trainer(max_steps=3, **EVERY_THIRD)
    first.train()
    again = toy_trainer(max_steps=3, **EVERY_THIRD)
    again.train(resume_from_checkpoint=True)
    one, two = (run.model.state_dict() for run in (first, again))  # type: ignore[union-attr]
    assert again.state.global_step == 3
    assert all(torch.equal(one[name], two[name]) for name in one)


@pytest.mark.parametrize("limit", [1, 2])
def test_the_oldest_checkpoints_go(toy_trainer: Build, tmp_path: Path, limit: int) -> None:
    """First what is half-written; the limit stands in what the checkpoint says of its run."""
    (tmp_path / "run/checkpoint-99").mkdir(parents=True)
    options = {"save_strategy": "steps", "save_steps": 1, "save_total_limit": limit}
    trainer = toy_trainer(max_steps=4, **options)
    trainer.train()
    left = {path.name for path in (tmp_path / "run").iterdir()}
    assert left == {f"checkpoint-{step}" for step in range(5 - limit, 5)}
    args = torch.load(tmp_path / "run/checkpoint-4/training_args.bin", weights_only=False)
    assert args.save_total_limit == trainer.args.save_total_limit == limit


def test_a_folder_that_is_not_there_is_named(toy_trainer: Build, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="checkpoint-9: no such model folder"):
        resume(toy_trainer, tmp_path / "checkpoint-9")


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({"stage": "cpt"}, "stage"),
        ({"seed": 4}, "stream_seed"),
        ({"vl_probability": 0.25}, "vl_probability"),
        ({"gradient_accumulation_steps": 2}, "step_size"),
    ],
)
def test_other_streams_cannot_be_resumed(
    toy_trainer: Build, saved: Path, changes: dict[str, Any], name: str
) -> None:
    with pytest.raises(ValueError, match=f"^{name}: the checkpoint .* was trained with"):
        resume(toy_trainer, saved, **changes)


def test_what_only_the_checkpoint_says_is_another_run_too(tmp_path: Path) -> None:
    """A run of a stage's own parts does not name them: one of others is another all the same."""
    facts = {"stage": "instruct", "step_size": 4}
    checkpoint.seal(tmp_path, {**facts, "parts": ["decoder", "vision"]})
    with pytest.raises(ValueError, match=r"^parts: .* was trained with \['decoder'.*has None"):
        checkpoint.check_same_run(tmp_path, facts)


def test_what_earlier_versions_sealed_is_resumed(toy_trainer: Build, saved: Path) -> None:
    """Their seal has four facts; a fifth that cpt and cit must share would end such runs."""
    path = saved / checkpoint.STREAMS
    sealed = json.loads(path.read_text())
    kept = ("stage", "vl_probability", "stream_seed", "step_size", "files")
    path.write_text(json.dumps({name: sealed[name] for name in kept}))
    trainer = toy_trainer(max_steps=4)
    trainer.train(resume_from_checkpoint=str(saved))
    assert trainer.state.global_step == 4


def test_fsdp_resumes_nothing(toy_trainer: Build, saved: Path) -> None:
    """Its checkpoints hold the model alone; it would begin with fresh moments and say nothing."""
    trainer = toy_trainer(max_steps=4)
    trainer.is_fsdp_enabled = True
    for given in (True, str(saved)):
        with pytest.raises(ValueError, match="resume_from_checkpoint: expected none with FSDP"):
            trainer.train(resume_from_checkpoint=given)


@pytest.mark.parametrize(
    ("changes", "name"),
    [({"save_trained_only": True}, "save_trained_only"), ({"export": "out"}, "export")],
)
def test_fsdp_refuses_what_takes_whole_tensors(
    toy_trainer: Build, changes: dict[str, Any], name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = CollavoTrainer.create_accelerator_and_postprocess

    def create(self: CollavoTrainer) -> None:
        real(self)
        self.is_fsdp_enabled = True

    monkeypatch.setattr(CollavoTrainer, "create_accelerator_and_postprocess", create)
    monkeypatch.setattr("accelerate.Accelerator.is_fsdp2", True)
    with pytest.raises(ValueError, match=f"^{name}: expected none with FSDP"):
        toy_trainer(**changes)


def test_a_failed_save_leaves_nothing(
    toy_trainer: Build, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A full disk while the optimizer is written: only what was trained remains."""

    def fail(*_: Any) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr(CollavoTrainer, "_save_optimizer_and_scheduler", fail)
    with pytest.raises(OSError, match="No space left"):
        toy_trainer(max_steps=3, **EVERY_THIRD).train()
    (rescued,) = (tmp_path / "run").iterdir()
    assert rescued.name.startswith("trained_tensors-")


def test_a_failed_save_keeps_the_model_that_was_there(
    toy_trainer: Build, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = toy_trainer()
    trainer.save_model()
    before = (tmp_path / "run" / WEIGHTS).read_bytes()
    trainer.model.head.weight.data.zero_()  # type: ignore[union-attr, operator]

    def fail(*_: Any, **__: Any) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr(torch, "save", fail)  # training_args.bin comes after the weights
    with pytest.raises(OSError, match="No space left"):
        trainer.save_model()
    assert (tmp_path / "run" / WEIGHTS).read_bytes() == before
    assert not list((tmp_path / "run").glob(".*"))
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_tied_tensors_need_to_be_stored_once(tmp_path: Path) -> None:
    model = make_toy()
    model.head.weight = model.embedding.weight
    tensors = {k: v.clone() for k, v in model.state_dict().items() if k != "head.weight"}
    save_file(tensors, tmp_path / WEIGHTS)
    checkpoint.check_weights(tmp_path, model)


def test_weights_of_two_saves_are_told_apart(tmp_path: Path) -> None:
    """As when a model is loaded: both shards hold a tensor, and one of the two is stale."""
    model, index = make_toy(), tmp_path / f"{WEIGHTS}.index.json"
    state = {key: value.clone() for key, value in model.state_dict().items()}
    places = dict.fromkeys(state, "model-00001-of-00002.safetensors")
    places["head.weight"] = "model-00002-of-00002.safetensors"
    save_file(state, tmp_path / "model-00001-of-00002.safetensors")
    save_file({"head.weight": state["head.weight"]}, tmp_path / places["head.weight"])
    index.write_text(json.dumps({"metadata": {}, "weight_map": places}))
    with pytest.raises(ValueError, match=r"holds head\.weight.*; the files are of two saves"):
        checkpoint.check_weights(tmp_path, model)


def test_the_present_folder_can_be_the_output_folder(
    toy_trainer: Build, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """ "." has no name to make a neighbour's from; it must not come out after hours of training."""
    folder = tmp_path / "here"
    folder.mkdir()
    monkeypatch.chdir(folder)
    toy_trainer().save_model(".")
    assert (folder / WEIGHTS).is_file()
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_old_versions_of_torch_keep_bytes_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    """Before 2.12 ``fully_shard`` fails on a parameter of bytes."""
    model = make_toy()
    monkeypatch.setattr(torch, "__version__", type(torch.__version__)("2.11.0+cpu"))
    assert [p is model.codes for p in replicated_parameters(model)] == [True]
    monkeypatch.setattr(torch, "__version__", type(torch.__version__)("2.12.0+cpu"))
    assert replicated_parameters(model) == set()
