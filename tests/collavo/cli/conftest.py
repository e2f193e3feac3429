"""A model folder for the tests of the commands."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import tiny_vision

from collavo.configuration import CollavoConfig
from collavo.model.llava import CollavoForConditionalGeneration


@pytest.fixture(scope="session")
def model_folder(
    tmp_path_factory: pytest.TempPathFactory, tiny_processor: Callable[..., Any]
) -> Path:
    """A model with random weights that always says something, and its processor."""
    processor = tiny_processor(texts=["How many horses are there ?"])
    tokenizer = processor.tokenizer
    vision = tiny_vision(16)
    text = {
        "vocab_size": len(tokenizer),
        "hidden_size": 32,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
    }
    config = CollavoConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        vision_feature_layer=-1,
    )
    torch.manual_seed(2)
    folder = tmp_path_factory.mktemp("command") / "model"
    model = CollavoForConditionalGeneration(config)
    for parameter in model.parameters():
        parameter.data.add_(torch.randn_like(parameter), alpha=0.2)
    model.generation_config.suppress_tokens = [config.image_token_index, text["eos_token_id"]]
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


@pytest.fixture(autouse=True)
def current_folder(
    tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Path]:
    """Run each command in an empty folder, and see that it leaves nothing there unasked."""
    folder = tmp_path_factory.mktemp("current")
    monkeypatch.chdir(folder)
    yield folder
    left = [path.name for path in folder.iterdir()]
    assert not left, f"left in the current folder: {left}"
