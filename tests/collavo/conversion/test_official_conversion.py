"""From an official folder to one of this package and back: the same model, the same bits."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from collavo import CollavoForConditionalGeneration, load_pretrained
from collavo.cli import main
from collavo.conversion import Options, convert_folder, convert_state_dict
from collavo.conversion.official import plan_official
from collavo.conversion.plan import Header
from collavo.conversion.shapes import shapes_of
from collavo_kernels import quantize_nf4
from tests.collavo.conversion.official_folder import (
    RELEASED,
    Sizes,
    official_config,
    official_shapes,
    official_tensors,
    read_folder,
    write_folder,
)

SMALL = Sizes()
DEAD = ".feed_forward.w2.Plora_seg_"


def expect_equal(found: dict[str, Any], expected: dict[str, Any]) -> None:
    """Compare names, dtypes and bits; the branches that nothing calls come back as zeros."""
    assert set(found) == set(expected)
    for name, value in expected.items():
        wanted = torch.zeros_like(value) if DEAD in name else value
        assert found[name].dtype == value.dtype, name
        assert torch.equal(found[name], wanted), name


@pytest.mark.parametrize(
    ("sizes", "kind", "shards", "dtype"),
    [
        (SMALL, "safetensors", 1, torch.float16),
        (replace(SMALL, rows=51, bias=True), "torch", 3, torch.bfloat16),  # saved after resizing
        (replace(SMALL, kv_heads=4, rows=51), "safetensors", 2, torch.float32),  # no groups
        (replace(SMALL, vocabulary=51, rows=51, inner=80, rank=3), "torch", 1, torch.float16),
    ],
)
def test_there_and_back_is_bit_equal(
    sizes: Sizes, kind: str, shards: int, dtype: torch.dtype, tmp_path: Path
) -> None:
    tensors = official_tensors(sizes, dtype=dtype)
    source = write_folder(
        tmp_path / "official", tensors, official_config(sizes), kind=kind, shards=shards
    )
    convert_folder(source, tmp_path / "own")
    model = load_pretrained(tmp_path / "own")
    assert {value.dtype for value in model.state_dict().values()} == {dtype}
    convert_folder(tmp_path / "own", tmp_path / "back", to_official=True)
    expect_equal(read_folder(tmp_path / "back"), tensors)
    convert_folder(tmp_path / "back", tmp_path / "again")
    again = load_pretrained(tmp_path / "again")
    configs = [(tmp_path / name / "config.json").read_text() for name in ("own", "again")]
    assert configs[0] == configs[1]
    for name, value in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], value), name


def test_the_folder_is_what_convert_state_dict_makes(tmp_path: Path) -> None:
    """A model made of the configuration has the tensors' 16 bits too, not twice as many."""
    tensors, values = official_tensors(SMALL), official_config(SMALL)
    convert_folder(write_folder(tmp_path / "official", tensors, values), tmp_path / "own")
    config, state = convert_state_dict(tensors, values)
    written = json.loads((tmp_path / "own/config.json").read_text())
    assert json.loads(config.to_json_string()) == written
    made = CollavoForConditionalGeneration(config)
    made.load_state_dict(state)
    for model in (load_pretrained(tmp_path / "own"), made):
        assert set(model.state_dict()) == set(state)
        for name, value in state.items():
            found = model.state_dict()[name]
            assert found.dtype == torch.float16 and torch.equal(found, value), name


