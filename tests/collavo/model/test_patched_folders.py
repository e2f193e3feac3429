"""A LLaVA with the crayon saved and loaded: one call gives the same model, in its 4 bits."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_crayon_model import IMAGE, draw_added, make_batch, make_llava, make_model, make_patched
from transformers import (
    AutoModelForImageTextToText,
    BitsAndBytesConfig,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    MistralConfig,
    Qwen2Config,
)

from collavo import apply_to_llava, load_pretrained
from collavo.loading import load_folder
from collavo.model.llava import CollavoForConditionalGeneration
from collavo.model.patched import CollavoLlavaForConditionalGeneration


def assert_same(found: Any, expected: Any) -> None:
    # A loaded layer has its scaling from the configuration, and no entry that says it again.
    ours, theirs = (
        {k: v for k, v in model.state_dict().items() if ".lora_scaling." not in k}
        for model in (found, expected)
    )
    assert list(ours) == list(theirs)
    for name, value in theirs.items():
        assert ours[name].dtype == value.dtype and torch.equal(ours[name], value), name
    assert torch.equal(found(**make_batch()).logits, expected(**make_batch()).logits)


@pytest.mark.parametrize("quantize", [None, "nf4"])
@pytest.mark.parametrize("mode", ["attention", "projection", "none"])
@pytest.mark.parametrize("kind", [LlamaConfig, MistralConfig, Qwen2Config])
def test_round_trip(tmp_path: Path, kind: Any, mode: str, quantize: str | None) -> None:
    options: dict[str, Any] = {"crayon_mode": mode, "quantize": quantize, "crayon_scaling": 0.5}
    adapters = {"adapters": ("image", "vl"), "image_adapters": ("image",), "lora_rank": 3}
    model = make_patched(make_llava(kind), **options, **adapters, lora_alpha=7.0, crayon_rank=2)
    model.save_pretrained(tmp_path)
    assert model.config.model_type == "llava", "the model itself stays what it is"
    loaded = load_pretrained(tmp_path)
    assert isinstance(loaded, CollavoLlavaForConditionalGeneration)
    assert_same(loaded, model)
    loaded.save_pretrained(tmp_path, max_shard_size="40KB")
    assert_same(AutoModelForImageTextToText.from_pretrained(tmp_path), model)


@pytest.mark.parametrize("adapters", [("image", "vl"), ()])
@pytest.mark.parametrize("kind", ["patched", "collavo"])
def test_what_trains_is_what_trained(tmp_path: Path, kind: str, adapters: tuple[str, ...]) -> None:
    """The base of adapters is frozen: steps after loading would move it without a word."""
    if kind == "patched":
        model = make_patched(make_llava(Qwen2Config), adapters=adapters, lora_rank=2)
    else:
        model = make_model()
        if adapters:
            model.add_dual_qlora(adapters, rank=2, quantize=False)
    model.save_pretrained(tmp_path)
    loaded = load_pretrained(tmp_path)
    trained, again = (
        {name for name, p in each.named_parameters() if p.requires_grad} for each in (model, loaded)
    )
    assert again == trained
    base = "model.language_model.layers.0.mlp.up_proj.weight"
    assert (base in again) == (not adapters)


def test_dtypes_of_the_base_and_of_what_was_added_stay(tmp_path: Path) -> None:
    make_llava().save_pretrained(tmp_path / "base")
    for added in (torch.float32, torch.bfloat16):
        base = LlavaForConditionalGeneration.from_pretrained(
            tmp_path / "base", dtype=torch.bfloat16
        )
        model = make_patched(base, adapters=("vl",), lora_rank=2, adapter_dtype=added)
        model.save_pretrained(tmp_path)
        assert_same(load_pretrained(tmp_path), model)


def test_layers_with_ranks_of_their_own(tmp_path: Path) -> None:
    """A loaded adapter may have another rank and scaling in every layer."""
    model = make_patched(adapters=("vl",), lora_rank=2, quantize="nf4")
    linear = model.model.language_model.layers[1].mlp.up_proj
    for factors, shape in ((linear.lora_A, (5, 32)), (linear.lora_B, (48, 5))):
        factors["vl"].weight = torch.nn.Parameter(torch.randn(shape) * 0.1)
    linear.scaling["vl"] = 0.3
    model.save_pretrained(tmp_path)
    assert_same(load_pretrained(tmp_path), model)


def test_other_classes_refuse_it_by_name(tmp_path: Path) -> None:
    make_patched(adapters=("vl",), quantize="nf4").save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"apply_to_llava changed.*collavo\.load_pretrained"):
        CollavoForConditionalGeneration.from_pretrained(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"processor_config\.json: missing"):
        load_folder(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    for wrong in ({}, None, {"decoder": {"rank": 1}}, {"decoder": {}, "base": [64]}):
        (tmp_path / "config.json").write_text(json.dumps(config | {"crayon": wrong}))
        with pytest.raises(ValueError, match=r"crayon: |tensors have no place"):
            load_pretrained(tmp_path)


def test_a_model_that_was_restored_is_saved_as_a_llava(tmp_path: Path) -> None:
    model = make_llava()
    handle = apply_to_llava(model, adapters=("vl",))
    handle.undo()
    model.save_pretrained(tmp_path)
    loaded = LlavaForConditionalGeneration.from_pretrained(tmp_path)
    assert torch.equal(loaded.lm_head.weight, model.lm_head.weight)
    with pytest.raises(ValueError, match="this is a LLaVA"):
        load_pretrained(tmp_path)


def _in_4_bits(folder: Path, **options: Any) -> Any:
    # bitsandbytes' CPU kernels want widths that are multiples of its blocks.
    vision = CLIPVisionConfig(
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        image_size=8,
        patch_size=4,
    )
    text = LlamaConfig(
        vocab_size=32,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        pad_token_id=0,
    )
    torch.manual_seed(1)
    config = LlavaConfig(
        vision_config=vision, text_config=text, image_token_index=IMAGE, vision_feature_layer=-1
    )
    LlavaForConditionalGeneration(config).save_pretrained(folder)
    asked = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", **options)
    model = LlavaForConditionalGeneration.from_pretrained(
        folder, quantization_config=asked, device_map={"": "cpu"}, dtype=torch.float32
    )
    apply_to_llava(model, adapters=("vl",), lora_rank=2)
    draw_added(model)
    return model


@pytest.mark.parametrize("storage", [torch.uint8, torch.bfloat16])
@pytest.mark.parametrize(
    "skipped",
    [
        None,
        ["lm_head", "model.language_model.layers.1"],
        ["vision_tower", "multi_modal_projector", "lm_head"],
    ],
)
def test_a_llava_that_bitsandbytes_quantised(
    tmp_path: Path, skipped: list[str] | None, storage: torch.dtype
) -> None:
    """Tower and projector, if they were in 4 bits, come back dense with the same values."""
    pytest.importorskip("bitsandbytes")
    options = {"llm_int8_skip_modules": skipped, "bnb_4bit_quant_storage": storage}
    model = _in_4_bits(tmp_path / "base", **options)
    model.save_pretrained(tmp_path)
    loaded = load_pretrained(tmp_path)
    # With a gradient bitsandbytes does not take its CPU kernel, which rounds scales.
    batch = make_batch()
    batch["pixel_values"].requires_grad_(True)
    assert torch.equal(loaded(**batch).logits, model(**batch).logits)
    layers = loaded.model.language_model.layers
    dense = skipped is not None and "layers.1" in skipped[1]
    assert layers[0].mlp.up_proj.quantized and layers[1].mlp.up_proj.quantized != dense


def test_layers_that_could_not_be_read_back_are_named_when_saving(tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    model = _in_4_bits(tmp_path / "base")
    tower = model.model.vision_tower
    tower = getattr(tower, "vision_model", tower)  # before transformers 5.6
    tower.encoder.layers[0].mlp.fc1.weight.quant_state.quant_type = "fp4"
    with pytest.raises(ValueError, match=r"fc1: expected dense .*got Linear4bit in fp4"):
        model.save_pretrained(tmp_path)
    assert not (tmp_path / "config.json").exists()


@pytest.mark.parametrize(
    ("place", "value"),
    [
        (("crayon", "decoder", "crayon_rank"), "2"),
        (("crayon", "decoder", "adapter_dtype"), "nf4"),
        (("crayon", "num_crayon_classes"), None),
        (("base_config", "text_config", "hidden_size"), []),
    ],
)
def test_a_configuration_with_fields_of_another_kind_is_named(
    tmp_path: Path, place: tuple[str, ...], value: Any
) -> None:
    make_patched(adapters=("vl",), lora_rank=2).save_pretrained(tmp_path)
    values = json.loads((tmp_path / "config.json").read_text())
    part = values
    for name in place[:-1]:
        part = part[name]
    part[place[-1]] = value
    (tmp_path / "config.json").write_text(json.dumps(values))
    with pytest.raises(ValueError, match=r"config\.json: a field is of another kind"):
        load_pretrained(tmp_path)
