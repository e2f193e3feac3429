"""What cannot be built is named, and the target is as it was: not there, or untouched."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from safetensors.torch import load_file, save_file

from collavo.cli import main
from collavo.conversion import Options, build_llava, convert_folder
from tests.collavo.conversion.tiny_original import projector, write_original
from tests.collavo.conversion.tiny_parts import word_tokenizer, write_language, write_tower


def config_of(folder: Path, **changes: Any) -> None:
    """Change a folder's ``config.json``; None takes a field out."""
    file = folder / "config.json"
    values = json.loads(file.read_text()) | changes
    file.write_text(json.dumps({n: v for n, v in values.items() if v is not None}))


def tensors_of(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    file = folder / "model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file)


def _no_tokenizer(folder: Path) -> None:
    for file in (folder / "llm").glob("tokenizer*"):
        file.unlink()


def _more_words(folder: Path) -> None:
    words = word_tokenizer()
    words.add_tokens(["one", "two"])
    words.save_pretrained(folder / "llm")


def _ordinary(word: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        words = word_tokenizer(("<unk>", "<s>", "</s>", word))
        write_language(folder / "llm", tokenizer=words)

    return change


def _other_kind(folder: Path) -> None:
    config = hf.GPT2Config(n_layer=1, n_head=2, n_embd=8, vocab_size=8)
    hf.GPT2LMHeadModel(config).save_pretrained(folder / "llm")


def _encoder_decoder(folder: Path) -> None:
    sizes = {"d_model": 8, "d_ff": 8, "d_kv": 4, "num_layers": 1, "num_heads": 2, "vocab_size": 8}
    hf.T5ForConditionalGeneration(hf.T5Config(**sizes)).save_pretrained(folder / "llm")


def _without_head(folder: Path) -> None:
    config_of(folder / "llm", architectures=["LlamaModel"])


def _other_tower(folder: Path) -> None:
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1}
    config = hf.SiglipVisionConfig(**sizes, num_attention_heads=2, image_size=8, patch_size=4)
    hf.SiglipVisionModel(config).save_pretrained(folder / "clip")


FAULTS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no tokenizer": (_no_tokenizer, "llm: expected a tokenizer"),
    "another decoder": (_other_kind, r"llm: expected a language model of .*Llama.* got .*'gpt2'"),
    "encoder-decoder": (_encoder_decoder, r"llm: expected a language model of .* got .*'t5'"),
    "no head": (_without_head, r"architectures: expected LlamaForCausalLM, got \['LlamaModel'\]"),
    "a llava": (
        lambda f: config_of(f / "llm", model_type="llava", architectures=None),
        r"expected a language model of .*this is a LLaVA",
    ),
    "no clip": (_other_tower, "clip: expected a CLIP tower, .* got 'siglip_vision_model'"),
    "adapters": (
        lambda f: (f / "llm/adapter_config.json").write_text("{}"),
        r"llm: holds an adapter \(adapter_config.json\)",
    ),
    "quantised": (
        lambda f: config_of(f / "llm", quantization_config={"quant_method": "gptq"}),
        "llm: quantization_config: expected dense weights, got 'gptq'",
    ),
    "quantised tower": (
        lambda f: config_of(f / "clip", quantization_config={"quant_method": "bitsandbytes"}),
        "clip: quantization_config: expected dense weights",
    ),
    "vocabulary": (
        lambda f: config_of(f / "llm", vocab_size=100),
        r"embed_tokens.weight: expected 100 rows, as vocab_size",
    ),
    "hidden size": (
        lambda f: config_of(f / "llm", intermediate_size=100),
        r"llm: does not fit: .*expected \[100, 64\], found \[96, 64\]",
    ),
    "tower's size": (
        lambda f: config_of(f / "clip", hidden_size=32),
        r"clip: does not fit: .*found \[16",
    ),
    "patches": (
        lambda f: config_of(f / "clip", image_size=18),
        "clip: image_size, patch_size: expected whole patches, got 18, 4",
    ),
    "a tensor missing": (
        lambda f: tensors_of(f / "llm", lambda t: t.pop("model.layers.1.mlp.up_proj.weight")),
        "llm: is missing: model.layers.1.mlp.up_proj.weight",
    ),
    "a tensor too many": (
        lambda f: tensors_of(f / "clip", lambda t: t.update(other=torch.ones(1))),
        "clip: has no place: other",
    ),
    "a head that should be tied": (
        lambda f: config_of(f / "llm", tie_word_embeddings=True),
        "lm_head.weight: expected the values of model.embed_tokens.weight",
    ),
    "more words than rows": (
        _more_words, r"its tokenizer has ids up to 442 and model.embed_tokens.weight 441 rows"
    ),
    "<image> is a word": (_ordinary("<image>"), "has <image> as an ordinary word"),
    "<pad> is a word": (_ordinary("<pad>"), "has <pad> as an ordinary word"),
    "no weights": (
        lambda f: (f / "llm/model.safetensors").unlink(),
        "llm: expected model.safetensors or pytorch_model.bin",
    ),
    "no config": (lambda f: (f / "clip/config.json").unlink(), "clip/config.json: missing"),
    "config of another kind": (
        lambda f: config_of(f / "clip", hidden_size="wide"), "clip: its config.json cannot be read"
    ),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_named_before_anything_is_written(tmp_path: Path, fault: str) -> None:
    write_language(tmp_path / "llm")
    write_tower(tmp_path / "clip")
    change, message = FAULTS[fault]
    change(tmp_path)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        build_llava(tmp_path / "llm", tmp_path / "clip", tmp_path / "built")
    assert not (tmp_path / "built").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"projector_type": "mlp3x_gelu"}, "projector_type: expected one of .*'mlp3x_gelu'"),
        ({"image_mode": "anyres"}, "image_mode: expected .*'anyres'"),
        ({"chat_template": "alpaca"}, "expected one of .*vicuna_v1.*'alpaca'"),
        ({"crayon_mode": "both"}, "crayon_mode: expected .*'both'"),
        ({"quantize": "int8"}, "quantize: expected None or 'nf4'"),
        ({"dtype": torch.int8}, "dtype: expected"),
        ({"seed": -1}, "seed: expected a whole number"),
        ({"projector": "no-such.bin"}, "no-such.bin: no such file"),
    ],
    ids=str,
)
def test_arguments_are_looked_at_first(
    tmp_path: Path, arguments: dict[str, Any], message: str
) -> None:
    write_language(tmp_path / "llm")
    write_tower(tmp_path / "clip")
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        build_llava(tmp_path / "llm", tmp_path / "clip", tmp_path / "built", **arguments)
    assert not (tmp_path / "built").exists()