def test_the_command_reproduces_the_recorded_model(
    golden: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Folder to folder; the tensors are those that the record tests."""
    tensors, facts = golden("model")
    official = {k.removeprefix("sd."): v for k, v in tensors.items() if k.startswith("sd.")}
    _, state = convert_state_dict(official, facts)
    write_folder(tmp_path / "official", official, {"model_type": "internlm", **facts}, shards=2)
    capsys.readouterr()
    folders = [str(tmp_path / name) for name in ("official", "own")]
    assert main(["convert", *folders, "--no-progress"]) == 0
    said = capsys.readouterr()
    assert said.err == ""
    assert "own: the official CoLLaVO" in said.out and "w2: Plora_seg is dropped" in said.out
    found = load_pretrained(tmp_path / "own").state_dict()
    assert set(found) == set(state)
    assert all(torch.equal(found[name], value) for name, value in state.items())


@pytest.mark.parametrize("rows", [RELEASED.vocabulary, RELEASED.rows])
def test_the_released_sizes_leave_nothing_missing_and_nothing_over(rows: int) -> None:
    """Headers alone: the 7B has 1,268 tensors, 18.6 GB in 16 bits."""
    shapes = official_shapes(replace(RELEASED, rows=rows))
    headers = {name: Header(shape, torch.float16) for name, shape in shapes.items()}
    values = official_config(RELEASED)
    config, plan = plan_official("released", headers, values, Options(), None)
    outputs = plan.outputs()
    assert {name: each.shape for name, each in outputs.items()} == shapes_of(config)
    assert len(shapes) == 1268 and len(plan.decoder) == 7 * 32
    assert sum(math.prod(shape) for shape in shapes.values()) == pytest.approx(9.29e9, rel=1e-3)


def test_4_bits_are_bitsandbytes_and_adapters_stay_16_bits(tmp_path: Path) -> None:
    """As quantize_nf4 makes them of the dense weight, which bitsandbytes' own bytes test."""
    tensors, values = official_tensors(SMALL), official_config(SMALL)
    source = write_folder(tmp_path / "official", tensors, values)
    convert_folder(source, tmp_path / "own", Options(quantize="nf4"))
    _, state = convert_state_dict(tensors, values)
    found = read_folder(tmp_path / "own")
    name = "model.language_model.layers.1.self_attn.k_proj.weight"
    for key, value in quantize_nf4(state[name]).state_dict(name).items():
        assert torch.equal(found[key], value), key
    model = load_pretrained(tmp_path / "own")
    layer = model.model.language_model.layers[1]
    assert layer.mlp.down_proj.quantized and not isinstance(model.lm_head, type(layer.mlp.up_proj))
    adapter = layer.self_attn.q_proj.lora_A["plora"].weight
    assert adapter.dtype == torch.float16 and model.config.adapter_dtype == "float16"
    with pytest.raises(ValueError, match=r"quantize: expected None, got 'nf4'; the official"):
        convert_folder(tmp_path / "own", tmp_path / "back", to_official=True)


def test_dtype_and_mode_change_what_they_say(tmp_path: Path) -> None:
    tensors = official_tensors(SMALL)
    source = write_folder(tmp_path / "official", tensors, official_config(SMALL))
    options = Options(dtype=torch.float32, crayon_mode="none")
    done = convert_folder(source, tmp_path / "own", options)
    assert any("the crayon" in note and "dropped" in note for note in done.notes)
    model = load_pretrained(tmp_path / "own")
    assert model.config.crayon_mode == "none" and model.dtype == torch.float32
    norm = model.state_dict()["model.language_model.norm.weight"]
    assert torch.equal(norm, tensors["model.norm.weight"].float())
    with pytest.raises(ValueError, match=r"--crayon-mode: expected 'projection'.*'attention'"):
        convert_folder(source, tmp_path / "other", Options(crayon_mode="attention"))
    assert not (tmp_path / "other").exists()


def test_the_image_token_is_never_a_word(tmp_path: Path) -> None:
    """A release has as many rows as words; the official loader adds the token's row later."""
    for rows in (50, 51):
        sizes = replace(SMALL, rows=rows)
        source = write_folder(
            tmp_path / f"official{rows}", official_tensors(sizes), official_config(sizes)
        )
        done = convert_folder(source, tmp_path / f"own{rows}")
        config = json.loads((tmp_path / f"own{rows}" / "config.json").read_text())
        assert config["image_token_index"] == 50
        assert any("a row of zeros is added" in note for note in done.notes) == (rows == 50)


def test_an_a_that_was_trained_apart_has_no_place_in_the_official_layout(tmp_path: Path) -> None:
    source = write_folder(tmp_path / "official", official_tensors(SMALL), official_config(SMALL))
    convert_folder(source, tmp_path / "own")
    model = load_pretrained(tmp_path / "own")
    model.model.language_model.layers[1].self_attn.v_proj.lora_A["plora"].weight.data[0, 0] += 1
    model.save_pretrained(tmp_path / "trained")
    with pytest.raises(ValueError, match=r"layers\.1\.self_attn\.v_proj\.lora_A.*share one A"):
        convert_folder(tmp_path / "trained", tmp_path / "back", to_official=True)
    assert not (tmp_path / "back").exists()


def test_clips_own_position_table_is_resized_and_said(golden: Any, tmp_path: Path) -> None:
    tensors, facts = golden("model")
    official = {k.removeprefix("sd."): v for k, v in tensors.items() if k.startswith("sd.")}
    name = "vit.vision_tower.vision_model.embeddings.position_embedding.weight"
    official[name] = tensors["posembed.in"]
    source = write_folder(tmp_path / "official", official, {"model_type": "internlm", **facts})
    done = convert_folder(source, tmp_path / "own")
    assert any("resized from 3 to 5 cells a side" in note for note in done.notes)
    found = read_folder(tmp_path / "own")
    table = next(value for key, value in found.items() if key.endswith("position_embedding.weight"))
    assert torch.equal(table, tensors["posembed.out"])
