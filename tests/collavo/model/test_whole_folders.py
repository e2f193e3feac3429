"""Loading is never half: other models' folders, two saves in one, saves that were broken off."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_crayon_model import make_batch, make_model
from transformers import (
    AutoModel,
    AutoModelForImageTextToText,
    BitsAndBytesConfig,
    LlavaForConditionalGeneration,
)

from collavo import CollavoConfig, load_pretrained
from collavo.model.llava import CollavoForConditionalGeneration, CollavoModel
from collavo.model.text import CollavoTextModel


def test_a_folder_without_config_json_is_no_model(tmp_path: Path) -> None:
    """transformers reads a missing file as an empty one: LLaMA-7B's sizes."""
    make_model().save_pretrained(tmp_path)
    (tmp_path / "config.json").unlink()
    for load in (CollavoForConditionalGeneration, CollavoModel, CollavoTextModel, CollavoConfig):
        with pytest.raises(FileNotFoundError, match=r"config\.json"):
            load.from_pretrained(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"config\.json"):
        load_pretrained(tmp_path)


def test_a_refused_checkpoint_takes_no_memory(tmp_path: Path) -> None:
    """A tensor is missing: that is seen in the files' headers, on a model without storage."""
    make_model(adapters=("image",)).save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors.pop("lm_head.weight")
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    devices = set()
    build = torch.nn.Module.register_parameter

    def watched(self: Any, name: str, value: Any) -> None:
        devices.add(None if value is None else value.device.type)
        build(self, name, value)

    with (
        mock.patch.object(torch.nn.Module, "register_parameter", watched),
        pytest.raises(ValueError, match=r"tensors are missing: lm_head\.weight"),
    ):
        CollavoForConditionalGeneration.from_pretrained(tmp_path)
    assert devices <= {"meta", None}


@pytest.mark.parametrize("quantize", [None, "nf4"])
def test_a_state_dict_is_checked_as_a_folder_is(quantize: str | None) -> None:
    model = make_model(quantize=quantize, adapters=("image",))
    load = CollavoForConditionalGeneration.from_pretrained
    loaded = load(None, config=model.config, state_dict=model.state_dict())
    assert torch.equal(loaded(**make_batch()).logits, model(**make_batch()).logits)
    part = {k: v for k, v in model.state_dict().items() if "layers.1.mlp" not in k}
    with pytest.raises(ValueError, match=r"state_dict: tensors are missing: .*layers\.1\.mlp"):
        load(None, config=model.config, state_dict=part)
    old = {k.replace("model.language", "language"): v for k, v in model.state_dict().items()}
    old = {k.replace("language_model.", "language_model.model."): v for k, v in old.items()}
    with pytest.raises(ValueError, match="this is a LLaVA"):
        load(None, config=model.config, state_dict=old)
    with pytest.raises(ValueError, match="got both"):
        load("folder", config=model.config, state_dict=part)


@pytest.mark.parametrize("quantize", [None, "nf4"])
def test_the_base_model_and_the_decoder_load_whole(tmp_path: Path, quantize: str | None) -> None:
    """4-bit weights too, which transformers alone would draw at random here."""
    model, batch = make_model(quantize=quantize, adapters=("image",)), make_batch()
    model.save_pretrained(tmp_path)
    base = AutoModel.from_pretrained(tmp_path)
    assert type(base) is CollavoModel
    expected = model.model(**batch).last_hidden_state
    assert torch.equal(base(**batch).last_hidden_state, expected)
    base.save_pretrained(tmp_path / "base")
    again = CollavoModel.from_pretrained(tmp_path / "base")
    assert torch.equal(again(**batch).last_hidden_state, expected)
    for kind, folder in (
        (CollavoForConditionalGeneration, tmp_path / "base"),
        (CollavoTextModel, tmp_path),
    ):
        with pytest.raises(ValueError, match="tensors have no place in the model"):
            kind.from_pretrained(folder)
    decoder = model.model.language_model
    decoder.save_pretrained(tmp_path / "decoder")
    text = CollavoTextModel.from_pretrained(tmp_path / "decoder")
    assert all(
        torch.equal(value, text.state_dict()[name]) for name, value in decoder.state_dict().items()
    )


