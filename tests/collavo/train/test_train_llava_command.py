"""``collavo train`` in LLaVA's stages: folders in and out, maps, presets, resuming, mistakes."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from tiny import tiny_tokenizer
from tiny_collavo import make_collavo
from transformers import LlavaProcessor

from collavo.cli import main
from collavo.cli.train_llava import _take_image_mode
from collavo.loading import load_folder
from collavo.panoptic import CachedSegmenter, PanopticMap
from collavo.processing import CollavoProcessor, make_image_processor
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
    words: list[str],
    model_folder: Path,
    tmp_path: Path,
    coco_folder: Path,
    capsys: pytest.CaptureFixture[str],
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

    again = [*words, "--model", str(tuned), "--stage", "instruct", "--adapters", "instruct"]
    assert main([*again, "--output_dir", str(tmp_path / "again"), "--lora-rank", "8"]) == 2
    assert "has an adapter 'instruct' already, with 4, got 8" in capsys.readouterr().err
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


def test_a_cache_of_other_pictures_is_refused(
    words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Every picture would be one unknown segment, and nothing would say so."""
    cached = CachedSegmenter(halves, tmp_path / "cache", settings="halves")
    cached(Image.new("RGB", (5, 7)))
    more = ["--stage", "align", "--data", str(tmp_path / "images.json")]
    assert main([*words, *more, "--segmenter", str(tmp_path / "cache")]) == 2
    said = capsys.readouterr().err
    assert re.search(r"--segmenter: \S*cache has a map of none of \d+ pictures looked at", said)
    assert not (tmp_path / "out" / "model.safetensors").exists()


