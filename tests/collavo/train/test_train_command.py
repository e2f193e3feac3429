"""``collavo train`` on a folder: both stages, data with and without images, resume, mistakes."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny_collavo import make_collavo
from transformers import Trainer

from collavo.cli import main
from collavo.prepared import SkipLog
from collavo.train import saving


@pytest.fixture
def model_folder(tmp_path: Path, tiny_processor: Callable[..., Any]) -> Path:
    """A model without adapters and a processor whose 2x2 grid and vocabulary are the model's."""
    processor = tiny_processor(grid=(2, 2), image_size=8)
    tokenizer = processor.tokenizer
    model = make_collavo(adapters=False, classes=133, numbers=20, vocabulary=len(tokenizer))
    model.config.image_token_index = processor.image_token_id
    model.save_pretrained(tmp_path / "model")
    processor.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def vl_json(tmp_path: Path) -> Path:
    """A question about an image that has a map, one about text alone, in LLaVA's format."""

    def record(**extra: str) -> dict[str, Any]:
        turns = [{"from": "human", "value": "What is in this picture?"}]
        return {**extra, "conversations": [*turns, {"from": "gpt", "value": "a horse"}]}

    path = tmp_path / "vl.json"
    path.write_text(json.dumps([record(image="001.png"), record(), record(image="003.png")]))
    return path


@pytest.fixture
def words(model_folder: Path, coco_folder: Path, tmp_path: Path) -> list[str]:
    options = {
        "--model": model_folder,
        "--coco-images": coco_folder / "images",
        "--panoptic": coco_folder / "panoptic",
        "--annotations": coco_folder / "panoptic.json",
        "--output_dir": tmp_path / "out",
        "--max_steps": 4,
        "--per_device_train_batch_size": 2,
        "--learning_rate": 0.01,
        "--logging_steps": 1,
    }
    return ["train", "--use_cpu", *(str(word) for pair in options.items() for word in pair)]


def test_both_stages_one_after_the_other(
    words: list[str], vl_json: Path, coco_folder: Path, tmp_path: Path, model_folder: Path
) -> None:
    """What cpt saved is what cit starts from; cit adds the adapters, and its 4-bit weights."""
    assert main([*words, "--stage", "cpt", "--save_strategy", "no"]) == 0
    before, after = (load_file(f / "model.safetensors") for f in (model_folder, tmp_path / "out"))
    assert before.keys() == after.keys()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed and all("crayon" in name for name in changed)

    cit = [*words, "--model", str(tmp_path / "out"), "--output_dir", str(tmp_path / "cit")]
    cit += ["--stage", "cit", "--vl-data", str(vl_json), "--vl-images", str(coco_folder / "images")]
    cit += ["--save_steps", "2", "--lora-rank", "4", "--lora-alpha", "4"]
    assert main(cit) == 0
    names = load_file(tmp_path / "cit" / "model.safetensors")
    assert any("lora_A.vl.weight" in name for name in names)
    assert any("bitsandbytes__nf4" in name for name in names)
    state = json.loads((tmp_path / "cit" / "checkpoint-4" / "trainer_state.json").read_text())
    kinds = [(log["image_steps"], log["vl_steps"]) for log in state["log_history"] if "loss" in log]
    assert len(kinds) == 4 and (1, 0) in kinds and (0, 1) in kinds

    final = (tmp_path / "cit" / "model.safetensors").read_bytes()
    for name in ("model.safetensors", "trainer_state.json"):
        (tmp_path / "cit" / name).unlink()
    for file in sorted((tmp_path / "cit" / "checkpoint-4").iterdir()):
        file.unlink()
    (tmp_path / "cit" / "checkpoint-4").rmdir()
    assert main([*cit, "--resume"]) == 0
    assert (tmp_path / "cit" / "model.safetensors").read_bytes() == final


