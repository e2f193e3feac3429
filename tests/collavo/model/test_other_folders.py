"""Folders of other models are refused with the way, before a weight is made."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tiny_crayon_model import make_config, make_llava, make_model
from transformers import AutoModel, AutoModelForImageTextToText, AutoProcessor

from collavo import CollavoConfig, CollavoProcessor, load_pretrained
from collavo._relatives import LLAVA_TYPES
from collavo.cli import main
from collavo.configuration import CollavoLlavaConfig
from collavo.loading import load_folder
from collavo.model.llava import CollavoForConditionalGeneration, CollavoModel
from collavo.model.patched import CollavoLlavaForConditionalGeneration
from collavo.model.text import CollavoTextModel
from collavo.processing import layouts
from tests.collavo.tiny import tiny_processor

WAYS: dict[str, Callable[[Path], Any]] = {
    "class": CollavoForConditionalGeneration.from_pretrained,
    "class, config": lambda f: CollavoForConditionalGeneration.from_pretrained(
        f, config=make_config()
    ),
    "auto, config": lambda f: AutoModelForImageTextToText.from_pretrained(f, config=make_config()),
    "base": CollavoModel.from_pretrained,
    "decoder": CollavoTextModel.from_pretrained,
    "base, auto": lambda f: AutoModel.from_pretrained(f, config=make_config()),
    "patched class": CollavoLlavaForConditionalGeneration.from_pretrained,
    "load_pretrained": load_pretrained,
    "load_folder": load_folder,
    "config alone": CollavoConfig.from_pretrained,
    "patched config alone": CollavoLlavaConfig.from_pretrained,
    "processor alone": CollavoProcessor.from_pretrained,
}
CLASSES = (
    CollavoForConditionalGeneration,
    CollavoModel,
    CollavoTextModel,
    CollavoLlavaForConditionalGeneration,
)
REST = {
    "chat": ["--question", "what?"],
    "eval": ["--images", ".", "--panoptic", ".", "--annotations", "none.json"],
    "train": ["--stage", "cpt", "--coco-images", ".", "--panoptic", ".", "--annotations", "x.json"],
}
COMMAND = r"`collavo convert SOURCE TARGET`"


@pytest.fixture
def no_weight_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fail wherever a tensor of a model would take memory or be drawn."""

    def refuse(self: Any, *arguments: Any, **options: Any) -> None:
        raise AssertionError("a model was built")

    for kind in CLASSES:
        monkeypatch.setattr(kind, "__init__", refuse)


def write_config(folder: Path, values: dict[str, Any]) -> None:
    (folder / "config.json").write_text(json.dumps(values))
    (folder / "pytorch_model.bin").touch()


@pytest.mark.parametrize("way", list(WAYS))
@pytest.mark.parametrize("original", [True, False])
def test_a_llava_folder_is_refused_with_the_way(
    tmp_path: Path, way: str, original: bool, no_weight_is_made: None
) -> None:
    """Under its old names, as the hub has it, its decoder would be drawn at random."""
    make_llava().save_pretrained(tmp_path, save_original_format=original)
    with pytest.raises(ValueError, match=rf"got .*'llava'; this is a LLaVA: .*{COMMAND}"):
        WAYS[way](tmp_path)


@pytest.mark.parametrize("way", list(WAYS))
@pytest.mark.parametrize("kind", ["internlm", "internlmxcomposer2", "other", None])
def test_the_official_folder_is_refused_with_the_way(
    tmp_path: Path, way: str, kind: str | None, no_weight_is_made: None
) -> None:
    """Its config.json would be read as CoLLaVO's, with the defaults of LLaMA-7B."""
    config = {"architectures": ["CoLLaVOModel"], "model_type": kind, "hidden_size": 64}
    write_config(tmp_path, config)
    with pytest.raises(ValueError, match=rf"this is the official CoLLaVO: .*{COMMAND}"):
        WAYS[way](tmp_path)


@pytest.mark.parametrize("kind", LLAVA_TYPES)
def test_every_family_is_named(tmp_path: Path, kind: str, no_weight_is_made: None) -> None:
    write_config(tmp_path, {"model_type": kind})
    for way in WAYS.values():
        with pytest.raises(ValueError, match=rf"'{kind}'; this is a LLaVA: .*{COMMAND}"):
            way(tmp_path)


@pytest.mark.parametrize(
    "values",
    [
        {"model_type": "llava_llama"},
        {"model_type": "llava_mistral"},
        {"model_type": "llava_qwen"},
        {"model_type": "tinyllava"},
        # Early releases of the original repository share transformers' name.
        {"model_type": "llava", "mm_vision_tower": "openai/clip-vit-large-patch14"},
    ],
    ids=str,
)
def test_the_original_format_is_told_from_transformers(
    tmp_path: Path, values: dict[str, Any], no_weight_is_made: None
) -> None:
    write_config(tmp_path, values)
    for way in WAYS.values():
        with pytest.raises(ValueError, match=rf"original repository's format: .*{COMMAND}"):
            way(tmp_path)


def test_the_classes_that_the_crayon_serves_have_a_name_here() -> None:
    """A configuration of transformers whose name were misspelt here would be read as CoLLaVO's.

    And a model that has a place here has a processor whose tokens are followed, or is refused.
    """
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES
    from transformers.models.auto.processing_auto import PROCESSOR_MAPPING_NAMES

    assert set(LLAVA_TYPES) <= set(CONFIG_MAPPING_NAMES)
    processors = {PROCESSOR_MAPPING_NAMES[kind] for kind in LLAVA_TYPES}
    assert processors == {*layouts.FAMILIES, *layouts._REFUSED}


def test_folders_of_this_package_and_bare_processors_load(tmp_path: Path) -> None:
    """A processor without a model beside it, and one that was saved into a LLaVA's folder."""
    tiny_processor().save_pretrained(tmp_path / "bare")
    make_llava().save_pretrained(tmp_path / "llava")
    tiny_processor().save_pretrained(tmp_path / "llava")
    make_model().save_pretrained(tmp_path / "own")
    tiny_processor().save_pretrained(tmp_path / "own")
    for name in ("bare", "llava", "own"):
        for kind in (CollavoProcessor, AutoProcessor):
            loaded = kind.from_pretrained(tmp_path / name)
            assert type(loaded) is CollavoProcessor and loaded.grid == (4, 4)


@pytest.mark.parametrize("command", ["chat", "eval", "train"])
def test_commands_say_it_in_one_line(
    tmp_path: Path, command: str, capsys: pytest.CaptureFixture[str], no_weight_is_made: None
) -> None:
    write_config(tmp_path, {"model_type": "llava_next"})
    assert main([command, "--model", str(tmp_path), *REST[command]]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "this is a LLaVA" in said and "collavo convert" in said


def test_a_process_that_is_given_a_llava_says_it_and_ends(tmp_path: Path) -> None:
    write_config(tmp_path, {"model_type": "internlm"})
    called = [sys.executable, "-m", "collavo", "chat", "--model", str(tmp_path)]
    done = subprocess.run([*called, "--question", "what?"], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "")
    assert "official CoLLaVO" in done.stderr and "collavo convert SOURCE TARGET" in done.stderr
