"""Adapters that PEFT trained, in a model: every way of saving it brings equal logits back."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_apply_to_llava import (
    IMAGE,
    SIZES,
    assert_same,
    make_batch,
    make_llava,
    plain,
    snapshot,
)
from tiny_crayon_model import make_model
from transformers import (
    BitsAndBytesConfig,
    LlavaForConditionalGeneration,
    Trainer,
    TrainingArguments,
)

from collavo import apply_to_llava, load_pretrained
from collavo.configuration import CollavoConfig
from collavo.model.llava import CollavoForConditionalGeneration
from collavo.train.checkpoint import check_weights
from collavo_kernels.nn import load_peft_adapter, save_peft_adapter

peft = pytest.importorskip("peft")
pytestmark = pytest.mark.usefixtures("one_thread")

TARGETS = r".*language_model.*\.(q|v|up)_proj"
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {"r": 4, "lora_alpha": 6},
    "rslora": {"r": 4, "lora_alpha": 6, "use_rslora": True},
    "odd rank": {"r": 7, "lora_alpha": 5},
    "patterns": {
        "r": 3,
        "lora_alpha": 2,
        "use_rslora": True,
        "rank_pattern": {"q_proj": 5, r"layers\.1\.mlp\.up_proj": 9},
        "alpha_pattern": {r"layers\.0\..*v_proj": 0.7},
    },
}


def draw(model: torch.nn.Module) -> None:
    generator = torch.Generator().manual_seed(5)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)


def peft_folder(folder: Path, **options: Any) -> torch.Tensor:
    """Save a drawn adapter on a stock LLaVA; return its logits."""
    config = peft.LoraConfig(**{"target_modules": TARGETS, **options})
    model = peft.get_peft_model(make_llava("llama"), config).eval()
    draw(model)
    model.save_pretrained(folder)
    return logits(model)


def logits(model: Any) -> torch.Tensor:
    batch = plain(make_batch())
    with torch.no_grad():
        return model(**batch).logits[batch["attention_mask"].bool()]  # type: ignore[no-any-return]


@pytest.fixture(params=list(OPTIONS))
def options(request: pytest.FixtureRequest) -> Iterator[dict[str, Any]]:
    return OPTIONS[request.param]


@pytest.mark.parametrize("quantize", [None, "nf4"])
def test_a_whole_model(tmp_path: Path, options: dict[str, Any], quantize: str | None) -> None:
    llava = make_llava("llama")
    config = CollavoConfig(
        vision_config=llava.config.vision_config,
        text_config=SIZES,
        image_token_index=IMAGE,
        vision_feature_layer=-1,
        adapters=("image", "vl"),
        lora_rank=4,
    )
    model = CollavoForConditionalGeneration(config).eval()
    model.load_state_dict(llava.state_dict(), strict=False)
    if quantize:
        model.add_dual_qlora((), quantize=True)
    expected = peft_folder(tmp_path / "peft", **options)
    load_peft_adapter(model, tmp_path / "peft", "vl")
    found = logits(model)
    if quantize is None:
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    model.save_pretrained(tmp_path / "whole", max_shard_size="20KB")
    loaded = load_pretrained(tmp_path / "whole")
    assert torch.equal(logits(loaded), found)
    check_weights(tmp_path / "whole", loaded)
    check_weights(tmp_path / "whole", model)
    loaded.save_pretrained(tmp_path / "again")
    assert torch.equal(logits(load_pretrained(tmp_path / "again")), found)
    loaded.add_dual_qlora(("third",), rank=2, quantize=False)
    loaded.save_pretrained(tmp_path / "third")
    assert torch.equal(logits(load_pretrained(tmp_path / "third")), found)


def test_what_was_added_to_a_llava_and_its_state(tmp_path: Path, options: dict[str, Any]) -> None:
    expected = peft_folder(tmp_path / "peft", **options)
    first, *others = (make_llava("llama") for _ in range(3))
    handle, *_ = (
        apply_to_llava(model, adapters=("image", "vl"), lora_rank=4) for model in (first, *others)
    )
    load_peft_adapter(first, tmp_path / "peft", "vl")
    found = logits(first)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    save_file(handle.added_state_dict(), tmp_path / "added.safetensors")
    result = others[0].load_state_dict(load_file(tmp_path / "added.safetensors"), strict=False)
    assert not result.unexpected_keys
    assert torch.equal(logits(others[0]), found)
    others[1].load_state_dict(first.state_dict(), strict=True)
    assert torch.equal(logits(others[1]), found)


def test_a_peft_folder_of_ours_in_peft(tmp_path: Path, options: dict[str, Any]) -> None:
    expected = peft_folder(tmp_path / "peft", **options)
    model = make_llava("llama")
    apply_to_llava(model, adapters=("vl",), lora_rank=2)
    load_peft_adapter(model, tmp_path / "peft", "vl")
    save_peft_adapter(model, tmp_path / "ours", "vl")
    theirs = peft.PeftModel.from_pretrained(make_llava("llama"), tmp_path / "ours")
    torch.testing.assert_close(logits(theirs), expected, rtol=1e-5, atol=1e-5)
    back = make_llava("llama")
    apply_to_llava(back, adapters=("vl",), lora_rank=5)
    load_peft_adapter(back, tmp_path / "ours", "vl")
    assert torch.equal(logits(back), logits(model))


@pytest.mark.parametrize("layout", ["language_model.model.", "model."])
def test_adapters_of_older_llavas(tmp_path: Path, layout: str) -> None:
    expected = peft_folder(tmp_path, r=4, lora_alpha=6)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    # The original repository names ends of layers, which are those of the vision tower too.
    config["target_modules"] = ["q_proj", "v_proj", "up_proj"]
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    file = tmp_path / "adapter_model.safetensors"
    new, old = "base_model.model.model.language_model.", f"base_model.model.{layout}"
    save_file({old + k.removeprefix(new): v for k, v in load_file(file).items()}, file)
    model = make_llava("llama")
    apply_to_llava(model, adapters=("image", "vl"), lora_rank=4)
    load_peft_adapter(model, tmp_path, "vl")
    torch.testing.assert_close(logits(model), expected, rtol=1e-4, atol=1e-4)


def test_a_model_and_its_adapter_in_one_folder(tmp_path: Path) -> None:
    """transformers sees the adapter's settings and would load it onto the model a second time."""
    model = make_model(adapters=("image", "vl"))
    model.save_pretrained(tmp_path)
    save_peft_adapter(model, tmp_path, "vl")
    assert torch.equal(logits(load_pretrained(tmp_path)), logits(model))


