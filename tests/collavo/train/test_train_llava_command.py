"""``collavo train`` in LLaVA's stages: folders in and out, maps, presets, resuming, mistakes."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from tiny_collavo import make_collavo

from collavo.cli import main
from collavo.loading import load_folder
from collavo.panoptic import CachedSegmenter, PanopticMap
from collavo.processing.chat_templates import chat_template
from collavo.train.trainer import CollavoTrainer


@pytest.fixture
def model_folder(tmp_path: Path, tiny_processor: Callable[..., Any]) -> Path:
    processor = tiny_processor(grid=(2, 2), image_size=8)
    model = make_collavo(
        adapters=False, classes=133, numbers=20, vocabulary=len(processor.tokenizer)
    )
    model.config.image_token_index = processor.image_token_id
    model.save_pretrained(tmp_path / "model")
    processor.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def records(count: int, *, text_every: int = 0) -> list[dict[str, Any]]:
    """Questions about the scenes, every ``text_every``-th about nothing to see."""
    found: list[dict[str, Any]] = []
    for number in range(count):
        bare = bool(text_every) and number % text_every == 0
        question = "What is in this picture?" + " Is there a horse" * (number % 3)
        asked = question if bare else f"<image>\n{question}"
        turns = [{"from": "human", "value": asked}, {"from": "gpt", "value": "a horse"}]
        image = {} if bare else {"image": f"00{number % 3 + 1}.png"}
        found.append({"id": number, **image, "conversations": turns})
    return found


@pytest.fixture
def words(model_folder: Path, coco_folder: Path, tmp_path: Path) -> list[str]:
    for name, made in (("mixed", records(7, text_every=3)), ("images", records(6))):
        (tmp_path / f"{name}.json").write_text(json.dumps(made))
    options = {
        "--model": model_folder,
        "--images": coco_folder / "images",
        "--data": tmp_path / "mixed.json",
        "--output_dir": tmp_path / "out",
        "--global-batch": 4,
        "--learning_rate": 0.01,
        "--logging_steps": 1,
        "--report_to": "none",
    }
    return ["train", "--use_cpu", *(str(word) for pair in options.items() for word in pair)]


def changed(one: Path, other: Path) -> set[str]:
    before, after = (load_file(folder / "model.safetensors") for folder in (one, other))
    return {n for n in after if n not in before or not torch.equal(before[n], after[n])}


def test_align_then_instruct_with_adapters_over_four_bits(
    words: list[str], model_folder: Path, tmp_path: Path, coco_folder: Path
) -> None:
    """What ``align`` saved is what ``instruct`` starts from; templates are saved with the model."""
    images, out = str(tmp_path / "images.json"), tmp_path / "out"
    assert main([*words, "--stage", "align", "--data", images, "--save_strategy", "no"]) == 0
    moved = changed(model_folder, out)
    assert moved == {n for n in load_file(out / "model.safetensors") if "projector" in n}
    assert load_folder(out)[1].chat_template == chat_template("plain")

    tuned = tmp_path / "tuned"
    instruct = [*words, "--model", str(out), "--output_dir", str(tuned), "--stage", "instruct"]
    instruct += ["--preset", "llava-1.5-lora", "--lora-rank", "4", "--quantize", "nf4"]
    instruct += ["--save_steps", "2", "--eval-data", images, "--num_train_epochs", "2"]
    assert main(instruct) == 0
    model, processor = load_folder(tuned)
    assert processor.chat_template == chat_template("vicuna_v1")
    settings = model.decoder_settings()
    assert list(settings.adapters) == ["instruct"] and settings.quantize == "nf4"
    state = json.loads((tuned / "trainer_state.json").read_text())
    steps = [
        (log["image_steps"], log["text_steps"]) for log in state["log_history"] if "loss" in log
    ]
    assert sorted(steps) == [(0, 1), (0, 1), (1, 0), (1, 0)]
    assert len([log for log in state["log_history"] if "eval_loss" in log]) == 2

    final = (tuned / "model.safetensors").read_bytes()
    (tuned / "model.safetensors").unlink()
    for file in sorted((tuned / "checkpoint-4").iterdir()):
        file.unlink()
    (tuned / "checkpoint-4").rmdir()
    assert main([*instruct, "--resume"]) == 0
    assert (tuned / "model.safetensors").read_bytes() == final


def crayons(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """The batches that are trained on from now on."""
    seen: list[dict[str, Any]] = []
    real = CollavoTrainer.training_step

    def step(self: CollavoTrainer, model: Any, inputs: dict[str, Any], *rest: Any) -> Any:
        seen.append(inputs)
        return real(self, model, inputs, *rest)

    monkeypatch.setattr(CollavoTrainer, "training_step", step)
    return seen


@pytest.mark.parametrize("source", ["png", "prepared", "segmenter", "none"])
def test_instruction_tuning_with_the_crayon(
    words: list[str],
    coco_folder: Path,
    tmp_path: Path,
    source: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Maps from all three sources; an image without one is one unknown segment.

    Nothing is added to the text, whatever the processor's setting.
    """
    coco = coco_folder / "panoptic"
    listed = ["--panoptic", coco, "--annotations", coco.with_suffix(".json")]
    options: list[object] = []
    if source == "png":
        options = ["--coco-images", coco_folder / "images", *listed]
    elif source == "prepared":
        shards = tmp_path / "shards"
        prepare = ["prepare", "--images", coco_folder / "images", *listed, "--output", shards]
        assert main([*map(str, prepare), "--grid", "2", "--no-progress"]) == 0
        options = ["--prepared", shards]
        for path in coco.iterdir():
            path.unlink()  # they are not read again
    elif source == "segmenter":
        cached = CachedSegmenter(halves, tmp_path / "cache", settings="halves")
        for name in ("001.png", "002.png"):  # the third is not there
            cached(coco_folder / "images" / name)
        options = ["--segmenter", tmp_path / "cache"]
    data = ["--data", str(tmp_path / "images.json"), "--adapters", "mine", "--lora-rank", "2"]
    parts = ["--parts", "projector", "adapters", "crayon", "--stage", "instruct"]
    seen = crayons(monkeypatch)
    assert main([*words, *map(str, options), *data, *parts, "--save_strategy", "no"]) == 0
    rows = [row.tolist() for batch in seen for row in batch["crayon_class"]]
    known = [row for row in rows if any(label > 0 for label in row)]
    assert len(rows) == 6 and len(known) == {"none": 0, "segmenter": 4}.get(source, 6)
    assert all(row[0] == 0 and set(row[1:]) <= {-1} for row in rows if row not in known)
    tokens = {int(mask.sum()) for batch in seen for mask in batch["attention_mask"]}
    assert len(tokens) == 3  # one for each question, whatever its picture
    moved = changed(tmp_path / "model", tmp_path / "out")
    assert any("crayon" in name for name in moved) and any("lora_A.mine" in n for n in moved)