def test_bad_records_are_left_out_and_counted(
    words: list[str],
    vl_json: Path,
    coco_folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """A malformed record, a picture that has gone, an answer that is cut away, a faulty map."""
    records = json.loads(vl_json.read_text())
    turns = records[0]["conversations"]
    long = [{"from": "human", "value": "What " * 300}, {"from": "gpt", "value": "no"}]
    records += [{"id": "x"}, {"image": "gone.png", "conversations": turns}]
    records += [{"conversations": long}]
    vl_json.write_text(json.dumps(records), encoding="utf-8-sig")
    content = json.loads((coco_folder / "panoptic.json").read_text())
    content["annotations"][1]["segments_info"][0]["category_id"] = 12
    (coco_folder / "panoptic.json").write_text(json.dumps(content))
    cit = [*words, "--stage", "cit", "--vl-data", str(vl_json), "--max-length", "256"]
    cit += ["--vl-images", str(coco_folder / "images"), "--lora-rank", "4", "--max_steps", "8"]
    with pytest.warns(UserWarning, match="unknown category_id 12; records that cannot be used"):
        assert main([*cit, "--save_strategy", "no", "--vl_probability", "0.9"]) == 0
    path = tmp_path / "out" / "skipped_records.jsonl"
    assert f"4 records were left out, listed in {path}" in capsys.readouterr().out
    found = {one.name: one.reason for one in SkipLog(path).entries()}
    assert found["002.png"].endswith("has the unknown category_id 12")
    assert "expected 'conversations' as a list" in found[f"{vl_json}: [3] (id 'x')"]
    assert "gone.png: there is no such image" in found[f"{vl_json}: [4]"]
    assert "nothing of its answer is left within max_length=256" in found[f"{vl_json}: [5]"]


@pytest.mark.parametrize("taken", [True, False])
def test_a_final_save_that_fails_says_where_the_tensors_are(
    words: list[str],
    tmp_path: Path,
    taken: bool,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """A disk that somebody else fills meanwhile: one line, and a status that is not 0."""
    real, calls = Trainer._save, []

    def save(self: Trainer, folder: str, state_dict: Any = None) -> None:
        calls.append(folder)
        if len(calls) > 1:  # the first is the check before the first step
            raise RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 64 vs 0")
        real(self, folder, state_dict)

    monkeypatch.setattr(Trainer, "_save", save)
    if not taken:
        monkeypatch.setattr(saving, "save_file", lambda *_, **__: 1 / 0)
    assert main([*words, "--stage", "cpt", "--save_strategy", "no"]) == 2
    said = capsys.readouterr()
    last = said.err.strip().splitlines()[-1]
    assert last.startswith(
        f"collavo train: error: {tmp_path / 'out'}: could not be saved ([enforce"
    )
    assert "model saved" not in said.out
    found = list((tmp_path / "out").glob("*"))
    if not taken:
        assert "could be written nowhere" in last and not found
        return
    assert f"the trained tensors are in {found[0]}: " in last
    monkeypatch.undo()
    assert main([*words, "--stage", "cpt", "--save_strategy", "no"]) == 0
    whole, trained = load_file(tmp_path / "out/model.safetensors"), load_file(found[0])
    assert trained and all(torch.equal(whole[name], trained[name]) for name in trained)


def test_an_interrupt_of_the_final_save_says_where_the_tensors_are(
    words: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Impatience in the last second lost a finished run, and the folder was left empty."""
    real, calls = Trainer._save, []

    def save(self: Trainer, folder: str, state_dict: Any = None) -> None:
        calls.append(folder)
        real(self, folder, state_dict)
        if len(calls) > 1:  # the first is the check before the first step
            raise KeyboardInterrupt

    monkeypatch.setattr(Trainer, "_save", save)
    assert main([*words, "--stage", "cpt", "--save_strategy", "no"]) == 130
    (found,) = (tmp_path / "out").glob("trained_tensors-*.safetensors")
    assert f"the trained tensors are in {found}: " in capsys.readouterr().err
    assert load_file(found)


def test_prepared_shards_train_the_model_that_the_pngs_train(
    words: list[str], vl_json: Path, coco_folder: Path, tmp_path: Path
) -> None:
    """Both data sets of cit: crayon instructions, and the maps of conversations by image name."""
    start = words.index("--panoptic")
    inputs, shards = words[start : start + 4], str(tmp_path / "shards")
    prepare = ["prepare", "--images", str(coco_folder / "images"), *inputs, "--output", shards]
    assert main([*prepare, "--grid", "2", "--num-images-per-shard", "2", "--no-progress"]) == 0
    images = str(coco_folder / "images")
    cit = ["--stage", "cit", "--vl-data", str(vl_json), "--vl-images", images, "--lora-rank", "4"]
    cit += ["--save_strategy", "no"]
    assert main([*words, *cit]) == 0
    for path in (coco_folder / "panoptic").iterdir():
        path.unlink()  # they are not read again
    plain = words[:start] + words[start + 4 :]
    other = ["--prepared", shards, "--output_dir", str(tmp_path / "prepared")]
    assert main([*plain, *cit, *other]) == 0
    saved = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("out", "prepared")]
    assert saved[0] == saved[1]


def test_prepared_shards_have_to_fit(
    words: list[str], coco_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    start = words.index("--panoptic")
    inputs, shards = words[start : start + 4], str(tmp_path / "shards")
    prepare = ["prepare", "--images", str(coco_folder / "images"), *inputs, "--output", shards]
    assert main([*prepare, "--grid", "3", "--no-progress"]) == 0
    plain = words[:start] + words[start + 4 :]
    for command, message in (
        ([*plain, "--prepared", shards], "was prepared with grid (3, 3), the processor has (2, 2)"),
        ([*words, "--prepared", shards], "--prepared: expected without --panoptic"),
        (plain, "--panoptic: expected with --coco-images"),
    ):
        assert main(command) == 2
        assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["--stage", "cit"], "--vl-data: stage cit draws visual instructions"),
        (["--stage", "cit", "--vl-data", "none.json"], "none.json: there is no such file"),
        (["--model", "no-model"], "no-model: no such model folder"),
        (["--panoptic", "no-folder"], "there is no folder no-folder"),
        (["--resume"], "expected a whole checkpoint-N in"),
        (["--vl_probability", "2"], "vl_probability: expected 0 to 1, got 2.0"),
    ],
)
def test_mistakes_are_one_line_and_nothing_is_written(
    words: list[str],
    changes: list[str],
    message: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main([*words, *changes]) == 2
    error = [line for line in capsys.readouterr().err.splitlines() if line.startswith("collavo")]
    assert len(error) == 1 and message in error[0]
    assert not list((tmp_path / "out").glob("*"))


def test_part_of_the_coco_folder_is_not_enough(
    words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    start = words.index("--panoptic")
    assert main([*words[:start], *words[start + 2 :]]) == 2
    assert "--panoptic: expected with --coco-images" in capsys.readouterr().err


@pytest.mark.parametrize("kind", ["spawn", "forkserver"])
def test_a_limit_that_workers_would_not_know_is_refused(
    words: list[str],
    kind: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Pictures above Pillow's limit would be skipped there as unusable records."""
    monkeypatch.setattr("multiprocessing.get_start_method", lambda: kind)
    monkeypatch.setattr("PIL.Image.MAX_IMAGE_PIXELS", 89478485)  # as before, after the test
    words += ["--stage", "cpt", "--max-pixels", "100000000", "--dataloader_num_workers", "1"]
    assert main(words) == 2
    said = capsys.readouterr().err
    assert "--max-pixels: expected with --dataloader_num_workers 0, or with --da" in said
    assert f"1 workers of kind '{kind}'" in said