def test_another_decoder_has_transformers_projector_alone(tmp_path: Path) -> None:
    write_language(tmp_path / "llm", "qwen2")
    write_tower(tmp_path / "clip")
    with pytest.raises(ValueError, match=r"projector_type: expected 'mlp2x_gelu'.*'qwen2'"):
        build_llava(
            tmp_path / "llm", tmp_path / "clip", tmp_path / "built", projector_type="linear"
        )


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"model.mm_projector.4.weight": torch.ones(1)}, "expected a projector of one of"),
        ({"lm_head.weight": torch.ones(1)}, "expected LLaVA's projector alone.*lm_head"),
        ({}, "got the tensors none"),
        (projector("linear"), "projector_type: expected 'linear', which .* has, got 'mlp2x_gelu'"),
        (
            projector("mlp2x_gelu") | {"model.mm_projector.0.weight": torch.ones(64, 8)},
            r"model.mm_projector.0.weight: expected \[64, 16\], found \[64, 8\]",
        ),
    ],
    ids=["deeper", "whole", "empty", "other kind", "other tower"],
)
def test_a_file_that_is_no_projector_of_this_model(
    tmp_path: Path, tensors: dict[str, Any], message: str
) -> None:
    write_language(tmp_path / "llm")
    write_tower(tmp_path / "clip")
    torch.save(tensors, tmp_path / "mm_projector.bin")
    with pytest.raises(ValueError, match=message):
        build_llava(
            tmp_path / "llm",
            tmp_path / "clip",
            tmp_path / "built",
            projector=tmp_path / "mm_projector.bin",
            projector_type="mlp2x_gelu",
        )


