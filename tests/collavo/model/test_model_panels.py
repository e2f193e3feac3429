"""Whole models whose 4-bit codes lie in panels: folders, generation, drawing, and taking it out."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from test_model_folders import assert_same_state
from tiny import tiny_vision
from tiny_crayon_model import IMAGE, make_batch, make_model
from torch import nn
from transformers import LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

from collavo import apply_to_llava, load_pretrained
from collavo.model.layer import decoder_linears
from collavo.model.linear import CollavoLinear
from collavo_kernels import NF4Weight
from collavo_kernels._native import native

pytestmark = pytest.mark.skipif(native() is None, reason="needs the compiled CPU kernels")

# Rows of 64 and more, so that every linear layer of the decoder can lie in panels.
WIDE = {"hidden_size": 64, "intermediate_size": 128}


def make_wide(**options: Any) -> Any:
    return make_model(text=WIDE, quantize="nf4", adapters=("image", "vl"), **options)


def orders(model: nn.Module) -> set[bool]:
    """Return which orders occur: whether in panels."""
    bases = [m.base() for m in model.modules() if isinstance(m, CollavoLinear)]
    return {base.in_panels for base in bases if isinstance(base, NF4Weight)}


@pytest.mark.parametrize("mode", ["attention", "projection"])
def test_a_model_that_has_run_is_saved_byte_for_byte(tmp_path: Path, mode: str) -> None:
    model, batch = make_wide(crayon_mode=mode), make_batch()
    model.save_pretrained(tmp_path / "before")
    logits = model(**batch).logits
    assert orders(model) == {True}
    model.save_pretrained(tmp_path / "after")
    assert orders(model) == {True}
    before, after = (tmp_path / name / "model.safetensors" for name in ("before", "after"))
    assert before.read_bytes() == after.read_bytes()
    loaded = load_pretrained(tmp_path / "after")
    assert orders(loaded) == {False}
    assert_same_state(loaded, model)
    assert torch.equal(loaded(**batch).logits, logits)
    loaded.init_weights()
    assert_same_state(loaded, model)


def test_loading_into_a_model_that_has_run() -> None:
    first, second, batch = make_wide(), make_wide(trained=False), make_batch()
    second(**batch)
    second.load_state_dict(first.state_dict())
    assert_same_state(second, first)
    assert torch.equal(second(**batch).logits, first(**batch).logits)
    assert orders(second) == {True}


def test_generation_packs_and_training_goes_on() -> None:
    model, batch = make_wide(), make_batch()
    twin = copy.deepcopy(model)
    options: Any = {"do_sample": False, "max_new_tokens": 3, "suppress_tokens": [IMAGE]}
    tokens = model.generate(**batch, **options)
    assert orders(model) == {True} and orders(twin) == {False}
    assert torch.equal(twin.generate(**batch, **options), tokens)
    model.train()(**batch, labels=batch["input_ids"]).loss.backward()
    assert all(p.grad is not None for p in model.adapter_parameters("image"))
    assert torch.equal(copy.deepcopy(model).eval().generate(**batch, **options), tokens)


def test_more_adapters_on_packed_layers() -> None:
    model = make_model(text=WIDE).add_dual_qlora(("image",), rank=4)
    batch = make_batch()
    logits = model(**batch).logits
    model.add_dual_qlora(("vl",), rank=2)
    assert orders(model) == {True}
    assert torch.equal(model(**batch).logits, logits)


def test_drawing_a_packed_base_anew() -> None:
    layer = CollavoLinear(64, 32, adapters=())
    fresh = copy.deepcopy(layer)
    for each in (layer.pack(), fresh):
        torch.manual_seed(7)
        each.draw_base(0.1)
    assert torch.equal(layer.weight, fresh.weight)
    layer.weight._is_hf_initialized = True  # type: ignore[attr-defined]
    before = layer.state_dict()["weight"].clone()
    layer.pack().draw_base(0.1)
    assert torch.equal(layer.state_dict()["weight"], before), "a checkpoint brought it"


def make_wide_llava(four_bit: bool) -> Any:
    sizes: Any = {"vocab_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = LlavaConfig(
        vision_config=tiny_vision(),
        text_config=LlamaConfig(**WIDE, **sizes, num_key_value_heads=2, pad_token_id=0),
        image_token_index=IMAGE,
        vision_feature_layer=-1,
    )
    torch.manual_seed(4)
    model = LlavaForConditionalGeneration(config).eval()
    if four_bit:
        bnb = pytest.importorskip("bitsandbytes")
        for layer in model.model.language_model.layers:
            for parent, name in decoder_linears(layer):
                dense = getattr(parent, name)
                made = bnb.nn.Linear4bit(*dense.weight.shape[::-1], bias=False, quant_type="nf4")
                made.load_state_dict(dense.state_dict())
                setattr(parent, name, made.to("cpu").eval())
    return model


@pytest.mark.parametrize("four_bit", [False, True])
def test_undo_after_the_layers_have_packed(four_bit: bool) -> None:
    model, batch = make_wide_llava(four_bit), make_batch()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    held = [(name, id(p), p.requires_grad) for name, p in model.named_parameters()]
    handle = apply_to_llava(model, adapters=("image", "vl"), lora_rank=4, quantize="nf4")
    applied = {name: value.clone() for name, value in model.state_dict().items()}
    added = handle.added_state_dict()
    logits = model(**batch).logits
    assert orders(model) == {True}
    assert all(torch.equal(applied[name], value) for name, value in model.state_dict().items())
    assert list(handle.added_state_dict()) == list(added)
    assert torch.equal(model(**batch).logits, logits)
    handle.undo()
    after = model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], value) for name, value in before.items())
    assert held == [(name, id(p), p.requires_grad) for name, p in model.named_parameters()]
