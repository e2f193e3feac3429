"""A finished run is never lost: saving is tried first, and what was trained is rescued."""

from __future__ import annotations

import errno
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from forked import forked, mount, mounting_is_permitted
from safetensors.torch import load_file
from toy_model import ToyCrayonModel, make_toy
from transformers import Trainer, TrainerCallback

from collavo import writing
from collavo.train.saving import SaveError
from collavo.train.trainer import CollavoTrainer

Build = Callable[..., CollavoTrainer]
FULL = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
TRAINED = {"crayon.weight"} | {f"lora_{k}.{n}.weight" for k in "ab" for n in ("image", "vl")}


def rescued(folder: Path) -> list[Path]:
    return list(folder.glob("trained_tensors-*.safetensors"))


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
def test_the_output_folder_may_be_a_mount_point(toy_trainer: Build, tmp_path: Path) -> None:
    """Container volumes and SageMaker: the neighbour of the folder is on another file system."""
    if not mounting_is_permitted():
        pytest.skip("a tmpfs may not be mounted here")

    def work() -> object:
        (tmp_path / "run").mkdir()
        if not mount(tmp_path / "run"):
            raise OSError("not mounted")
        trainer = toy_trainer()
        trainer.check_saving()
        trainer.save_model()
        return sorted(names(tmp_path / "run"))

    (tmp_path / "plain").mkdir()
    assert forked(work) == (0, str(["config.json", "model.safetensors", "training_args.bin"]))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
@pytest.mark.parametrize(
    ("changes", "begins"),
    [({}, False), ({"save_total_limit": 2}, True), ({"save_strategy": "no"}, True)],
)
def test_free_space_is_compared_with_what_will_be_saved(
    toy_trainer: Build, tmp_path: Path, changes: dict[str, Any], begins: bool
) -> None:
    """A thousand checkpoints of more than the toy's 7 kB do not go into 4 MB, three do."""
    if not mounting_is_permitted():
        pytest.skip("a tmpfs may not be mounted here")

    def work() -> object:
        (tmp_path / "run").mkdir()
        if not mount(tmp_path / "run", "4m"):
            raise OSError("not mounted")
        trainer = toy_trainer(**{"save_strategy": "steps", **changes})
        trainer.state.max_steps, trainer.state.save_steps = 1000, 1
        trainer.check_saving()
        return sorted(names(tmp_path / "run"))

    status, message = forked(work)
    if begins:
        assert (status, message) == (0, "[]")
    else:
        assert "SaveError: output_dir: this run could not save, so it does not begin" in message
        assert "of free space, got" in message and "save_total_limit" in message


class Fails:
    """What cannot be saved beside the weights."""

    def save_pretrained(self, folder: str) -> None:
        raise TypeError("Object of type Path is not JSON serializable")


def broken(trainer: CollavoTrainer, kind: str, folder: Path) -> None:
    if kind == "processor":
        trainer.processing_class = Fails()  # type: ignore[assignment]
    elif kind == "folder":
        (folder / "config.json").mkdir(parents=True)
    else:
        trainer.model.config.odd = {1}  # type: ignore[union-attr]


@pytest.mark.parametrize("kind", ["processor", "folder", "configuration"])
def test_what_would_fail_at_the_end_fails_before_the_first_step(
    toy_trainer: Build, tmp_path: Path, kind: str
) -> None:
    """A processor or configuration that JSON cannot hold came out after hours of training."""
    trainer = toy_trainer(max_steps=2)
    broken(trainer, kind, tmp_path / "run")
    with pytest.raises(SaveError, match="output_dir: this run could not save, so it does not begi"):
        trainer.train()
    assert trainer.state.global_step == 0
    assert names(tmp_path / "run") <= {"config.json"}


def test_the_check_leaves_nothing_and_clears_up(toy_trainer: Build, tmp_path: Path) -> None:
    """What a killed save has left is removed or brought to its end; other files stay."""
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "mine.txt").write_text("mine")
    (folder / f".collavo-{'1' * 16}.partial").mkdir()
    trainer = toy_trainer(max_steps=1)
    before = {k: v.clone() for k, v in trainer.model.state_dict().items()}  # type: ignore[union-attr]
    trainer.check_saving()
    assert names(folder) == {"mine.txt"}
    after = trainer.model.state_dict()  # type: ignore[union-attr]
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_a_save_replaces_what_would_be_read_in_its_place(
    toy_trainer: Build, tmp_path: Path
) -> None:
    """PyTorch's format too; the average that somebody keeps beside it would not be."""
    folder = tmp_path / "run"
    folder.mkdir()
    for name in ("pytorch_model.bin", "model-00001-of-00002.safetensors", "model_ema.safetensors"):
        (folder / name).write_bytes(b"older")
    toy_trainer().save_model()
    kept = {"config.json", "model.safetensors", "training_args.bin"}
    assert names(folder) == kept | {"model_ema.safetensors"}