BITS: list[tuple[Any, str]] = [
    (BitsAndBytesConfig(load_in_4bit=True), "'fp4', BitsAndBytesConfig's default"),
    (BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4"), "'nf4'"),
    (BitsAndBytesConfig(load_in_8bit=True), "BitsAndBytesConfig"),
    ({"load_in_4bit": True, "quant_method": "bitsandbytes"}, "'fp4'"),
    ({"quant_method": "invented"}, "dict"),
]


@pytest.mark.parametrize(("asked", "named"), BITS)
def test_quantisation_that_would_leave_the_decoder_dense_is_refused(
    tmp_path: Path, asked: Any, named: str
) -> None:
    model = make_model()
    model.save_pretrained(tmp_path)
    message = rf"quantization_config: expected None, got .*{named}.*add_dual_qlora\(adapters=\(\)"
    for load in (CollavoForConditionalGeneration, AutoModelForImageTextToText, CollavoModel):
        with pytest.raises(ValueError, match=message):
            load.from_pretrained(tmp_path, quantization_config=asked)
    for part in ("", "text_config"):
        config = copy.deepcopy(model.config)
        (getattr(config, part) if part else config).quantization_config = asked
        with pytest.raises(ValueError, match=message):
            CollavoForConditionalGeneration.from_pretrained(tmp_path, config=config)
    with pytest.raises(ValueError, match="load_in_4bit: expected None"):
        load_pretrained(tmp_path, load_in_4bit=True)


def test_the_way_that_the_refusal_names_quantises_the_decoder(tmp_path: Path) -> None:
    make_model().save_pretrained(tmp_path)
    model = load_pretrained(tmp_path)
    assert isinstance(model, CollavoForConditionalGeneration)
    model.add_dual_qlora(adapters=(), quantize=True)
    model.save_pretrained(tmp_path)
    loaded = load_pretrained(tmp_path)
    linears = loaded.model.language_model.layers[0].self_attn
    assert loaded.config.quantize == "nf4" and linears.q_proj.quantized
    assert torch.equal(loaded(**make_batch()).logits, model(**make_batch()).logits)


@pytest.mark.parametrize("quantize", [None, "nf4"])
def test_weights_are_not_read_as_another_format(tmp_path: Path, quantize: str | None) -> None:
    make_model(quantize=quantize).save_pretrained(tmp_path)
    load, here = CollavoForConditionalGeneration.from_pretrained, "dense"
    if quantize == "nf4":
        here = "in 4 bits"
        for setting in ({"double_quant": False}, {"quant_block_size": 128}):
            with pytest.raises(ValueError, match=r"q_proj\.weight: has (double|block).* asks for"):
                load(tmp_path, **setting)
        file = tmp_path / "model.safetensors"
        tensors = {k.replace("__nf4", "__fp4"): v for k, v in load_file(file).items()}
        save_file(tensors, file, {"format": "pt"})
        with pytest.raises(ValueError, match=r"q_proj\.weight: expected .*'nf4', got 'fp4'"):
            load(tmp_path)
        make_model(quantize=quantize).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=rf"is {here} and the configuration asks for quantize="):
        load(tmp_path, quantize=None if quantize else "nf4")


def _stock(model: Any, folder: Path, **options: Any) -> None:
    save = LlavaForConditionalGeneration.save_pretrained
    save(model, folder, save_original_format=False, **options)


SHARDS: dict[str, Any] = {"max_shard_size": "30KB"}


@pytest.mark.parametrize("quantize", [None, "nf4"])
@pytest.mark.parametrize(("first", "second"), [({}, SHARDS), (SHARDS, {})])
def test_a_folder_saved_twice_is_the_last_model(
    tmp_path: Path, first: Any, second: Any, quantize: str | None
) -> None:
    """transformers reads one file before shards and leaves both there: it read the older model."""
    old, new = make_model(quantize=quantize), make_model(quantize=quantize)
    new.lm_head.weight.data.mul_(2)
    for model, options in ((old, first), (new, second)):
        model.save_pretrained(tmp_path / "ours", **options)
        _stock(model, tmp_path / "stock", **options)
    (tmp_path / "ours" / "processor.txt").touch()
    loaded = CollavoForConditionalGeneration.from_pretrained(tmp_path / "ours")
    assert torch.equal(loaded.lm_head.weight, new.lm_head.weight)
    assert (tmp_path / "ours" / "processor.txt").is_file()
    for load in (load_pretrained, CollavoForConditionalGeneration.from_pretrained):
        with pytest.raises(
            ValueError, match=r"weights of two saves, .*remove the files of the old"
        ):
            load(tmp_path / "stock")


