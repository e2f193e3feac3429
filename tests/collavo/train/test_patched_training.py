"""A LLaVA that ``apply_to_llava`` changed, in the trainer and the commands: one kind of folder."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny import tiny_vision
from tiny_collavo import CELLS, IMAGE_TOKEN, VOCABULARY, CollavoRecords
from transformers import LlavaConfig, LlavaForConditionalGeneration, Qwen3Config

from collavo import apply_to_llava, load_pretrained
from collavo.cli import main
from collavo.model.patched import CollavoLlavaForConditionalGeneration
from collavo.train.arguments import CollavoTrainingArguments
from collavo.train.stages import prepare_stage
from collavo.train.trainer import CollavoTrainer


def make_patched(vocabulary: int = VOCABULARY, image: int = IMAGE_TOKEN, **options: Any) -> Any:
    torch.manual_seed(5)
    text = Qwen3Config(
        vocab_size=vocabulary,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    config = LlavaConfig(
        vision_config=tiny_vision(),
        text_config=text,
        image_token_index=image,
        vision_feature_layer=-1,
    )
    model: Any = LlavaForConditionalGeneration(config)
    handle = apply_to_llava(model, **options)
    for name, parameter in model.named_parameters():
        if "crayon" in name or "lora_" in name:
            parameter.data.normal_(0.0, 0.2)
    return handle


def train(model: Any, folder: Path, resume: Any = None, **options: Any) -> CollavoTrainer:
    settings: dict[str, Any] = {
        "stage": "cit",
        "max_steps": 4,
        "save_steps": 2,
        "per_device_train_batch_size": 2,
        "learning_rate": 0.05,
        "use_cpu": True,
        "disable_tqdm": True,
        "report_to": "none",
        **options,
    }
    args = CollavoTrainingArguments(output_dir=str(folder), **settings)
    trainer = CollavoTrainer(model, args, CollavoRecords("image"), CollavoRecords("vl"))
    trainer.train(resume_from_checkpoint=resume)
    trainer.save_model()
    return trainer


@pytest.mark.parametrize("quantize", [None, "nf4"])
def test_every_save_of_the_trainer_is_the_models_folder(tmp_path: Path, quantize: Any) -> None:
    """Straight through, resumed, and begun from a checkpoint's folder: the same bits."""
    assert CELLS == 4
    options: dict[str, Any] = {"adapters": ("image", "vl"), "lora_rank": 2, "quantize": quantize}
    model = make_patched(**options).model
    train(model, tmp_path / "run")
    final = load_file(tmp_path / "run" / "model.safetensors")
    for folder in (tmp_path / "run", tmp_path / "run" / "checkpoint-4"):
        loaded = load_pretrained(folder)
        assert isinstance(loaded, CollavoLlavaForConditionalGeneration)
        own = {k: v for k, v in loaded.state_dict().items() if ".lora_scaling." not in k}
        assert own.keys() == {k for k in final if ".lora_scaling." not in k}
        assert all(torch.equal(value, final[name]) for name, value in own.items())

    # A new model, and one that a checkpoint gave, go on where the run was.
    for begun in (make_patched(**options).model, load_pretrained(tmp_path / "run/checkpoint-2")):
        train(begun, tmp_path / "again", str(tmp_path / "run" / "checkpoint-2"))
        again = load_file(tmp_path / "again" / "model.safetensors")
        assert again.keys() == final.keys()
        assert all(torch.equal(again[name], value) for name, value in final.items())


def test_commands_read_a_handles_folder(
    tmp_path: Path,
    tiny_processor: Callable[..., Any],
    coco_folder: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """``chat``, ``eval`` and both stages of ``train``, which adds adapters and 4 bits for cit."""
    processor = tiny_processor(grid=(2, 2), image_size=8)
    handle = make_patched(len(processor.tokenizer), processor.image_token_id)
    handle.model.generation_config.suppress_tokens = [processor.image_token_id, 2]
    folder = tmp_path / "model"
    with pytest.raises(TypeError, match="processor: expected a CollavoProcessor"):
        handle.save_pretrained(folder, processor.tokenizer)
    handle.save_pretrained(folder, processor)
    image = coco_folder / "images" / "001.png"
    maps = ["--panoptic", str(coco_folder / "panoptic" / "001.png")]
    listed = ["--annotations", str(coco_folder / "panoptic.json")]
    asked = ["--question", "Is there a person?", "--max-new-tokens", "3"]
    words = ["--model", str(folder), *listed]
    assert main(["chat", *words, "--image", str(image), *maps, *asked]) == 0
    assert capsys.readouterr().out.strip()

    folders = ["--images", str(coco_folder / "images"), "--panoptic", str(coco_folder / "panoptic")]
    scores = ["--output", str(tmp_path / "scores.json"), "--limit", "1", "--tasks", "b2c"]
    assert main(["eval", *words, *folders, *scores, "--max-new-tokens", "2", "--no-progress"]) == 0
    assert set(json.loads((tmp_path / "scores.json").read_text())["crayon"]) == {"on", "off"}

    folders = ["--coco-images", *folders[1:], "--use_cpu", "--max_steps", "1"]
    folders += ["--per_device_train_batch_size", "2", "--save_strategy", "no"]
    stage = ["--stage", "cpt", "--output_dir", str(tmp_path / "cpt")]
    assert main(["train", *words, *folders, *stage]) == 0
    words[1] = str(tmp_path / "cpt")
    stage = ["--stage", "cit", "--output_dir", str(tmp_path / "cit"), "--vl_probability", "0"]
    assert main(["train", *words, *folders, *stage, "--lora-rank", "2"]) == 0
    loaded: Any = load_pretrained(tmp_path / "cit")
    assert loaded.decoder_settings().adapters == ("image", "vl")
    assert loaded.decoder_settings().quantize == "nf4"


def test_adapters_may_come_later_and_go_with_the_rest() -> None:
    """What ``add_dual_qlora`` puts into a patched model leaves with ``undo``."""
    handle = make_patched()
    stock = {name: value.clone() for name, value in handle.undo().state_dict().items()}
    handle = apply_to_llava(handle.model)
    handle.model.add_dual_qlora(("image",), rank=2)
    with pytest.raises(ValueError, match="image"):
        handle.model.add_dual_qlora(("image",), rank=2)
    assert handle.model.adapter_parameters("image")
    after = handle.undo().state_dict()
    assert list(after) == list(stock)
    assert all(torch.equal(after[name], value) for name, value in stock.items())


def test_undo_after_training_leaves_what_was_kept_its_dtype() -> None:
    """Training makes float32 of the projector, which is no cast of the model; a cast is one."""
    for dtype in (torch.bfloat16, torch.float16):
        model = make_patched().undo().to(torch.bfloat16)
        before = {name: value.clone() for name, value in model.state_dict().items()}
        handle = apply_to_llava(model, quantize="nf4")
        prepare_stage(model, "align")
        if dtype != torch.bfloat16:
            model.to(dtype)
        after = handle.undo().state_dict()
        assert before.keys() == after.keys()
        for name, value in before.items():
            if "projector" not in name:
                assert after[name].dtype == dtype, name
                assert torch.equal(after[name], value.to(dtype)), name
