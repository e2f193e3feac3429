"""``collavo train --save-trained-only --export``: what a user finds, and what resumes it."""

from __future__ import annotations

import json
import re
import shutil
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


@pytest.fixture
def words(tmp_path: Path, tiny_processor: Callable[..., Any]) -> list[str]:
    processor = tiny_processor(grid=(2, 2), image_size=8)
    model = make_collavo("none", adapters=False, vocabulary=len(processor.tokenizer))
    model.config.image_token_index = processor.image_token_id
    model.save_pretrained(tmp_path / "model")
    processor.save_pretrained(tmp_path / "model")
    for color in ("red", "blue", "green"):
        Image.new("RGB", (8, 8), color).save(tmp_path / f"{color}.png")
    answers = {"red": "a horse", "blue": "yes", "green": "a horse"}
    records = [
        {
            "image": f"{color}.png",
            "conversations": [
                {"from": "human", "value": "<image>\\nWhat is in this picture?"},
                {"from": "gpt", "value": answer},
            ],
        }
        for color, answer in answers.items()
    ]
    (tmp_path / "data.json").write_text(json.dumps(records))
    options = {
        "--model": tmp_path / "model",
        "--stage": "instruct",
        "--data": tmp_path / "data.json",
        "--eval-data": tmp_path / "data.json",
        "--images": tmp_path,
        "--output_dir": tmp_path / "out",
        "--adapters": "instruct",
        "--lora-rank": 4,
        "--quantize": "nf4",
        "--max_steps": 4,
        "--global_batch": 2,
        "--save_steps": 2,
        "--logging_steps": 1,
        "--eval_strategy": "steps",
        "--eval_steps": 2,
        "--export": tmp_path / "exported",
    }
    line = [str(word) for pair in options.items() for word in pair]
    return ["train", "--use_cpu", "--save-trained-only", *line]


def test_trained_only_resumed_and_exported(words: list[str], tmp_path: Path) -> None:
    """An NF4 decoder with adapters: a checkpoint is a few kB, and projector and adapters resume."""
    assert main(words) == 0
    out, exported = tmp_path / "out", tmp_path / "exported"
    model, _ = load_folder(exported)
    assert (exported / "adapters/instruct/adapter_model.safetensors").is_file()
    projector = torch.load(exported / "mm_projector.bin", weights_only=True)
    own = dict(model.named_parameters())
    assert torch.equal(
        projector["model.mm_projector.0.weight"],
        own["model.multi_modal_projector.linear_1.weight"],
    )
    state = json.loads((out / "checkpoint-4/trainer_state.json").read_text())
    assert [log["step"] for log in state["log_history"] if "eval_loss" in log] == [2, 4]
    trained = load_file(out / "checkpoint-2/trained_tensors.safetensors")
    assert {name.split(".")[1] for name in trained} == {"multi_modal_projector", "language_model"}
    final = load_file(out / "model.safetensors")
    shutil.rmtree(out / "checkpoint-4")
    shutil.rmtree(exported)
    assert main([*words, "--resume"]) == 0
    again = load_file(out / "model.safetensors")
    assert final.keys() == again.keys()
    assert all(torch.equal(value, again[name]) for name, value in final.items())
    assert (exported / "mm_projector.bin").is_file()

    middle = ["--resume_from_checkpoint", str(out / "checkpoint-2"), "--max_steps", "2"]
    middle += ["--output_dir", str(tmp_path / "middle"), "--export", str(tmp_path / "two")]
    assert main([*words, *middle]) == 0
    two = load_file(tmp_path / "two/model.safetensors")
    assert all(torch.equal(value, two[name]) for name, value in trained.items())


OTHERS = [
    (["--seed", "7"], "stream_seed: the checkpoint"),
    (["--template", "plain"], "processor: the checkpoint"),
    (["--lora-rank", "2"], "adapter_sizes: .*rank 4.*rank 2"),
    (["--lora-alpha", "64"], "adapter_sizes: .*alpha 256.*alpha 64"),
    (["--adapters", "other"], "adapters: the checkpoint"),
    (["--data", "other.json"], "records: the checkpoint"),
    (["--bf16", "false"], "precision: the checkpoint"),
    (["--learning_rate", "0.1"], "learning_rate: .*0.0002, this run has 0.1"),
    (["--projector_learning_rate", "0.1"], "projector_learning_rate: .*2e-05, this run has 0.1"),
    (["--preset", "llava-1.5-lora"], r"image_processor\.size: .* this run has"),
    (["--adam_beta2", "0.9"], "adam_beta2: .* this run has 0.9"),
    (["--optim", "sgd"], "optim: .* this run has 'sgd'"),
    (["--parts", "adapters"], r"parts: the checkpoint .* this run has \['adapters'\]"),
]


def test_another_run_is_refused_by_name(
    words: list[str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Records whose answers have other words and the same lengths are another run's too."""
    monkeypatch.chdir(tmp_path)
    words = [word for word in words if word != "--export"][:-1]
    assert main([*words, "--max_steps", "3"]) == 0
    shutil.rmtree(tmp_path / "out/checkpoint-3")  # the last one is whole
    records = (tmp_path / "data.json").read_text().replace("horse", "dog")
    (tmp_path / "other.json").write_text(records)
    for change, message in OTHERS:
        capsys.readouterr()
        assert main([*words, "--resume", *change]) != 0
        assert re.search(message, capsys.readouterr().err), change
    assert not (tmp_path / "out/checkpoint-4").exists()
