"""LLaVA folders of every family become CoLLaVO folders: their own tensors, and a fresh crayon."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from safetensors.torch import load_file, save_file
from torch import Tensor

from collavo import apply_to_llava, load_pretrained
from collavo.conversion import Options, convert_folder
from collavo.model.inventory import part_of
from collavo_kernels import quantize_nf4
from tests.collavo.conversion.official_folder import read_folder, write_folder
from tests.collavo.model.tiny_families import FAMILIES, make_family, make_inputs

# A family's name here is that of its class; a row of videos is the same class.
CLASSES = [name for name in FAMILIES if "," not in name]


def write_llava(folder: Path, name: str = "llava", *, old_names: bool = True) -> Any:
    """Write a family's tiny model as transformers does and return it."""
    model = make_family(name).eval()
    model.save_pretrained(folder, save_original_format=old_names)
    return model


@pytest.mark.parametrize("old_names", [True, False])
@pytest.mark.parametrize("name", CLASSES)
def test_every_family_keeps_its_tensors_and_computes_what_it_did(
    tmp_path: Path, name: str, old_names: bool
) -> None:
    """To the bit what ``apply_to_llava`` on the stock model computes: the same code runs."""
    stock = write_llava(tmp_path / "source", name, old_names=old_names)
    own = {key: value.clone() for key, value in stock.state_dict().items()}
    convert_folder(tmp_path / "source", tmp_path / "target")
    model: Any = load_pretrained(tmp_path / "target").eval()
    found = model.state_dict()
    if name == "llava":  # CLIP's names of before transformers 5.17
        own = {key.replace("tower.vision_model.", "tower."): value for key, value in own.items()}
    assert all(torch.equal(found[key], value) for key, value in own.items())
    assert {str(part_of(key)) for key in set(found) - set(own)} == {"crayon prompt"}
    inputs = make_inputs(name, [1, 1])
    apply_to_llava(stock)
    with torch.no_grad():
        assert torch.equal(model(**inputs).logits, stock(**inputs).logits)
    # What was drawn is something, but for what has to be zero.
    drawn = {key: value for key, value in found.items() if key not in own}
    assert all(
        value.any() != key.endswith(("mlp.2.weight", "bias")) for key, value in drawn.items()
    )


def test_a_llava_of_the_usual_shape_becomes_a_collavo(tmp_path: Path) -> None:
    """Which is trained, quantised and given adapters as any other; other decoders are patched."""
    write_llava(tmp_path / "source")
    done = convert_folder(tmp_path / "source", tmp_path / "target")
    assert "an untrained crayon" in done.summary()
    model: Any = load_pretrained(tmp_path / "target")
    assert type(model).__name__ == "CollavoForConditionalGeneration"
    assert model.config.crayon_mode == "attention"
    model.add_dual_qlora(quantize=True)


@pytest.mark.parametrize("text", ["qwen2", "qwen3", "mistral"])
def test_a_llava_with_another_decoder_is_a_patched_one(tmp_path: Path, text: str) -> None:
    config = make_family("llava").config.to_dict()
    sizes = {
        k: v for k, v in config["text_config"].items() if k.startswith(("num_", "vocab", "pad"))
    }
    sizes |= {"hidden_size": 64, "intermediate_size": 64, "head_dim": 16}
    config["text_config"] = {"model_type": text, **sizes}
    stock = hf.LlavaForConditionalGeneration(hf.LlavaConfig.from_dict(config))
    stock.save_pretrained(tmp_path / "source")
    convert_folder(tmp_path / "source", tmp_path / "target")
    model: Any = load_pretrained(tmp_path / "target")
    assert type(model).__name__ == "CollavoLlavaForConditionalGeneration"
    found = model.state_dict()
    assert all(torch.equal(found[key], value) for key, value in stock.state_dict().items())