def test_image_adapters_are_no_adapters_of_peft(tmp_path: Path) -> None:
    model = make_model(adapters=("image", "vl"), image_adapters=("image",))
    with pytest.raises(ValueError, match="slot: 'image' acts on image tokens alone"):
        save_peft_adapter(model, tmp_path, "image")
    save_peft_adapter(model, tmp_path, "vl")
    llava = make_llava("llama")
    apply_to_llava(llava, adapters=("image",), image_adapters=("image",), lora_rank=4)
    with pytest.raises(ValueError, match="slot: 'image' acts on image tokens alone"):
        load_peft_adapter(llava, tmp_path, "image")


@pytest.mark.parametrize("way", ["PeftModel", "the model inside", "load_adapter"])
def test_adapters_that_peft_has_on_become_slots(tmp_path: Path, way: str) -> None:
    expected = peft_folder(tmp_path, **OPTIONS["patterns"])
    wrapped = model = make_llava("llama")
    if way == "load_adapter":
        model.load_adapter(tmp_path)
    else:
        wrapped = peft.PeftModel.from_pretrained(model, tmp_path)
    assert torch.equal(logits(wrapped), expected)  # transformers' hooks are there from then on
    before = snapshot(model)
    handle = apply_to_llava(wrapped if way == "PeftModel" else model, adapters=("vl",), lora_rank=2)
    assert handle.model is model
    assert len(list(model.adapter_parameters("default"))) == 2 * 7 * 2
    for found in (logits(model), logits(wrapped)):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    for parameter in model.crayon_parameters():
        parameter.data.normal_(0.0, 0.3)
    batch = make_batch()
    with torch.no_grad():
        crayon = wrapped(**batch).logits[batch["attention_mask"].bool()]
    assert not torch.allclose(crayon, expected, atol=1e-3)
    handle.undo()
    assert_same(before, snapshot(model))
    assert torch.equal(logits(wrapped), expected)


