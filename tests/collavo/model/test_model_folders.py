"""Model folders: bit-equal round trips, fresh weights, and errors that name tensors and files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_crayon_model import make_batch, make_config, make_model
from transformers import AutoConfig, AutoModelForImageTextToText

from collavo import load_pretrained
from collavo.configuration import CollavoConfig, CollavoTextConfig
from collavo.model.llava import CollavoForConditionalGeneration

MODES = ("attention", "projection")


def assert_same_state(found: Any, expected: Any) -> None:
    ours, theirs = found.state_dict(), expected.state_dict()
    assert list(ours) == list(theirs)
    for name, value in theirs.items():
        assert ours[name].dtype == value.dtype, name
        assert torch.equal(ours[name], value), name


@pytest.mark.parametrize("quantize", [None, "nf4"])
@pytest.mark.parametrize("mode", MODES)
def test_round_trip_is_bit_equal(tmp_path: Path, mode: str, quantize: str | None) -> None:
    model = make_model(crayon_mode=mode, quantize=quantize, adapters=("image", "vl"))
    model.generation_config.max_new_tokens = 3
    model.save_pretrained(tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    if quantize:  # bitsandbytes' own layout in the file
        name = "model.language_model.layers.0.self_attn.q_proj.weight"
        assert stored[name].dtype == torch.uint8
        assert f"{name}.quant_state.bitsandbytes__nf4" in stored
    batch = make_batch()
    for loaded in (
        load_pretrained(tmp_path),
        CollavoForConditionalGeneration.from_pretrained(tmp_path),
        AutoModelForImageTextToText.from_pretrained(tmp_path),
    ):
        assert type(loaded) is CollavoForConditionalGeneration
        assert_same_state(loaded, model)
        assert torch.equal(loaded(**batch).logits, model(**batch).logits)
        assert loaded.generation_config.max_new_tokens == 3
    again = tmp_path / "again"
    load_pretrained(tmp_path).save_pretrained(again)
    first, second = (p / "model.safetensors" for p in (tmp_path, again))
    assert first.read_bytes() == second.read_bytes()


@pytest.mark.parametrize("quantize", [None, "nf4"])
def test_round_trip_in_bfloat16_keeps_every_dtype(tmp_path: Path, quantize: str | None) -> None:
    model = make_model(quantize=quantize, adapters=("image",)).bfloat16()
    model.save_pretrained(tmp_path)
    assert_same_state(load_pretrained(tmp_path), model)
    mixed = load_pretrained(tmp_path)
    for parameter in mixed.adapter_parameters("image"):
        parameter.data = parameter.data.float()
    for parameter in mixed.crayon_parameters():
        parameter.data = parameter.data.float()
    mixed.save_pretrained(tmp_path / "mixed")
    assert_same_state(load_pretrained(tmp_path / "mixed"), mixed)


def test_round_trip_in_shards(tmp_path: Path) -> None:
    model = make_model(quantize="nf4", adapters=("image",))
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    assert_same_state(load_pretrained(tmp_path), model)
    (next(tmp_path.glob("model-00002*.safetensors"))).unlink()
    with pytest.raises(FileNotFoundError, match="model-00002"):
        load_pretrained(tmp_path)


def test_add_dual_qlora_starts_without_effect() -> None:
    batch = make_batch()
    dense = make_model()
    before = dense(**batch).logits
    assert dense.add_dual_qlora(rank=4, quantize=False) is dense
    assert torch.equal(dense(**batch).logits, before)
    quantized = make_model()
    quantized.add_dual_qlora(rank=4)
    bare = make_model()
    bare.add_dual_qlora((), quantize=True)  # the rounding of NF4 alone
    assert torch.equal(quantized(**batch).logits, bare(**batch).logits)
    assert not torch.equal(quantized(**batch).logits, before)
    assert quantized.config.adapters == ("image", "vl")
    assert quantized.config.quantize == "nf4"


def test_add_dual_qlora_trains_adapters_and_crayon_only() -> None:
    model = make_model().add_dual_qlora(rank=4)
    layer = model.model.language_model.layers[0]
    open_ = {n for n, p in layer.named_parameters() if p.requires_grad}
    assert open_ == {n for n, _ in layer.named_parameters() if "lora_" in n or "layernorm" in n}
    for name in ("image", "vl"):
        assert len(list(model.adapter_parameters(name))) == 2 * 7 * 2
    with pytest.raises(ValueError, match="expected one of the model's adapters"):
        list(model.adapter_parameters("audio"))
    with pytest.raises(ValueError, match=r"already"):
        model.add_dual_qlora(("vl",))


def test_adapters_of_two_ranks_round_trip(tmp_path: Path) -> None:
    """A converted model has the image adapter of the release beside the two that are trained."""
    model = make_model(adapters=("plora",), image_adapters=("plora",), lora_rank=2, lora_alpha=2.0)
    model.add_dual_qlora(rank=4, alpha=8.0)
    assert model.config.lora_rank == {"plora": 2, "image": 4, "vl": 4}
    linear = model.model.language_model.layers[0].mlp.up_proj
    assert linear.scaling == {"plora": 1.0, "image": 2.0, "vl": 2.0}
    model.save_pretrained(tmp_path)
    loaded = load_pretrained(tmp_path)
    assert_same_state(loaded, model)
    assert torch.equal(loaded(**make_batch()).logits, model(**make_batch()).logits)


def _saved(folder: Path, quantize: str | None = None) -> dict[str, torch.Tensor]:
    make_model(quantize=quantize, adapters=("image",)).save_pretrained(folder)
    return load_file(folder / "model.safetensors")


@pytest.mark.parametrize("quantize", [None, "nf4"])
def test_missing_and_surplus_tensors_are_named(tmp_path: Path, quantize: str | None) -> None:
    tensors, file = _saved(tmp_path, quantize), tmp_path / "model.safetensors"
    gone = "model.language_model.layers.1.mlp.up_proj.lora_B.image.weight"
    save_file({k: v for k, v in tensors.items() if k != gone}, file, {"format": "pt"})
    with pytest.raises(ValueError, match=rf"tensors are missing: {gone}"):
        load_pretrained(tmp_path)
    save_file({**tensors, "surplus.weight": torch.zeros(1)}, file, {"format": "pt"})
    with pytest.raises(ValueError, match=r"no place in the model: surplus\.weight"):
        load_pretrained(tmp_path)
    save_file({**tensors, gone: torch.zeros(48, 5)}, file, {"format": "pt"})
    with pytest.raises(ValueError, match=rf"another shape than the model's: {gone}"):
        load_pretrained(tmp_path)


def test_a_4bit_weight_without_its_scales_is_named(tmp_path: Path) -> None:
    tensors, file = _saved(tmp_path, "nf4"), tmp_path / "model.safetensors"
    gone = "model.language_model.layers.0.self_attn.k_proj.weight.absmax"
    save_file({k: v for k, v in tensors.items() if k != gone}, file, {"format": "pt"})
    with pytest.raises(ValueError, match=r"layers\.0\.self_attn\.k_proj\.weight"):
        load_pretrained(tmp_path)


@pytest.mark.parametrize("quantize", [None, "nf4"])
def test_truncated_file_is_named(tmp_path: Path, quantize: str | None) -> None:
    _saved(tmp_path, quantize)
    file = tmp_path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"model\.safetensors"):
        load_pretrained(tmp_path)
    file.unlink()
    with pytest.raises(FileNotFoundError, match=r"model\.safetensors"):
        load_pretrained(tmp_path)
    (tmp_path / "config.json").unlink()
    with pytest.raises(FileNotFoundError):
        load_pretrained(tmp_path)


@pytest.mark.parametrize("mode", MODES)
def test_adapters_and_crayon_that_the_call_asks_for_are_drawn(tmp_path: Path, mode: str) -> None:
    """A folder without them is where training starts; B must be zero, A must be finite."""
    base = make_model(crayon_mode="none")
    base.save_pretrained(tmp_path)
    model = CollavoForConditionalGeneration.from_pretrained(
        tmp_path, crayon_mode=mode, adapters=("image",)
    )
    batch = make_batch()
    plain = {k: v for k, v in batch.items() if not k.startswith("crayon")}
    assert torch.equal(model(**batch).logits, base(**plain).logits)
    for name, parameter in model.named_parameters():
        assert bool(parameter.isfinite().all()), name
        if "lora_B" in name:
            assert not bool(parameter.any()), name
        elif "lora_A" in name or name.endswith("crayon_o.A.weight"):
            assert 0 < float(parameter.detach().abs().max()) < 2, name
    with pytest.raises(ValueError, match="tensors are missing"):
        load_pretrained(tmp_path, crayon_mode=mode)


def test_adapters_of_config_json_are_not_drawn(tmp_path: Path) -> None:
    """A folder that says it has them and has not is half a model."""
    tensors = _saved(tmp_path)
    for part in ("lora_", "crayon"):
        kept = {k: v for k, v in tensors.items() if part not in k}
        save_file(kept, tmp_path / "model.safetensors", {"format": "pt"})
        with pytest.raises(ValueError, match=f"tensors are missing: .*{part}.*to be new"):
            CollavoForConditionalGeneration.from_pretrained(tmp_path)


def test_configuration_round_trip_and_errors(tmp_path: Path) -> None:
    config = make_config(crayon_mode="projection", adapters=("image", "vl"), quantize="nf4")
    config.save_pretrained(tmp_path)
    loaded = AutoConfig.from_pretrained(tmp_path)
    assert isinstance(loaded, CollavoConfig)
    assert isinstance(loaded.text_config, CollavoTextConfig)
    assert (loaded.crayon_mode, loaded.adapters, loaded.quantize) == (
        "projection",
        ("image", "vl"),
        "nf4",
    )
    assert loaded.crayon_embed_dim == 16
    for wrong, message in (
        ({"adapters": ("a", "a")}, "adapters: expected distinct"),
        ({"adapters": ("a",), "lora_rank": 0}, "lora_rank: expected at least 1"),
        ({"adapters": "image"}, "adapters: expected a sequence of names, got the string"),
        ({"adapters": ("a.b",)}, "adapters: expected names without dots"),
        ({"lora_dropout": 1.5}, "lora_dropout: expected 0 to below 1"),
        ({"image_adapters": ("a",)}, "image_adapters"),
        ({"adapters": ("a",), "lora_rank": {"b": 2}}, "lora_rank: expected an entry"),
        ({"text": {"model_type": "gpt2"}}, "text_config: expected a decoder of type"),
    ):
        with pytest.raises(ValueError, match=message):
            make_config(**wrong)
    with pytest.raises(ValueError, match="crayon_mode"):
        make_config(crayon_mode="both")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": 0}, "lora_rank: expected at least 1, got 0"),
        ({"dropout": 1.0}, "lora_dropout: expected 0 to below 1"),
        ({"adapters": "image"}, "adapters: expected a sequence of names"),
        ({"adapters": ("vl", "vl")}, "adapters: expected distinct names"),
        ({"adapters": ("image", "old")}, r"adapters of the names \['old'\] already"),
    ],
)
def test_refused_adapters_leave_the_model_as_it_was(options: Any, message: str) -> None:
    """A configuration that is ahead of the weights could be saved and never loaded again."""
    model = make_model(adapters=("old",))
    before = model.config.to_dict()
    with pytest.raises(ValueError, match=message):
        model.add_dual_qlora(**options)
    assert model.config.to_dict() == before
    assert model.model.crayon_adapters == ("old",)


def test_resizing_is_refused_where_no_size_describes_both() -> None:
    model = make_model(extra_embeddings=1, text={"vocab_size": 31})
    assert model.get_input_embeddings().num_embeddings == 32
    assert model(**make_batch()).logits.shape[-1] == 31
    with pytest.raises(ValueError, match="beyond the output head"):
        model.resize_token_embeddings(40)
    plain = make_model()
    plain.resize_token_embeddings(40)
    assert plain.lm_head.out_features == 40


@pytest.mark.parametrize("quantize", [None, "nf4"])
def test_a_head_that_is_the_embedding_is_not_missing(tmp_path: Path, quantize: str | None) -> None:
    model = make_model(text={"tie_word_embeddings": True}, tie_word_embeddings=True)
    model.tie_weights()
    if quantize:
        model.add_dual_qlora(rank=4)
    model.save_pretrained(tmp_path)
    assert "lm_head.weight" not in load_file(tmp_path / "model.safetensors")
    loaded = load_pretrained(tmp_path)
    assert loaded.lm_head.weight is loaded.get_input_embeddings().weight
    assert_same_state(loaded, model)