def test_a_file_that_runs_code_is_not_read(tmp_path: Path) -> None:
    """Weights alone are unpickled; the others of such a file would run what it says."""
    write_original(tmp_path / "llava")
    torch.save({"model.mm_projector.weight": print}, tmp_path / "mm_projector.bin")
    with pytest.raises(ValueError, match=r"mm_projector.bin: not a complete torch file of weights"):
        convert_folder(
            tmp_path / "llava", tmp_path / "own", Options(projector=tmp_path / "mm_projector.bin")
        )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "llava_mpt"}, "model_type: expected one of .*'llava_mpt'"),
        ({"mm_projector_type": "mlp3x_gelu"}, "mm_projector_type: expected .*'mlp3x_gelu'"),
        ({"mm_projector_type": "linear"}, "projector_type: expected 'mlp2x_gelu'.*got 'linear'"),
        ({"mm_use_im_start_end": True}, "mm_use_im_start_end: expected False"),
        ({"mm_vision_select_feature": "cls_patch"}, "mm_vision_select_feature: .*'cls_patch'"),
        ({"mm_vision_select_layer": None}, "mm_vision_select_layer: expected the number"),
        ({"mm_vision_select_layer": -24}, "of one of the tower's 2 layers, .* got -24"),
        ({"image_aspect_ratio": "anyres"}, "image_aspect_ratio: .*'anyres'"),
        ({"mm_hidden_size": 1024}, "mm_hidden_size: expected 16, .* got 1024"),
    ],
    ids=str,
)
def test_settings_of_an_original_llava_that_have_no_place(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    write_original(tmp_path / "llava", changes=changes)
    with pytest.raises(ValueError, match=message):
        convert_folder(
            tmp_path / "llava", tmp_path / "own", Options(vision_folder=tmp_path / "clip")
        )
    assert not (tmp_path / "own").exists()


def test_what_an_original_llava_lacks_is_asked_for(tmp_path: Path) -> None:
    """Its tower, which the hub has; its projector, which stage one saves by itself; its base."""
    tensors = write_original(tmp_path / "llava")
    with pytest.raises(ValueError, match=r"does not hold its vision tower.*clip-vit.*--vision"):
        convert_folder(tmp_path / "llava", tmp_path / "own")
    write_original(tmp_path / "other", tower=True, changes={"mm_vision_tower": "laion/CLIP-ViT-H"})
    with pytest.raises(ValueError, match=r"settings of its vision tower 'laion.*--vision"):
        convert_folder(tmp_path / "other", tmp_path / "own")
    kept = {name: value for name, value in tensors.items() if "mm_projector" not in name}
    torch.save(kept, tmp_path / "llava/pytorch_model.bin")
    options = Options(vision_folder=tmp_path / "clip")
    with pytest.raises(ValueError, match=r"holds no projector.*--projector"):
        convert_folder(tmp_path / "llava", tmp_path / "own", options)
    (tmp_path / "llava/adapter_config.json").write_text("{}")
    with pytest.raises(ValueError, match=r"LLaVA's adapters and not the model.*load_peft_adapter"):
        convert_folder(tmp_path / "llava", tmp_path / "own", options)
    write_original(tmp_path / "qwen", "qwen2")
    with pytest.raises(ValueError, match=r"--template: expected the name"):
        convert_folder(tmp_path / "qwen", tmp_path / "own", options)


@pytest.mark.parametrize(
    ("settings", "options", "message"),
    [
        ({"quantize": "nf4"}, {}, "quantize: expected dense weights"),
        ({"image_mode": "squash"}, {}, "expected one that pads or crops"),
        ({}, {"quantize": "nf4"}, "--quantize: expected none beside --to-llava"),
        ({}, {"crayon_mode": "attention"}, "--crayon-mode: expected none, or 'none'"),
        ({}, {"vision_folder": None}, "--vision: expected the folder or hub id"),
    ],
    ids=str,
)
def test_what_llavas_own_format_has_no_place_for(
    tmp_path: Path, settings: dict[str, Any], options: dict[str, Any], message: str
) -> None:
    write_language(tmp_path / "llm")
    write_tower(tmp_path / "clip")
    build_llava(tmp_path / "llm", tmp_path / "clip", tmp_path / "own", **settings)
    given = Options(**{"vision_folder": "openai/clip-vit-large-patch14", **options})
    with pytest.raises(ValueError, match=message):
        convert_folder(tmp_path / "own", tmp_path / "back", given, to_llava=True)
    assert not (tmp_path / "back").exists()


@pytest.mark.parametrize("mode", ["attention", "projection"])
def test_a_trained_crayon_is_left_out_only_where_that_is_asked_for(
    tmp_path: Path, mode: Any
) -> None:
    write_language(tmp_path / "llm")
    write_tower(tmp_path / "clip")
    build_llava(tmp_path / "llm", tmp_path / "clip", tmp_path / "own", crayon_mode=mode)
    name = {
        "attention": "model.crayon_prompt.mlp.2.bias",
        "projection": "model.language_model.layers.1.self_attn.crayon_qkv.B.weight",
    }[mode]
    tensors_of(tmp_path / "own", lambda tensors: tensors[name].view(-1)[3].fill_(0.5))
    options = Options(vision_folder="openai/clip-vit-large-patch14")
    with pytest.raises(ValueError, match=f"{name}: expected an untrained crayon"):
        convert_folder(tmp_path / "own", tmp_path / "back", options, to_llava=True)
    asked = Options(vision_folder=options.vision_folder, crayon_mode="none")
    done = convert_folder(tmp_path / "own", tmp_path / "back", asked, to_llava=True)
    assert "the crayon is left out" in done.notes


def test_the_target_is_not_written_over(tmp_path: Path) -> None:
    (tmp_path / "built").mkdir()
    (tmp_path / "built/notes.txt").write_text("mine")
    with pytest.raises(ValueError, match=r"built: expected a new or empty folder, it holds notes"):
        build_llava(tmp_path / "llm", tmp_path / "clip", tmp_path / "built")


def test_the_commands(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Built, taken to LLaVA's format and back, and a projector put in; a fault is one line."""
    write_language(tmp_path / "llm")
    write_tower(tmp_path / "clip")
    parts = ["--llm", str(tmp_path / "llm"), "--vision", str(tmp_path / "clip")]
    own, back = str(tmp_path / "own"), str(tmp_path / "back")
    assert (
        main(["build", *parts, "--out", own, "--projector", "linear", "--dtype", "bfloat16"]) == 0
    )
    assert "a new CoLLaVO" in capsys.readouterr().out
    vision = ["--vision", str(tmp_path / "clip")]
    assert main(["convert", "--to-llava", own, back, *vision]) == 0
    file = str(tmp_path / "back/mm_projector.bin")
    assert main(["convert", back, str(tmp_path / "again"), "--template", "v1"]) == 0
    assert main(["convert", "--projector", file, own, str(tmp_path / "swapped")]) == 0
    assert (
        load_file(tmp_path / "own/model.safetensors").keys()
        == load_file(tmp_path / "swapped/model.safetensors").keys()
    )
    capsys.readouterr()
    assert main(["build", *parts, "--out", own]) == 2
    assert capsys.readouterr().err.count("\n") == 1
    assert main(["convert", own, str(tmp_path / "x"), "--vision", "a", "--to-official"]) == 2
    assert "--vision: expected none" in capsys.readouterr().err