def test_a_peft_model_around_a_patched_one_refuses_what_would_be_empty(tmp_path: Path) -> None:
    """PEFT finds no layer of its own then: it would save no tensor, and merge or switch none."""
    config = peft.LoraConfig(r=2, target_modules=TARGETS, init_lora_weights=False)
    wrapped = peft.get_peft_model(make_llava("llama"), config).eval()
    wrapped.add_adapter("two", config)
    expected, kinds = logits(wrapped), (type(wrapped), type(wrapped.base_model))
    with pytest.warns(UserWarning, match=r"train and save get_base_model\(\)"):
        handle = apply_to_llava(wrapped)
    calls: dict[str, tuple[Any, ...]] = {
        "save_pretrained": (tmp_path / "peft",),
        "set_adapter": ("two",),
        "load_adapter": (tmp_path, "three"),
        "add_adapter": ("three", config),
        "delete_adapter": ("two",),
        "disable_adapter": (),
        "merge_adapter": (),
        "unmerge_adapter": (),
        "merge_and_unload": (),
        "unload": (),
    }
    for name, arguments in calls.items():
        for owner in (wrapped, wrapped.base_model):
            if owner is wrapped or hasattr(kinds[1], name):
                with pytest.raises(ValueError, match=rf"^{name}: .*save_peft_adapter.*undo\(\)"):
                    getattr(owner, name)(*arguments)
    assert not (tmp_path / "peft").exists()
    # The ways that the message names.
    wrapped.get_base_model().save_pretrained(tmp_path / "whole")
    torch.testing.assert_close(
        logits(load_pretrained(tmp_path / "whole")), expected, rtol=1e-4, atol=1e-4
    )
    save_peft_adapter(wrapped.get_base_model(), tmp_path / "one", "default")
    again = peft.PeftModel.from_pretrained(make_llava("llama"), tmp_path / "one")
    torch.testing.assert_close(logits(again), expected, rtol=1e-4, atol=1e-4)
    handle.undo()
    assert kinds == (type(wrapped), type(wrapped.base_model))
    wrapped.save_pretrained(tmp_path / "peft")
    assert load_file(tmp_path / "peft" / "adapter_model.safetensors")
    wrapped.set_adapter("two")
    assert not torch.allclose(logits(wrapped), expected, atol=1e-3)


def test_a_peft_model_with_layers_outside_the_decoder_alone_still_saves(tmp_path: Path) -> None:
    config = peft.LoraConfig(r=2, target_modules=r".*vision_tower.*q_proj")
    wrapped = peft.get_peft_model(make_llava("llama"), config)
    apply_to_llava(wrapped)
    wrapped.save_pretrained(tmp_path)
    assert load_file(tmp_path / "adapter_model.safetensors")


