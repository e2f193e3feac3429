"""``collavo eval`` on a folder: the scores are of the weights that the folder names."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from collavo.cli import main


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
