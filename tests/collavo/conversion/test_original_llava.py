"""LLaVAs of the original repository's format, read and written back; ``mm_projector.bin``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from tiny_original import projector, write_original
from torch import Tensor

from collavo.conversion import Options, build_llava, convert_folder
from collavo.loading import load_folder, load_pretrained
from collavo.model.inventory import part_of
from collavo_kernels.nn import load_peft_adapter
from tests.collavo.conversion.official_folder import read_folder
from tests.collavo.conversion.tiny_parts import write_language, write_tower
from tests.collavo.conversion.tiny_sentencepiece import write_sentencepiece

OWN = {
    "model.mm_projector.weight": "model.multi_modal_projector.weight",
    "model.mm_projector.bias": "model.multi_modal_projector.bias",
    "model.mm_projector.0.weight": "model.multi_modal_projector.linear_1.weight",
    "model.mm_projector.0.bias": "model.multi_modal_projector.linear_1.bias",
    "model.mm_projector.2.weight": "model.multi_modal_projector.linear_2.weight",
    "model.mm_projector.2.bias": "model.multi_modal_projector.linear_2.bias",
}
INNER = "model.vision_tower.vision_tower.vision_model."


def own_name(name: str, state: Any) -> str:
    """What a tensor of an original checkpoint is called here."""
    if name in OWN or name == "lm_head.weight":
        return OWN.get(name, name)
    if name.startswith(INNER):
        rest = name.removeprefix(INNER)
        plain = f"model.vision_tower.{rest}"
        return plain if plain in state else f"model.vision_tower.vision_model.{rest}"
    return name.replace("model.", "model.language_model.", 1)


def expect_same(tensors: dict[str, Tensor], model: Any) -> None:
    """Every tensor of a checkpoint is in a model, to the bit; new words' rows come after."""
    state = model.state_dict()
    for name, value in tensors.items():
        assert torch.equal(state[own_name(name, state)][: len(value)], value), name


@pytest.mark.parametrize("files", ["torch", "safetensors"])
@pytest.mark.parametrize("tower", [False, True], ids=["tower beside", "tower inside"])
@pytest.mark.parametrize("kind", ["llama", "mistral", "qwen2"])
def test_every_tensor_comes_over(tmp_path: Path, kind: str, tower: bool, files: str) -> None:
    tensors = write_original(tmp_path / "llava", kind, tower=tower, files=files, shards=2)
    options = Options(vision_folder=tmp_path / "clip", chat_template="v1")
    convert_folder(tmp_path / "llava", tmp_path / "own", options)
    model, processor = load_folder(tmp_path / "own")
    expect_same(tensors, model)
    assert model.config.vision_feature_layer == -2
    assert processor.image_processor.do_pad
    assert {v.dtype for n, v in model.state_dict().items() if part_of(n) is None} == {torch.half}


def test_the_first_llava_has_one_linear_layer_and_crops(tmp_path: Path) -> None:
    """Its configurations do not say which projector, and no aspect ratio."""
    changes = {"mm_projector_type": "linear", "model_type": "llava", "image_aspect_ratio": None}
    tensors = write_original(tmp_path / "llava", projector_type="linear", changes=changes)
    config = json.loads((tmp_path / "llava/config.json").read_text())
    del config["mm_projector_type"], config["image_aspect_ratio"]
    (tmp_path / "llava/config.json").write_text(json.dumps(config))
    done = convert_folder(
        tmp_path / "llava", tmp_path / "own", Options(vision_folder=tmp_path / "clip")
    )
    model, processor = load_folder(tmp_path / "own")
    expect_same(tensors, model)
    assert model.config.projector_type == "linear"
    assert processor.image_processor.do_center_crop
    assert "the chat template is 'vicuna_v1'" in done.summary()