def test_a_model_with_transformers_own_adapter_is_saved_whole(tmp_path: Path) -> None:
    """transformers saves such a model's adapters alone, and looks for layers of PEFT's."""
    model = make_llava("llama")
    model.add_adapter(peft.LoraConfig(r=2, target_modules=TARGETS), "mine")
    draw(model)
    handle = apply_to_llava(model)
    found = logits(model)
    model.save_pretrained(tmp_path / "direct")
    arguments = TrainingArguments(tmp_path / "runs", report_to=[], use_cpu=True)
    Trainer(model, arguments).save_model(str(tmp_path / "trainer"))
    for folder in ("direct", "trainer"):
        assert torch.equal(logits(load_pretrained(tmp_path / folder)), found)
    handle.undo()
    model.save_pretrained(tmp_path / "adapter")
    again = make_llava("llama")
    again.load_adapter(tmp_path / "adapter")
    assert torch.equal(logits(again), logits(model))


def four_bit_llava() -> Any:
    bnb = pytest.importorskip("bitsandbytes")
    model = make_llava("llama").train()  # in eval mode bitsandbytes' layers repack themselves
    for layer in model.model.language_model.layers:
        for name in ("gate_proj", "up_proj", "down_proj"):
            dense = getattr(layer.mlp, name)
            four = bnb.nn.Linear4bit(
                dense.in_features, dense.out_features, bias=False, quant_type="nf4"
            )
            four.load_state_dict(dense.state_dict())
            setattr(layer.mlp, name, four.to("cpu"))
    model.is_loaded_in_4bit = True  # where PEFT asks whether to make its 4-bit layers
    return model


def test_a_peft_adapter_on_four_bits_becomes_a_slot(tmp_path: Path) -> None:
    config = peft.LoraConfig(r=2, target_modules=TARGETS, init_lora_weights=False)
    wrapped, other = peft.get_peft_model(four_bit_llava(), config), four_bit_llava()
    wrapped.save_pretrained(tmp_path)
    layer = wrapped.base_model.model.model.language_model.layers[0].mlp
    assert type(layer.up_proj).__module__ == "peft.tuners.lora.bnb"
    apply_to_llava(wrapped)
    assert layer.up_proj.quantized and layer.up_proj.adapter_size("default") == (2, 8)
    apply_to_llava(other, adapters=("default",))
    load_peft_adapter(other, tmp_path, "default")
    torch.testing.assert_close(logits(wrapped), logits(other), rtol=1e-4, atol=1e-4)


def test_peft_layers_that_compute_something_else_are_named() -> None:
    def wrapped(**options: Any) -> Any:
        config = peft.LoraConfig(r=2, target_modules=TARGETS, **options)
        return peft.get_peft_model(make_llava("llama"), config)

    with pytest.raises(ValueError, match=r"layers\.0.*'default' is not LoRA's branch .*Dora"):
        apply_to_llava(wrapped(use_dora=True))
    merged = wrapped()
    merged.merge_adapter()
    with pytest.raises(ValueError, match=r"layers\.0.*PEFT has merged \['default'\]"):
        apply_to_llava(merged)
    idle = wrapped()
    idle.base_model.disable_adapter_layers()
    with pytest.raises(ValueError, match=r"layers\.0.*has \['default'\] switched off"):
        apply_to_llava(idle)
    with pytest.raises(ValueError, match=r"expected nn.Linear .* got peft\.tuners\.loha"):
        apply_to_llava(
            peft.get_peft_model(make_llava("llama"), peft.LoHaConfig(r=2, target_modules=TARGETS))
        )


def test_transformers_trainer_takes_a_patched_4_bit_llava(tmp_path: Path) -> None:
    """It refuses a quantised model that PEFT did not give adapters, and asks the model for that."""
    make_llava("llama").save_pretrained(tmp_path / "llava")
    model = LlavaForConditionalGeneration.from_pretrained(
        tmp_path / "llava",
        quantization_config=BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4"),
        device_map={"": "cpu"},
    )
    arguments = TrainingArguments(output_dir=str(tmp_path / "run"), use_cpu=True, report_to=[])
    with pytest.raises(ValueError, match="purely quantized"):
        Trainer(model, arguments)
    handle = apply_to_llava(model, adapters=("image",), lora_rank=2)
    Trainer(model, arguments)
    handle.undo()
    assert model.is_quantized