def halves(image: Image.Image) -> PanopticMap:
    ids = torch.zeros(image.height, image.width, dtype=torch.int32)
    ids[:, : image.width // 2] = 1
    return PanopticMap.from_segments(ids, [1], [17])


def test_presets_set_how_images_are_placed(words: list[str], tmp_path: Path) -> None:
    """LLaVA-1.5 crops to align and pads to instruct; what the command line says wins."""
    words += ["--data", str(tmp_path / "images.json"), "--save_strategy", "no", "--max_steps", "1"]
    for stage, pads in (("align", False), ("instruct", True)):
        out = str(tmp_path / stage)
        more = ["--stage", stage, "--preset", "llava-1.5", "--template", "v1", "--output_dir", out]
        assert main([*words, *more]) == 0
        processor = load_folder(out)[1]
        assert bool(getattr(processor.image_processor, "do_pad", False)) is pads
        assert processor.chat_template == chat_template("v1")


def test_weights_and_faulty_records(
    words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made = [*records(3), {"id": "odd", "image": "gone.png", "conversations": []}]
    (tmp_path / "faulty.json").write_text(json.dumps(made))
    data = ["--data", f"{tmp_path / 'images.json'}:0.5", str(tmp_path / "faulty.json")]
    options = ["--stage", "align", "--save_strategy", "no", "--global-batch", "3"]
    with pytest.warns(UserWarning, match="records that cannot be used are left out"):
        assert main([*words, *data, *options]) == 0
    state = json.loads((tmp_path / "out" / "trainer_state.json").read_text())
    assert state["max_steps"] == 2  # three of six and three of four
    assert "1 records were left out" in capsys.readouterr().out
    assert main([*words, *data, *options, "--on-fault", "raise"]) == 2
    assert "faulty.json: [3] (id 'odd')" in capsys.readouterr().err


MISTAKES: dict[str, tuple[list[str], str]] = {
    "template": (["--template", "vicuna"], "plain, v0, v0_mmtag, v1, llava_v1, "),
    "preset": (["--preset", "llava-2"], "preset: expected one of 'llava-1', 'llava-1.5', "),
    "stage of a preset": (["--stage", "cpt", "--preset", "llava-1"], "for the stages 'align' or "),
    "parts": (["--parts", "head"], "parts: expected some of crayon, projector, decoder, adapters"),
    "adapters": (["--parts", "projector", "--adapters", "mine"], "adapters: got ['mine'], but the"),
    "batch": (
        ["--global-batch", "10", "--per_device_train_batch_size", "4"],
        "global_batch: expected a multiple of 1 devices x 4 samples per device, got 10",
    ),
    "images": (["--images", "no-folder"], "--images: there is no folder no-folder"),
    "data": (["--data", "no.json"], "--data: no.json: there is no such file"),
    "weight": (["--data", "no.json:x"], "--data: expected FILE or FILE:WEIGHT with a weight above"),
    "no list": (["--data", "{dict}"], "dict.json: expected a list of records, got "),
    "vl data": (["--vl-data", "vl.json"], "--vl-data: expected with --stage cit; instruct takes"),
    "cpt": (["--stage", "cpt"], "--data: expected with --stage align or instruct, got cpt"),
    "model": (["--model", "no-model"], "no-model: no such model folder"),
    "text": (
        ["--stage", "align", "--template", "v1"],
        "--data: 3 of 7 records have no image, the first is ",
    ),
    "segmenter": (["--segmenter", "{empty}"], "expected maps that a CachedSegmenter"),
    "four bits": (["--quantize", "nf4"], "its decoder's weights are in 4 bits"),
    "eval data": (["--eval-data", "no.json"], "--data: no.json: there is no such file"),
}


@pytest.mark.parametrize("case", MISTAKES)
def test_mistakes_are_one_line_and_nothing_is_written(
    words: list[str], case: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "dict.json").write_text("{}")
    (tmp_path / "empty").mkdir()
    places = {"{dict}": str(tmp_path / "dict.json"), "{empty}": str(tmp_path / "empty")}
    changes, message = MISTAKES[case]
    options = [places.get(word, word) for word in changes]
    assert main([*words, "--stage", "instruct", *options]) == 2
    error = [line for line in capsys.readouterr().err.splitlines() if line.startswith("collavo")]
    assert len(error) == 1 and message in error[0]
    assert not list((tmp_path / "out").glob("*"))