def test_a_tower_inside_needs_no_folder_where_it_is_one_of_openais(tmp_path: Path) -> None:
    """Its sizes show in its tensors, and all of OpenAI's have heads of 64."""
    from transformers import CLIPVisionConfig, CLIPVisionModel

    tensors = write_original(tmp_path / "llava", tower=False)
    torch.manual_seed(5)
    sizes = {"hidden_size": 128, "intermediate_size": 64, "num_hidden_layers": 2}
    config = CLIPVisionConfig(**sizes, num_attention_heads=2, image_size=16, patch_size=4)
    tower = CLIPVisionModel(config)
    for name, value in tower.state_dict().items():
        tensors[INNER + name.removeprefix("vision_model.")] = value.detach().half()
    tensors["model.mm_projector.0.weight"] = torch.randn(64, 128).half()
    torch.save(tensors, tmp_path / "llava/pytorch_model.bin")
    values = json.loads((tmp_path / "llava/config.json").read_text()) | {"mm_hidden_size": 128}
    (tmp_path / "llava/config.json").write_text(json.dumps(values))
    convert_folder(tmp_path / "llava", tmp_path / "own")
    model, _ = load_folder(tmp_path / "own")
    expect_same(tensors, model)
    found = model.config.vision_config
    assert (found.num_attention_heads, found.image_size, found.patch_size) == (2, 16, 4)


@pytest.mark.parametrize("kind", ["llama", "mistral", "qwen2"])
def test_there_and_back(tmp_path: Path, kind: str) -> None:
    """Ours to LLaVA's and back is the same to the bit; from LLaVA's, but for rows of new words."""
    options = Options(vision_folder=tmp_path / "clip", chat_template="v1")
    tensors = write_original(tmp_path / "llava", kind, tower=True)
    convert_folder(tmp_path / "llava", tmp_path / "own", options)
    back = Options(vision_folder="openai/clip-vit-large-patch14-336")
    done = convert_folder(tmp_path / "own", tmp_path / "back", back, to_llava=True)
    assert "the crayon is left out, which has no effect yet" in done.notes
    written = read_folder(tmp_path / "back")
    assert set(written) == set(tensors)
    for name, value in tensors.items():
        assert torch.equal(written[name][: len(value)], value), name
    projected = torch.load(tmp_path / "back/mm_projector.bin", weights_only=True)
    assert set(projected) == set(projector("mlp2x_gelu"))
    assert all(torch.equal(value, tensors[name]) for name, value in projected.items())
    was = json.loads((tmp_path / "llava/config.json").read_text())
    now = json.loads((tmp_path / "back/config.json").read_text())
    for name in (
        "model_type", "architectures", "image_aspect_ratio", "hidden_size", "rms_norm_eps",
        *(name for name in was if name.startswith("mm_") and was[name] is not None),
    ):  # fmt: skip
        assert now[name] == was[name], name
    # Its own settings say what the tower is.
    convert_folder(tmp_path / "back", tmp_path / "again", Options(chat_template="v1"))
    own, again = (read_folder(tmp_path / name) for name in ("own", "again"))
    assert {name for name in own if part_of(name) is None} == {
        name for name in again if part_of(name) is None
    }
    for name, value in again.items():
        assert part_of(name) is not None or torch.equal(value, own[name]), name


@pytest.mark.parametrize("model_type", ["llava", "llava_llama"])
def test_a_tokenizer_of_sentencepiece_alone_gives_its_ids(tmp_path: Path, model_type: str) -> None:
    """As LLaVA's folders have it; under the older name transformers would cut texts otherwise."""
    sentencepiece = pytest.importorskip("sentencepiece")
    write_original(tmp_path / "llava", changes={"model_type": model_type})
    for file in (tmp_path / "llava").glob("tokenizer*"):
        file.unlink()
    model_file = write_sentencepiece(tmp_path / "llava")
    settings = {"tokenizer_class": "LlamaTokenizer", "pad_token": "<unk>", "legacy": False}
    (tmp_path / "llava/tokenizer_config.json").write_text(json.dumps(settings))
    convert_folder(tmp_path / "llava", tmp_path / "own", Options(vision_folder=tmp_path / "clip"))
    words = load_folder(tmp_path / "own")[1].tokenizer
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(model_file))
    text = "A horse isn't here: yes 2,024 (\u00e9t\u00e9)\n\n  twice  "
    assert words(text)["input_ids"] == [pieces.bos_id(), *pieces.encode(text)]
    assert words.pad_token == "<pad>"


