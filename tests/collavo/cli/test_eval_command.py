"""``collavo eval`` on a folder: the scores are of the weights that the folder names."""

from __future__ import annotations

import errno
import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from collavo import writing
from collavo.cli import evaluate, main


def arguments(model: Path, coco: Path, output: Path) -> list[str]:
    folders = ["--images", str(coco / "images"), "--panoptic", str(coco / "panoptic")]
    listed = ["--annotations", str(coco / "panoptic.json"), "--output", str(output)]
    asked = ["--limit", "1", "--tasks", "b2c", "--max-new-tokens", "2", "--no-progress"]
    return ["eval", "--model", str(model), *folders, *listed, *asked]


def test_scores_are_written(model_folder: Path, coco_folder: Path, tmp_path: Path) -> None:
    assert main(arguments(model_folder, coco_folder, tmp_path / "scores.json")) == 0
    scores = json.loads((tmp_path / "scores.json").read_text())
    assert set(scores["crayon"]) == {"on", "off"}
    assert scores["crayon"]["on"]["b2c"]["questions"] == 3


def test_where_scores_cannot_be_written_is_said_before_the_answers(
    model_folder: Path,
    coco_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The answers take hours; where the disk fills meanwhile, the scores are at least printed."""
    (tmp_path / "scores.json").mkdir()
    with monkeypatch.context() as patch:
        patch.setattr(evaluate, "answer_questions", lambda *_, **__: 1 / 0)
        assert main(arguments(model_folder, coco_folder, tmp_path / "scores.json")) == 2
    assert "expected a file, this is a folder" in capsys.readouterr().err

    def full(path: Path, _: bytes) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    monkeypatch.setattr(writing, "write_file", full)
    assert main(arguments(model_folder, coco_folder, tmp_path / "other.json")) == 2
    said = capsys.readouterr()
    assert json.loads(said.out)["crayon"]["on"]["b2c"]["questions"] == 3
    assert "No space left on device" in said.err and "other.json" in said.err


@pytest.mark.parametrize("change", ["missing", "surplus"])
def test_tensors_that_do_not_fit_give_no_scores(
    model_folder: Path,
    coco_folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    change: str,
) -> None:
    """transformers draws what is missing at random: the scores would be of another model."""
    folder = shutil.copytree(model_folder, tmp_path / "model")
    name = "model.language_model.norm.weight"
    tensors = load_file(folder / "model.safetensors")
    if change == "missing":
        del tensors[name]
    else:
        tensors["surplus.weight"] = torch.zeros(1)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    assert main(arguments(folder, coco_folder, tmp_path / "scores.json")) == 2
    error = [line for line in capsys.readouterr().err.splitlines() if line.startswith("collavo")]
    assert len(error) == 1 and (name if change == "missing" else "surplus.weight") in error[0]
    assert not (tmp_path / "scores.json").exists()