@pytest.mark.parametrize("refusing", range(4))
def test_the_first_place_that_takes_them_gets_the_trained_tensors(
    toy_trainer: Build, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, refusing: int
) -> None:
    """The output folder, its parent, the temporary folder; else the message says that none did."""
    places = [tmp_path / "up/run", tmp_path / "up", tmp_path / "temporary"]
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    trainer = toy_trainer(folder="up/run", max_steps=3)
    trainer.train()
    real = writing.written_file

    def written(path: Path, **kwargs: Any) -> Any:
        if path.parent in places[:refusing]:
            raise FULL
        return real(path, **kwargs)

    monkeypatch.setattr(Trainer, "_save", lambda *_, **__: (_ for _ in ()).throw(FULL))
    monkeypatch.setattr(writing, "written_file", written)
    with pytest.raises(SaveError, match=r"up/run: could not be saved \(.*No space left") as failed:
        trainer.save_model()
    found = [path for place in places for path in rescued(place)]
    if refusing == 3:
        assert not found and "could be written nowhere" in str(failed.value)
        return
    (path,) = found
    assert path.parent == places[refusing] and f"are in {path}" in str(failed.value)
    tensors = load_file(path)
    assert tensors.keys() == TRAINED
    model: ToyCrayonModel = make_toy()
    assert not model.load_state_dict(tensors, strict=False).unexpected_keys
    trained = trainer.model.state_dict()  # type: ignore[union-attr]
    assert all(torch.equal(value, trained[name]) for name, value in model.state_dict().items())


class FailsAt(TrainerCallback):
    """A tracker whose server is gone."""

    def __init__(self, event: str) -> None:
        setattr(self, event, self.fail)

    def fail(self, *_: Any, **__: Any) -> None:
        raise ConnectionError("the tracker's server is gone")


@pytest.mark.parametrize("event", ["on_train_end", "on_step_end"])
def test_a_finished_run_is_saved_whatever_comes_after_it(
    toy_trainer: Build, tmp_path: Path, event: str
) -> None:
    """A callback that fails at the end, a log whose reader has gone; in the middle of a run it is
    an error like another."""
    trainer = toy_trainer(max_steps=2)
    trainer.add_callback(FailsAt(event))
    with pytest.raises(ConnectionError, match="server is gone"):
        trainer.train()
    finished = event == "on_train_end"
    assert bool(list((tmp_path / "run").glob("*.safetensors"))) == finished
    assert not rescued(tmp_path / "run")


def test_shards_are_not_rescued_as_if_they_were_whole(
    toy_trainer: Build, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With FSDP one process may fail alone, and cannot gather; a gathered model is rescued."""
    trainer = toy_trainer(max_steps=1)
    trainer.add_callback(FailsAt("on_train_end"))
    real = Trainer._inner_training_loop

    def train(self: Trainer, *args: Any, **kwargs: Any) -> Any:
        try:
            return real(self, *args, **kwargs)
        finally:
            self.is_fsdp_enabled = True

    monkeypatch.setattr(Trainer, "_inner_training_loop", train)
    with pytest.raises(ConnectionError, match=r"^the tracker's server is gone$"):
        trainer.train()
    assert not rescued(tmp_path / "run")
    monkeypatch.setattr(Trainer, "_save", lambda *_, **__: (_ for _ in ()).throw(FULL))
    with pytest.raises(SaveError, match="the trained tensors are in"):
        trainer._save(state_dict=trainer.model.state_dict())  # type: ignore[union-attr]
    assert len(rescued(tmp_path / "run")) == 1


def test_a_failed_checkpoint_keeps_the_one_before(
    toy_trainer: Build, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """transformers removes the older one before the newer is whole."""
    trainer = toy_trainer(save_strategy="steps", save_steps=2, save_total_limit=1, max_steps=4)
    real, saved = Trainer._save_rng_state, []

    def save(self: Trainer, folder: str) -> None:
        saved.append(folder)
        if len(saved) == 2:
            raise FULL
        real(self, folder)

    monkeypatch.setattr(Trainer, "_save_rng_state", save)
    with pytest.raises(SaveError, match="No space left"):
        trainer.train()
    (path,) = rescued(tmp_path / "run")
    assert names(tmp_path / "run") == {"checkpoint-2", path.name}
    monkeypatch.undo()
    straight = toy_trainer(folder="straight", max_steps=4)
    straight.train()
    resumed = toy_trainer(max_steps=4)
    resumed.train(resume_from_checkpoint=True)
    one, two = (run.model.state_dict() for run in (straight, resumed))  # type: ignore[union-attr]
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_deepspeed_is_refused_where_it_would_move_the_idle_adapter(
    toy_trainer: Build, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By what accelerate has set up, since a launcher or a file can switch it on too."""
    real = CollavoTrainer.create_accelerator_and_postprocess

    def create(self: CollavoTrainer) -> None:
        real(self)
        self.is_deepspeed_enabled = True

    monkeypatch.setattr(CollavoTrainer, "create_accelerator_and_postprocess", create)
    with pytest.raises(ValueError, match=r"^deepspeed: expected none with stage cit, got DeepSp"):
        toy_trainer(stage="cit")
    toy_trainer(stage="cpt")
