"""Patched models of every family saved and loaded: the same class, configuration and bits."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_crayon_model import draw_added
from tiny_families import make_family, make_inputs
from transformers import AutoConfig, AutoModelForImageTextToText

from collavo import apply_to_llava, load_pretrained
from collavo.configuration import CollavoLlavaConfig

FAMILIES = ("llava_next", "llava_onevision", "video_llava", "mistral3", "internvl", "idefics3")


@pytest.mark.parametrize("name", FAMILIES)
def test_a_family_comes_back(tmp_path: Path, name: str) -> None:
    model: Any = make_family(name)
    family = type(model)
    adapters: dict[str, Any] = {"adapters": ("image", "vl"), "image_adapters": ("image",)}
    apply_to_llava(model, quantize="nf4", lora_rank=2, **adapters)
    draw_added(model)
    model.save_pretrained(tmp_path)
    saved = AutoConfig.from_pretrained(tmp_path)
    assert isinstance(saved, CollavoLlavaConfig)
    assert saved.base().model_type == model.config.model_type
    loaded = load_pretrained(tmp_path)
    assert isinstance(loaded, family) and type(loaded.config) is type(model.config)
    ours, theirs = loaded.state_dict(), model.state_dict()
    assert list(ours) == list(theirs)
    for key, value in theirs.items():
        assert ours[key].dtype == value.dtype and torch.equal(ours[key], value), key
    pickled = pickle.loads(pickle.dumps(loaded))  # before a forward: its hooks do not pickle
    inputs = make_inputs(name, [1, 2])
    expected = model(**inputs).logits
    again: Any = AutoModelForImageTextToText.from_pretrained(tmp_path)
    again.save_pretrained(tmp_path / "again")
    for each in (loaded, pickled, again, load_pretrained(tmp_path / "again")):
        assert torch.equal(each(**inputs).logits, expected)


def test_a_family_that_is_none_is_named(tmp_path: Path) -> None:
    model: Any = make_family("llava_next")
    apply_to_llava(model)
    model.save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    values = json.loads(path.read_text())
    for wrong in ({"model_type": "llava_of_2031"}, {}, None, {"model_type": "llama"}):
        path.write_text(json.dumps(values | {"base_config": wrong}))
        with pytest.raises(ValueError, match="base_config: expected the configuration of a vision"):
            load_pretrained(tmp_path)