def test_a_linear_projector_is_written_back(tmp_path: Path) -> None:
    tensors = write_original(tmp_path / "llava", projector_type="linear")
    convert_folder(tmp_path / "llava", tmp_path / "own", Options(vision_folder=tmp_path / "clip"))
    options = Options(vision_folder=tmp_path / "clip", dtype=torch.float32)
    convert_folder(tmp_path / "own", tmp_path / "back", options, to_llava=True)
    written = read_folder(tmp_path / "back")
    found = torch.load(tmp_path / "back/mm_projector.bin", weights_only=True)
    for name in projector("linear"):
        assert torch.equal(written[name], tensors[name].float())
        assert torch.equal(found[name], written[name])
    values = json.loads((tmp_path / "back/config.json").read_text())
    assert values["mm_projector_type"] == "linear"


def test_a_rope_that_is_scaled_is_said_as_older_transformers_read_it(tmp_path: Path) -> None:
    changes = {"rope_scaling": {"type": "linear", "factor": 2.0}, "rope_parameters": None}
    write_original(tmp_path / "llava", changes=changes | {"rope_theta": 5000.0})
    convert_folder(tmp_path / "llava", tmp_path / "own", Options(vision_folder=tmp_path / "clip"))
    options = Options(vision_folder="openai/clip-vit-large-patch14")
    convert_folder(tmp_path / "own", tmp_path / "back", options, to_llava=True)
    values = json.loads((tmp_path / "back/config.json").read_text())
    assert (values["rope_theta"], values["rope_scaling"]) == (5000.0, changes["rope_scaling"])


@pytest.mark.parametrize("prefix", ["", "model.", "base_model.model.model."])
@pytest.mark.parametrize("kind", ["linear", "mlp2x_gelu"])
def test_a_projector_file_joins_what_is_built(tmp_path: Path, kind: str, prefix: str) -> None:
    """As stage one writes it, with and without the model's name, and as LoRA's runs do."""
    write_language(tmp_path / "llm")
    write_tower(tmp_path / "clip")
    tensors = projector(kind)
    named = {prefix + name.removeprefix("model."): value for name, value in tensors.items()}
    torch.save(named, tmp_path / "mm_projector.bin")
    done = build_llava(
        tmp_path / "llm",
        tmp_path / "clip",
        tmp_path / "own",
        projector=tmp_path / "mm_projector.bin",
    )
    model, _ = load_folder(tmp_path / "own")
    state = model.state_dict()
    for name, value in tensors.items():
        assert torch.equal(state[OWN[name]], value.float())
    assert "drawn" not in done.summary()


@pytest.mark.parametrize("kind", ["linear", "mlp2x_gelu"])
@pytest.mark.parametrize("quantize", [None, "nf4"])
def test_a_projector_file_takes_the_place_of_a_folders(
    tmp_path: Path, kind: str, quantize: Any
) -> None:
    """Nothing else changes: 4-bit weights, processor and crayon are the same bytes."""
    write_language(tmp_path / "llm")
    write_tower(tmp_path / "clip")
    build_llava(tmp_path / "llm", tmp_path / "clip", tmp_path / "own", quantize=quantize)
    torch.save(projector("linear"), tmp_path / "own/mm_projector.bin")  # of an export
    save_file(projector(kind), tmp_path / "projector.safetensors")
    options = Options(projector=tmp_path / "projector.safetensors")
    convert_folder(tmp_path / "own", tmp_path / "new", options)
    model, _ = load_folder(tmp_path / "new")
    assert model.config.projector_type == kind
    old, new = (read_folder(tmp_path / name) for name in ("own", "new"))
    for name, value in projector(kind).items():
        assert torch.equal(new.pop(OWN[name]), value.float())
    assert set(new) == {name for name in old if "multi_modal_projector" not in name}
    assert all(torch.equal(value, old[name]) for name, value in new.items())
    files = {path.name for path in (tmp_path / "own").iterdir()} - {"mm_projector.bin"}
    assert files == {path.name for path in (tmp_path / "new").iterdir()}
    for name in files - {"model.safetensors", "config.json"}:
        assert (tmp_path / "own" / name).read_bytes() == (tmp_path / "new" / name).read_bytes()