def test_other_weights_beside_the_model_are_named(tmp_path: Path) -> None:
    model = make_model()
    model.save_pretrained(tmp_path)
    for name in (
        "pytorch_model.bin",
        "pytorch_model.bin.index.json",
        "model-00001-of-00002.safetensors",
        "shard-00000-model-00001-of-00001.safetensors",
    ):
        (tmp_path / name).touch()
        with pytest.raises(ValueError, match=f"two saves, model.safetensors and {name}"):
            CollavoForConditionalGeneration.from_pretrained(tmp_path)
        (tmp_path / name).unlink()
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"which has pytorch_model\.bin; only what"):
        CollavoForConditionalGeneration.from_pretrained(tmp_path)


def test_another_variant_is_another_model(tmp_path: Path) -> None:
    first, second = make_model(), make_model()
    second.lm_head.weight.data.mul_(2)
    first.save_pretrained(tmp_path)
    second.save_pretrained(tmp_path, variant="tuned", **SHARDS)
    first.save_pretrained(tmp_path)
    load = CollavoForConditionalGeneration.from_pretrained
    assert torch.equal(load(tmp_path).lm_head.weight, first.lm_head.weight)
    tuned = load(tmp_path, variant="tuned")
    assert torch.equal(tuned.lm_head.weight, second.lm_head.weight)


@pytest.mark.parametrize("fails_at", [0, 1])
def test_a_save_that_fails_leaves_the_folder_as_it_was(tmp_path: Path, fails_at: int) -> None:
    old, new = make_model(), make_model()
    new.lm_head.weight.data.mul_(2)
    old.save_pretrained(tmp_path, **SHARDS)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    results = [save_file, save_file][:fails_at]

    def failing(*arguments: Any, **options: Any) -> None:
        if not results:
            raise OSError(28, "No space left on device")
        results.pop()(*arguments, **options)

    with (
        mock.patch("transformers.modeling_utils.safe_save_file", failing),
        pytest.raises(OSError, match="No space left"),
    ):
        new.save_pretrained(tmp_path, **SHARDS)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_save_that_was_killed_between_two_models_is_not_read(tmp_path: Path) -> None:
    model = make_model()
    model.save_pretrained(tmp_path)
    left = tmp_path / ".collavo-0123456789abcdef.partial"
    left.mkdir()
    (left / ".names.json").write_text('{"names": ["config.json"], "replaces": []}')
    (tmp_path / "config.json").rename(left / "config.json")  # it goes first and comes last
    for load in (
        load_pretrained,
        CollavoForConditionalGeneration.from_pretrained,
        lambda f: CollavoForConditionalGeneration.from_pretrained(f, config=model.config),
    ):
        with pytest.raises(FileNotFoundError, match=r"broken off .*collavo\.writing\.settle"):
            load(tmp_path)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ("../model.safetensors", ValueError, "expected names of files beside it, got '../model"),
        ("/tmp/model.safetensors", ValueError, "expected names of files beside it"),
        ("a\\b.safetensors", ValueError, "expected names of files beside it"),
        ("C:model.safetensors", ValueError, "expected names of files beside it"),
        ("part/model.safetensors", ValueError, "expected names of files beside it"),
        ("..", ValueError, "expected names of files beside it"),
        ("none.safetensors", FileNotFoundError, "none.safetensors: missing"),
        (3, ValueError, "not an index"),
        ("", ValueError, "not an index"),
    ],
)
def test_an_index_names_files_of_its_folder_alone(
    tmp_path: Path, change: Any, error: type[Exception], message: str
) -> None:
    """Such a file may lie anywhere that the process can read."""
    make_model().save_pretrained(tmp_path / "folder", **SHARDS)
    make_model().save_pretrained(tmp_path)
    path = tmp_path / "folder" / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"]["lm_head.weight"] = change
    path.write_text(json.dumps(index))
    for load in (load_pretrained, CollavoForConditionalGeneration.from_pretrained):
        with pytest.raises(error, match=message):
            load(tmp_path / "folder")


