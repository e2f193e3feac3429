"""The whole way of a LLaVA on drawn scenes, by its commands: build, align, instruct, chat, eval.

Each stage moves the tensors of its parts, every one of them, and no other by a single bit.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from collavo.cli import main
from collavo.demo.base import Patches
from collavo.demo.llava.parts import LANGUAGE, PARTS, VISION
from collavo.demo.llava.talks import Talker, write_records
from collavo.demo.scenes import make_scene
from collavo.demo.storage import Scenes, write_scenes
from collavo.loading import load_folder

LORA = ["--adapters", "instruct", "--lora-rank", "4", "--lora-alpha", "8"]
WAYS: dict[str, tuple[tuple[str, ...], list[str]]] = {
    "dense": (("projector", "decoder"), []),
    "LoRA": (("projector", "adapters"), LORA),
    "NF4 and LoRA": (("projector", "adapters"), [*LORA, "--quantize", "nf4"]),
    "NF4, LoRA and crayon": (
        ("projector", "adapters", "crayon"),
        [*LORA, "--quantize", "nf4", "--parts", "projector", "adapters", "crayon"],
    ),
}


def part_of(name: str) -> str:
    """Say by a tensor's name whose it is; the modules' names are the published ones."""
    if "crayon_prompt" in name:
        return "crayon"
    if ".lora_A." in name or ".lora_B." in name:
        return "adapters"
    if "multi_modal_projector" in name:
        return "projector"
    return "vision" if "vision_tower" in name else "decoder"


def moved(before: dict[str, Tensor], after: dict[str, Tensor]) -> set[str]:
    assert before.keys() == after.keys()
    return {name for name, tensor in after.items() if not torch.equal(before[name], tensor)}


def of_parts(state: dict[str, Tensor], parts: tuple[str, ...]) -> set[str]:
    return {name for name in state if part_of(name) in parts}


def state_of(folder: Path) -> dict[str, Tensor]:
    state: dict[str, Tensor] = load_folder(folder)[0].state_dict()
    return state


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Scenes in COCO's format, a built model, and LLaVA's records about the scenes."""
    folder = tmp_path_factory.mktemp("walk")
    rng = np.random.default_rng(11)
    write_scenes(folder / "scenes", (make_scene(rng) for _ in range(24)))
    parts = ["--llm", str(PARTS / LANGUAGE), "--vision", str(PARTS / VISION)]
    # In float32 a stage cannot change a dtype, which would be a change of a tensor.
    options = ["--dtype", "float32", "--no-progress"]
    assert main(["build", *parts, "--out", str(folder / "built"), *options]) == 0
    scenes = Scenes(folder / "scenes")
    processor: Any = load_folder(folder / "built")[1]
    talker = Talker(scenes, Patches.read(scenes, processor.image_processor).words(), seed=0)
    write_records(folder / "align.json", talker.captions())
    mixed = [*talker.about_images(range(12)), *talker.about_words(range(8))]
    write_records(folder / "instruct.json", mixed)
    return folder


def maps(folder: Path) -> list[str]:
    scenes = folder / "scenes"
    listed = ["--annotations", str(scenes / "panoptic.json")]
    return ["--panoptic", str(scenes / "panoptic"), *listed]


def train(folder: Path, stage: str, model: Path, output: Path, *more: str) -> None:
    images = str(folder / "scenes" / "images")
    data = ["--data", str(folder / f"{stage}.json"), "--images", images]
    steps = ["--max_steps", "6", "--global_batch", "4", "--learning_rate", "1e-2"]
    quiet = ["--disable_tqdm", "true", "--report_to", "none", "--save_strategy", "no"]
    run = ["--stage", stage, "--model", str(model), "--output_dir", str(output), "--use_cpu"]
    assert main(["train", *run, *data, *steps, *quiet, *more]) == 0


@pytest.fixture(scope="module")
def aligned(folder: Path) -> Path:
    train(folder, "align", folder / "built", folder / "aligned")
    return folder / "aligned"


def test_align_moves_the_projector(folder: Path, aligned: Path) -> None:
    before = state_of(folder / "built")
    assert moved(before, state_of(aligned)) == of_parts(before, ("projector",))


@pytest.mark.parametrize("way", WAYS)
def test_the_whole_way(
    folder: Path,
    aligned: Path,
    way: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    parts, options = WAYS[way]
    known = [] if "crayon" not in parts else [*maps(folder), "--coco-images", "{images}"]
    scenes, output = folder / "scenes", tmp_path / "model"
    known = [word.format(images=scenes / "images") for word in known]
    projector = ["--projector_learning_rate", "1e-2"] if options else []
    train(folder, "instruct", aligned, output, *options, *projector, *known)
    before: Any = load_folder(aligned)[0]
    if options:
        quantize = "nf4" in options
        before.add_dual_qlora(("instruct",), rank=4, alpha=8.0, dropout=0.05, quantize=quantize)
    # New adapters are drawn, and an outer factor B of zeros moves with the first step.
    after = state_of(output)
    assert moved(before.state_dict(), after) == of_parts(after, parts)

    given = ["--model", str(output)]
    image = ["--image", str(scenes / "images" / "000001.png")]
    panoptic = ["--panoptic", str(scenes / "panoptic" / "000001.png"), *maps(folder)[2:]]
    asked = ["--question", "Describe the image.", "--max-new-tokens", "8"]
    capsys.readouterr()
    assert main(["chat", *given, *image, *panoptic, *asked]) == 0
    assert capsys.readouterr().out.strip()

    scores = ["--output", str(tmp_path / "scores.json"), "--images", str(scenes / "images")]
    limits = ["--limit", "2", "--tasks", "c2b", "--max-new-tokens", "2", "--no-progress"]
    assert main(["eval", *given, *scores, *maps(folder), *limits]) == 0
    written = json.loads((tmp_path / "scores.json").read_text())
    assert written["crayon"]["on"]["c2b"]["questions"] > 0
