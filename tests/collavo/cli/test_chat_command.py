"""``collavo chat`` on a model folder: answers, turns, and errors that name what is wrong."""

from __future__ import annotations

import builtins
import json
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from collavo.cli import main


def arguments(folder: Path, coco: Path, *more: str) -> list[str]:
    image = ["--image", str(coco / "images" / "001.png")]
    panoptic = ["--panoptic", str(coco / "panoptic" / "001.png")]
    listed = ["--annotations", str(coco / "panoptic.json")]
    return ["chat", "--model", str(folder), *image, *panoptic, *listed, *more]


def test_one_question(
    model_folder: Path, coco_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    more = ["--question", "How many horses are there?", "--max-new-tokens", "5"]
    assert main(arguments(model_folder, coco_folder, *more)) == 0
    answer = capsys.readouterr().out
    assert answer.strip()
    assert main(arguments(model_folder, coco_folder, *more)) == 0
    assert capsys.readouterr().out == answer
    assert main(arguments(model_folder, coco_folder, *more, "--no-object-text")) == 0
    assert capsys.readouterr().out != answer


def test_turns_until_an_empty_line(
    model_folder: Path,
    coco_folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    lines = iter(["How many horses are there?", "Is there a person?", ""])
    monkeypatch.setattr(builtins, "input", lambda prompt: next(lines))
    assert main(arguments(model_folder, coco_folder, "--max-new-tokens", "4")) == 0
    assert capsys.readouterr().out.strip()
    assert next(lines, None) is None


def test_without_an_image(model_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["chat", "--model", str(model_folder), "--question", "Is there a person?"]
    assert main([*words, "--max-new-tokens", "3"]) == 0
    assert capsys.readouterr().out.strip()


def test_wrong_arguments_are_named(
    model_folder: Path, coco_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = arguments(model_folder, coco_folder, "--question", "x")
    without_image = [w for w in given if w not in ("--image", str(coco_folder / "images/001.png"))]
    cases = [
        ([*given, "--max-new-tokens", "0"], "--max-new-tokens: expected at least 1"),
        (without_image, "--image: expected the image"),
        (given[:-4] + given[-2:], "--annotations: --panoptic and --annotations go together"),
        (arguments(tmp_path / "none", coco_folder, "--question", "x"), "no such model folder"),
        ([*given, "--image", str(tmp_path / "none.png")], "none.png"),
    ]
    for words, message in cases:
        assert main(words) == 2
        error = capsys.readouterr().err
        assert message in error and len(error.strip().splitlines()) == 1, error


def test_a_folder_that_is_not_whole_is_named(
    model_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["chat", "--model", str(tmp_path), "--question", "x"]
    for file in model_folder.iterdir():
        if file.name != "processor_config.json":
            (tmp_path / file.name).write_bytes(file.read_bytes())
    assert main(words) == 2
    assert "processor_config.json: missing" in capsys.readouterr().err
    shutil.copy(model_folder / "processor_config.json", tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["model.language_model.norm.weight"]
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    assert main(words) == 2
    assert "tensors are missing: model.language_model.norm.weight" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("grid", [5, 5], "its processor has grid (5, 5) and its model (4, 4)"),
        ("max_number", 50, "its processor has max_number 50 and its model 20"),
        ("num_classes", 2, "its processor has num_classes 2 and its model 133"),
    ],
)
def test_a_processor_of_another_model_is_named(
    model_folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    field: str,
    value: object,
    message: str,
) -> None:
    """On a GPU a class or number without a row would be a device-side failure, far from here."""
    folder = shutil.copytree(model_folder, tmp_path / "model")
    path = folder / "processor_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), field: value}))
    assert main(["chat", "--model", str(folder), "--question", "x"]) == 2
    assert message in capsys.readouterr().err


def test_a_folder_without_its_tokenizer_is_one_line(
    model_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = shutil.copytree(model_folder, tmp_path / "model")
    (folder / "tokenizer.json").unlink()
    assert main(["chat", "--model", str(folder), "--question", "x"]) == 2
    error = [line for line in capsys.readouterr().err.splitlines() if line.startswith("collavo")]
    assert len(error) == 1 and f"{folder}: its processor cannot be read" in error[0]


def test_a_map_of_another_image_is_named(
    model_folder: Path, coco_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = arguments(model_folder, coco_folder, "--question", "x")
    assert main([*given, "--image", str(coco_folder / "images" / "002.png")]) == 2
    assert "001.png: the map is 16x12, its image" in capsys.readouterr().err