@pytest.mark.parametrize("kind", ["safetensors", "torch"])
def test_files_of_16_bits_in_shards_stay_so(tmp_path: Path, kind: str) -> None:
    """The crayon is trained, and is drawn, in 32."""
    write_llava(tmp_path / "whole")
    tensors = {k: v.half() for k, v in load_file(tmp_path / "whole/model.safetensors").items()}
    # What files of older versions hold beside weights.
    tensors["language_model.model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(8)
    tensors["vision_tower.vision_model.embeddings.position_ids"] = torch.arange(5)[None]
    config = json.loads((tmp_path / "whole/config.json").read_text())
    write_folder(tmp_path / "source", tensors, config, kind=kind, shards=3)
    convert_folder(tmp_path / "source", tmp_path / "target")
    model: Any = load_pretrained(tmp_path / "target")
    for name, value in model.state_dict().items():
        wanted = torch.float16 if part_of(name) is None else torch.float32
        assert value.dtype == wanted, name
    assert (str(model.config.dtype), model.config.adapter_dtype) == ("torch.float16", "float32")


def test_a_folder_of_a_patched_model_is_said_to_be_converted_already(tmp_path: Path) -> None:
    write_llava(tmp_path / "source", "internvl")
    convert_folder(tmp_path / "source", tmp_path / "target")
    for to_official in (False, True):
        with pytest.raises(ValueError, match="a LLaVA with the crayon already"):
            convert_folder(tmp_path / "target", tmp_path / "new", to_official=to_official)


@pytest.mark.parametrize("name", ["llava", "internvl"])
def test_the_configuration_says_one_dtype(tmp_path: Path, name: str) -> None:
    """Folders say one of tower and decoder too, in which a model without a folder is made."""
    write_llava(tmp_path / "source", name)
    file = tmp_path / "source/config.json"
    values = json.loads(file.read_text())
    for part in (values, values["text_config"], values["vision_config"]):
        part["torch_dtype"] = "float16"
    file.write_text(json.dumps(values))
    convert_folder(tmp_path / "source", tmp_path / "target", Options(dtype=torch.bfloat16))
    assert "float16" not in (tmp_path / "target/config.json").read_text().replace("bfloat16", "")
    config = hf.AutoConfig.from_pretrained(tmp_path / "target")
    made = hf.AutoModelForImageTextToText.from_config(config)
    assert {value.dtype for value in made.state_dict().values()} == {torch.bfloat16}


@pytest.mark.parametrize("name", ["llava", "internvl", "llava_next"])
def test_the_decoder_in_4_bits(tmp_path: Path, name: str) -> None:
    """The bytes are those of each weight quantised alone; the tower stays dense."""
    stock = write_llava(tmp_path / "source", name)
    options = Options(dtype=torch.bfloat16, quantize="nf4")
    convert_folder(tmp_path / "source", tmp_path / "target", options)
    written = read_folder(tmp_path / "target")
    packed = [key.removesuffix(".absmax") for key in written if key.endswith("weight.absmax")]
    assert len(packed) == 2 * 7
    for key in packed:
        weight = stock.get_parameter(key).detach().bfloat16()
        for entry, value in quantize_nf4(weight).state_dict(key).items():
            assert torch.equal(written[entry], value)
    model: Any = load_pretrained(tmp_path / "target")
    assert model.dtype == torch.bfloat16
    assert not any("language_model.layers" not in key for key in packed)


@pytest.mark.parametrize("name", ["llava", "llava_next"])
@pytest.mark.parametrize("mode", ["projection", "none"])
def test_the_crayon_mode_is_the_one_asked_for(tmp_path: Path, name: str, mode: Any) -> None:
    stock = write_llava(tmp_path / "source", name)
    convert_folder(tmp_path / "source", tmp_path / "target", Options(crayon_mode=mode))
    model: Any = load_pretrained(tmp_path / "target").eval()
    parts = {str(part_of(key)) for key in model.state_dict()} - {"None"}
    assert parts == ({"crayon prompt", "crayon branches"} if mode == "projection" else set())
    inputs = make_inputs(name, [1, 1])
    apply_to_llava(stock, crayon_mode=mode)
    with torch.no_grad():
        assert torch.equal(model(**inputs).logits, stock(**inputs).logits)


def changed(folder: Path, change: Any) -> None:
    """Let a function change a folder's tensors and ``config.json``."""
    tensors = load_file(folder / "model.safetensors")
    config = json.loads((folder / "config.json").read_text())
    change(tensors, config)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config))


def _named(tensors: dict[str, Tensor], ending: str) -> str:
    """Return a name by its ending: versions of transformers write other old names."""
    return next(name for name in tensors if name.endswith(ending))