@pytest.mark.parametrize("kind", ["qwen2", "mistral"])
def test_a_projector_file_takes_the_place_of_a_patched_ones(tmp_path: Path, kind: str) -> None:
    """Whose projector is transformers' own, so that another kind is refused by name."""
    write_language(tmp_path / "llm", kind)
    write_tower(tmp_path / "clip")
    build_llava(tmp_path / "llm", tmp_path / "clip", tmp_path / "own", dtype=torch.bfloat16)
    for other in ("linear", "mlp2x_gelu"):
        torch.save(projector(other), tmp_path / f"{other}.bin")
    with pytest.raises(ValueError, match=r"projector_type: expected 'linear', which .* has"):
        convert_folder(
            tmp_path / "own", tmp_path / "new", Options(projector=tmp_path / "linear.bin")
        )
    convert_folder(
        tmp_path / "own", tmp_path / "new", Options(projector=tmp_path / "mlp2x_gelu.bin")
    )
    old, new = (load_folder(tmp_path / name)[0].state_dict() for name in ("own", "new"))
    for name, value in projector("mlp2x_gelu").items():
        assert torch.equal(new.pop(OWN[name]), value.bfloat16())
    assert all(torch.equal(value, old[name]) for name, value in new.items())


def test_a_projector_file_takes_the_place_of_a_stock_llavas(tmp_path: Path) -> None:
    """Which has two layers; what becomes of it can have one."""
    from transformers import LlavaConfig, LlavaForConditionalGeneration

    language, tower = write_language(tmp_path / "llm"), write_tower(tmp_path / "clip")
    config = LlavaConfig(
        vision_config=tower.config, text_config=language.config, image_token_index=7
    )
    LlavaForConditionalGeneration(config).save_pretrained(tmp_path / "stock")
    torch.save(projector("linear"), tmp_path / "mm_projector.bin")
    options = Options(projector=tmp_path / "mm_projector.bin")
    convert_folder(tmp_path / "stock", tmp_path / "own", options)
    model: Any = load_pretrained(tmp_path / "own")
    assert model.config.projector_type == "linear"
    for name, value in projector("linear").items():
        assert torch.equal(model.state_dict()[OWN[name]], value.float())


def test_a_tower_that_the_settings_name_is_read_where_it_is_a_folder(tmp_path: Path) -> None:
    changes = {"mm_vision_tower": str(tmp_path / "clip")}
    tensors = write_original(tmp_path / "llava", changes=changes)
    convert_folder(tmp_path / "llava", tmp_path / "own")
    model, _ = load_folder(tmp_path / "own")
    expect_same(tensors, model)


def test_adapters_of_llavas_fit_what_becomes_of_their_base(tmp_path: Path) -> None:
    """Its LoRA runs save PEFT's folder by the decoder's names, and the projector beside it."""
    import peft

    write_original(tmp_path / "llava")
    torch.save(
        {f"base_model.model.{name}": value for name, value in projector("mlp2x_gelu").items()},
        tmp_path / "non_lora_trainables.bin",
    )
    options = Options(
        vision_folder=tmp_path / "clip", projector=tmp_path / "non_lora_trainables.bin"
    )
    convert_folder(tmp_path / "llava", tmp_path / "own", options)
    language = write_language(tmp_path / "llm")
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "up_proj"])
    adapted: Any = peft.get_peft_model(language, config)
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    adapted.save_pretrained(tmp_path / "lora")
    model, _ = load_folder(tmp_path / "own")
    model.add_dual_qlora(adapters=("instruct",))
    load_peft_adapter(model, tmp_path / "lora", slot="instruct")
    found = model.state_dict()["model.language_model.layers.1.mlp.up_proj.lora_B.instruct.weight"]
    layer = adapted.base_model.model.model.layers[1].mlp.up_proj
    assert torch.equal(found, layer.lora_B["default"].weight)