def halves(image: Image.Image) -> PanopticMap:
    ids = torch.zeros(image.height, image.width, dtype=torch.int32)
    ids[:, : image.width // 2] = 1
    return PanopticMap.from_segments(ids, [1], [17])


def test_presets_set_how_images_are_placed(
    words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """LLaVA-1.5 crops to align and pads to instruct; what the command line says wins.

    What is changed of the model's processor, and was not asked for, is said. A model whose prompts
    named objects is trained without, so it is saved so.
    """
    processor = load_folder(tmp_path / "model")[1]
    processor.object_text = True
    processor.save_pretrained(tmp_path / "model")
    words += ["--data", str(tmp_path / "images.json"), "--save_strategy", "no", "--max_steps", "1"]
    for stage, pads in (("align", False), ("instruct", True)):
        out = str(tmp_path / stage)
        more = ["--stage", stage, "--preset", "llava-1.5", "--template", "v1", "--output_dir", out]
        assert main([*words, *more]) == 0
        processor = load_folder(out)[1]
        assert bool(getattr(processor.image_processor, "do_pad", False)) is pads
        assert processor.chat_template == chat_template("v1") and not processor.names_objects
        said = capsys.readouterr().out
        assert f"preset: image_mode is {'pad' if pads else 'crop'} from now on" in said
        assert "preset: image_size is 336 there, and 8 in the model; it stays" in said
        assert "template:" not in said
    assert main([*words, "--stage", "instruct"]) == 0
    assert "template: vicuna_v1, the stage's, in the place of" in capsys.readouterr().out


def test_a_preset_sets_the_pixels_of_transformers_processors_too() -> None:
    """One around LLaVA's own processor has its pixels from that one."""
    inner = LlavaProcessor(
        make_image_processor(8, mode="crop"), tiny_tokenizer(), patch_size=4,
        vision_feature_select_strategy="default", num_additional_image_tokens=1,
        chat_template=chat_template("v1"),
    )  # fmt: skip
    processor = CollavoProcessor.from_llava(inner)
    model = SimpleNamespace(config=SimpleNamespace(vision_config=SimpleNamespace(image_size=8)))
    _take_image_mode(processor, model, {"image_mode": "pad"})
    picture = Image.new("RGB", (8, 16), "red")
    made = processor(text=["<image>"], images=[picture], return_tensors="pt")["pixel_values"]
    padded = make_image_processor(8, mode="pad")(picture, return_tensors="pt")["pixel_values"]
    assert torch.equal(made, padded) and len(made.unique()) > 3
    processor.box_frame = "padded"
    with pytest.raises(ValueError, match="--preset: crops images, whose boxes"):
        _take_image_mode(processor, model, {"image_mode": "crop"})


def test_what_is_asked_later_is_what_was_trained(
    words: list[str], model_folder: Path, tmp_path: Path
) -> None:
    """A folder whose prompts name objects was trained without them: chat and eval must not.

    A template's stop has to stop answers, or they run on to their longest.
    """
    _, processor = load_folder(model_folder)
    assert processor.names_objects
    processor.tokenizer.add_tokens(["<|im_end|>"], special_tokens=True)
    processor.save_pretrained(model_folder)
    model = make_collavo(
        adapters=False, classes=133, numbers=20, vocabulary=len(processor.tokenizer)
    )
    model.config.image_token_index = processor.image_token_id
    model.save_pretrained(model_folder)
    words += ["--stage", "instruct", "--template", "mpt", "--max_steps", "1"]
    assert main([*words, "--save_strategy", "no"]) == 0
    model, processor = load_folder(tmp_path / "out")
    assert not processor.names_objects
    assert processor.tokenizer.chat_template == processor.chat_template == chat_template("mpt")
    stop = processor.tokenizer.convert_tokens_to_ids("<|im_end|>")
    stops = model.generation_config.eos_token_id
    assert processor.stop_token() == stop and stop in (
        stops if isinstance(stops, list) else [stops]
    )


def test_no_object_text_is_counted_trained_on_or_asked_with(
    words: list[str], model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A model of CoLLaVO names objects in prompts; what LLaVA's stages make of it does not."""
    assert load_folder(model_folder)[1].names_objects
    opened: list[Any] = []
    real = CollavoTrainer.__init__

    def made(self: CollavoTrainer, *args: Any, **kwargs: Any) -> None:
        opened.append(kwargs["train_dataset"])
        real(self, *args, **kwargs)

    monkeypatch.setattr(CollavoTrainer, "__init__", made)
    seen = crayons(monkeypatch)
    data = ["--data", str(tmp_path / "images.json"), "--stage", "align", "--save_strategy", "no"]
    assert main([*words, *data]) == 0
    tokens = [int(mask.sum()) for batch in seen for mask in batch["attention_mask"]]
    assert sorted(tokens) == sorted(opened[0].lengths.tolist())
    assert not load_folder(tmp_path / "out")[1].names_objects


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
    "eval data": (["--eval-data", "no.json"], "--eval-data: no.json: there is no such file"),
    "a name of torch's": (["--adapters", "train"], "adapters: 'train' is a word of torch's own"),
    "alpha": (
        ["--adapters", "mine", "--lora-alpha", "nan"],
        "lora_alpha: expected a number above 0",
    ),
    "epochs": (["--num_train_epochs", "0"], "num_train_epochs: expected above 0, got 0.0"),
    "rank of no adapter": (["--lora-rank", "8"], "--lora-rank: expected with adapters to train"),
    "negative batch": (["--global-batch", "-8"], "global_batch: expected at least 1, got -8"),
    "adapter's folder": (
        ["--adapters", "a/b", "--export", "exported"],
        "adapters: 'a/b' can be no folder's name",
    ),
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


def test_a_preset_that_crops_needs_boxes_of_images(
    words: list[str],
    model_folder: Path,
    tmp_path: Path,
    tiny_processor: Callable[..., Any],
    capsys: pytest.CaptureFixture[str],
) -> None:
    """A folder whose processor crops and tells boxes of padded squares could not be loaded."""
    processor = tiny_processor(grid=(2, 2), image_size=8, mode="pad", box_frame="padded")
    processor.save_pretrained(model_folder)
    images = ["--data", str(tmp_path / "images.json"), "--stage", "align"]
    assert main([*words, *images, "--preset", "llava-1.5"]) == 2
    assert "--preset: crops images, whose boxes" in capsys.readouterr().err