def test_shards_that_are_not_where_the_index_says_are_refused(tmp_path: Path) -> None:
    make_model().save_pretrained(tmp_path, **SHARDS)
    first, second = sorted(tmp_path.glob("model-*.safetensors"))[:2]
    content = first.read_bytes()
    first.write_bytes(second.read_bytes())
    with pytest.raises(ValueError, match="holds too; the files are of two saves"):
        load_pretrained(tmp_path)
    second.write_bytes(content)
    with pytest.raises(ValueError, match=r"it is in model-0000.*; the files are of two saves"):
        load_pretrained(tmp_path)


@pytest.mark.parametrize("quantize", [None, "nf4"])
def test_shards_of_two_saves_are_told_apart(tmp_path: Path, quantize: str | None) -> None:
    """An interrupted copy leaves them: names, tensors and shapes are those of one model."""
    old, new = make_model(quantize=quantize), make_model(quantize=quantize)
    for parameter in new.parameters():
        if parameter.is_floating_point():
            parameter.data.mul_(2)
    old.save_pretrained(tmp_path, **SHARDS)
    new.save_pretrained(tmp_path / "new", **SHARDS)
    shard = sorted((tmp_path / "new").glob("*.safetensors"))[-1]
    (tmp_path / shard.name).write_bytes(shard.read_bytes())
    with pytest.raises(ValueError, match=rf"{shard.name}: is not the file that .* of two saves"):
        CollavoForConditionalGeneration.from_pretrained(tmp_path)


@pytest.mark.parametrize("dtype", [torch.int32, torch.uint8, torch.float8_e4m3fn, torch.bool])
def test_a_tensor_that_is_no_float_is_refused(tmp_path: Path, dtype: torch.dtype) -> None:
    """transformers casts it without a word."""
    make_model().save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["lm_head.weight"] = tensors["lm_head.weight"].to(dtype)
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=r"of another dtype than F64.*lm_head\.weight"):
        load_pretrained(tmp_path)


@pytest.mark.parametrize("content", ['{"max_new_tokens": 3', "[]", "\xff"])
def test_generation_settings_that_cannot_be_read_are_named(tmp_path: Path, content: str) -> None:
    """transformers takes its own in their place."""
    make_model().save_pretrained(tmp_path)
    (tmp_path / "generation_config.json").write_text(content, encoding="latin-1")
    with pytest.raises(ValueError, match=r"generation_config\.json: (not a JSON|expected )"):
        load_pretrained(tmp_path)


def test_a_save_takes_arguments_by_position_as_transformers_does(tmp_path: Path) -> None:
    """The third is the state dict; what an older transformers does not know is not handed on."""
    model = make_model()
    state = {name: torch.zeros_like(value) for name, value in model.state_dict().items()}
    model.save_pretrained(tmp_path / "whole", True, state)
    assert not any(
        value.any() for value in load_file(tmp_path / "whole/model.safetensors").values()
    )
    with mock.patch("transformers.PreTrainedModel.save_pretrained") as save:
        model.save_pretrained(tmp_path / "other", False)
    assert "distributed_checkpoint" not in save.call_args.kwargs


@pytest.mark.parametrize("name", ["config.json", "model.safetensors.index.json"])
@pytest.mark.parametrize("content", [b"[" * 100_000, b"\xef\xbb\xbf{}", b"\xff\xfe{\x00}\x00"])
def test_json_that_transformers_would_not_read_is_named(
    tmp_path: Path, name: str, content: bytes
) -> None:
    """Too deep, with a byte order mark, in UTF-16: it has another message or none for each."""
    make_model().save_pretrained(tmp_path, **SHARDS)
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=rf"{name}: (not a JSON file|expected JSON in UTF-8)"):
        load_pretrained(tmp_path)