def _without(tensors: dict[str, Tensor], config: dict[str, Any]) -> None:
    del tensors[_named(tensors, "layers.1.mlp.up_proj.weight")]


def _with_more(tensors: dict[str, Tensor], config: dict[str, Any]) -> None:
    tensors["language_model.model.layers.2.mlp.up_proj.weight"] = torch.ones(2, 2)


def _misshapen(tensors: dict[str, Tensor], config: dict[str, Any]) -> None:
    tensors[_named(tensors, "projector.linear_1.weight")] = torch.ones(64, 8)


def _twice(tensors: dict[str, Tensor], config: dict[str, Any]) -> None:
    own = _named(tensors, "lm_head.weight")
    other = (
        "lm_head.weight" if own.startswith("language_model") else "language_model.lm_head.weight"
    )
    tensors[other] = tensors[own].clone()


def _quantised(tensors: dict[str, Tensor], config: dict[str, Any]) -> None:
    config["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_4bit": True}


def _unreadable(tensors: dict[str, Tensor], config: dict[str, Any]) -> None:
    config["text_config"] = {"model_type": "no such decoder"}


def _other_decoder(tensors: dict[str, Tensor], config: dict[str, Any]) -> None:
    config["text_config"] = {"model_type": "gpt2", "n_embd": 64, "n_layer": 1, "n_head": 2}


def test_an_adapter_beside_the_model_is_said_to_be_left_out(tmp_path: Path) -> None:
    """transformers would apply it as it loads the folder."""
    write_llava(tmp_path / "source")
    (tmp_path / "source/adapter_config.json").write_text("{}")
    done = convert_folder(tmp_path / "source", tmp_path / "target")
    assert "adapter beside the model is not applied" in done.summary()


def _of_another_kind(tensors: dict[str, Tensor], config: dict[str, Any]) -> None:
    config["vision_feature_layer"] = "last"


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (_of_another_kind, "config.json cannot be read .*vision_feature_layer"),
        (_without, r"is missing: .*layers\.1\.mlp\.up_proj\.weight"),
        (_with_more, r"has no place: language_model\.model\.layers\.2\.mlp\.up_proj\.weight"),
        (_misshapen, r"linear_1\.weight: expected \[64, 16\], found \[64, 8\]"),
        (_twice, r"lm_head\.weight and .*lm_head\.weight: both are lm_head\.weight"),
        (_quantised, "quantization_config: expected dense weights, got 'bitsandbytes'"),
        (_unreadable, r"config\.json cannot be read"),
        (_other_decoder, "LlavaForConditionalGeneration cannot be made of it .*GPT2Model"),
    ],
)
def test_what_does_not_fit_is_named_and_nothing_is_written(
    tmp_path: Path, change: Any, named: str
) -> None:
    write_llava(tmp_path / "source")
    changed(tmp_path / "source", change)
    with pytest.raises(ValueError, match=named):
        convert_folder(tmp_path / "source", tmp_path / "target")
    assert not (tmp_path / "target").exists() or not any((tmp_path / "target").iterdir())


def test_a_family_whose_tokens_have_no_place_converts_without_the_crayon(tmp_path: Path) -> None:
    """Idefics2's image tokens are latents of a resampler."""
    text = make_family("llava_next").config.text_config.to_dict()
    vision = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1}
    vision |= {"num_attention_heads": 2, "image_size": 16, "patch_size": 4}
    latents = {"resampler_n_latents": 4, "resampler_depth": 1, "resampler_n_heads": 2}
    latents |= {"resampler_head_dim": 16, "num_key_value_heads": 1}
    config = hf.Idefics2Config(
        vision_config=vision, text_config=text, perceiver_config=latents, image_token_id=63
    )
    hf.Idefics2ForConditionalGeneration(config).save_pretrained(tmp_path / "source")
    with pytest.raises(ValueError, match=r"crayon_mode: expected 'none' for Idefics2"):
        convert_folder(tmp_path / "source", tmp_path / "target")
    options = Options(crayon_mode="none", quantize="nf4")
    convert_folder(tmp_path / "source", tmp_path / "target", options)
    kind = type(load_pretrained(tmp_path / "target")).__name__
    assert kind == "CollavoIdefics2ForConditionalGeneration"
