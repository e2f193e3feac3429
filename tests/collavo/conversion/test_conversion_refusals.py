"""What does not fit is refused in one sentence, and the target is as it was."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from collavo.cli import main
from collavo.conversion import Options, convert_folder
from tests.collavo.conversion.official_folder import (
    POSITIONS,
    Sizes,
    official_config,
    official_tensors,
    write_folder,
)

SMALL = Sizes()
NAME = "model.layers.1.feed_forward.w3.Plora_main.weight"
Damage = Callable[[dict[str, Tensor], dict[str, Any]], None]


def expect_refused(
    source: Path, error: type[Exception], message: str, options: Options | None = None
) -> None:
    """Convert into a folder that is not there, and into one that is; see both as they were."""
    new, empty = source.parent / "new", source.parent / "empty"
    empty.mkdir(exist_ok=True)
    for target in (new, empty):
        with pytest.raises(error, match=message) as caught:
            convert_folder(source, target, options)
        assert "\n" not in str(caught.value)
    assert not new.exists() and not list(empty.iterdir())


def _renamed(tensors: dict[str, Tensor], _: dict[str, Any]) -> None:
    tensors[NAME.replace("w3", "w4")] = tensors.pop(NAME)


DAMAGES: dict[str, tuple[Damage, str]] = {
    "missing": (lambda t, c: t.__delitem__(NAME), rf"is missing: {NAME}"),
    "surplus": (lambda t, c: t.update(more=torch.zeros(1)), "has no place: more"),
    "renamed": (_renamed, rf"is missing: {NAME}; has no place: .*w4"),
    "shape": (
        lambda t, c: t.update({NAME: t[NAME][:-1].clone()}),
        rf"{NAME}: expected \[96, 64\], found \[95, 64\]",
    ),
    "integers": (
        lambda t, c: t.update({NAME: t[NAME].to(torch.int8)}),
        rf"{NAME}: expected float16, bfloat16 or float32, found int8",
    ),
    "no table": (
        lambda t, c: t.update({POSITIONS: t[POSITIONS][:-1].clone()}),
        r"position_embedding.*expected 1 \+ g \* g rows, got 9",
    ),
    "a vector": (
        lambda t, c: t.update({"output.weight": torch.zeros(50)}),
        r"output\.weight: expected 2 dimensions, got shape \[50\]",
    ),
    "layers": (lambda t, c: c.update(num_hidden_layers=3), r"is missing: model\.layers\.2\."),
    "fewer layers": (
        lambda t, c: c.update(num_hidden_layers=1),
        r"has no place: model\.layers\.1\..* and \d+ more",
    ),
    "hidden": (
        lambda t, c: c.update(hidden_size=128),
        r"does not fit: .*: expected \[\d*, ?128\], found",
    ),
    "no heads": (
        lambda t, c: c.__delitem__("num_attention_heads"),
        "num_attention_heads: expected a positive whole number, got None",
    ),
    "odd heads": (
        lambda t, c: c.update(num_attention_heads=5),
        "num_attention_heads: expected a divisor of hidden_size 64, got 5",
    ),
    "rope": (
        lambda t, c: c.update(rope_scaling={"type": "linear", "factor": 2.0}),
        "rope_scaling: expected None or type 'dynamic'",
    ),
    "a field of another kind": (
        lambda t, c: c.update(rms_norm_eps="small"),
        "a field is of another kind than expected .*rms_norm_eps",
    ),
    "another model": (
        lambda t, c: c.update(model_type="bert", architectures=["BertModel"]),
        r"config\.json: expected the official CoLLaVO.*got model_type 'bert'",
    ),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_tensors_and_fields_that_do_not_fit(name: str, tmp_path: Path) -> None:
    tensors, values = official_tensors(SMALL), official_config(SMALL)
    damage, message = DAMAGES[name]
    damage(tensors, values)
    source = write_folder(tmp_path / "official", tensors, values)
    expect_refused(source, ValueError, message)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("lora", {"alpha": float("nan")}, "lora: alpha: expected a finite number, got nan"),
        ("lora", {"alpha": "8"}, "lora: alpha: expected a finite number, got '8'"),
        ("lora", {"alpha": 8, "r": 9}, "lora: r: expected 4, the rows of Plora_A, got 9"),
        ("rope_theta", "much", "rope_theta: expected a positive number, got 'much'"),
        ("rope_theta", -1, "rope_theta: expected a positive number, got -1"),
        ("rope_scaling", {"type": "dynamic", "factor": 0}, "factor: expected a positive number"),
        ("pad_token_id", 99, "pad_token_id: expected a whole number from -50 to 49, got 99"),
        ("tie_word_embeddings", True, "tie_word_embeddings: expected false, got True"),
        ("vision_config", {"select_layer": 9}, "select_layer: expected .* from -2 to 1, got 9"),
    ],
)
def test_fields_that_no_model_can_have(
    tmp_path: Path, field: str, value: Any, message: str
) -> None:
    """They gave a folder that could not be loaded, computed NaN, or computed something else."""
    values = official_config(SMALL, **{field: value})
    source = write_folder(tmp_path / "official", official_tensors(SMALL), values)
    expect_refused(source, ValueError, message)


def test_values_that_the_target_could_not_hold(tmp_path: Path) -> None:
    """Beyond float16 they became infinite, and one NaN spoilt 16,384 weights around it."""
    tensors = {name: value.bfloat16() for name, value in official_tensors(SMALL).items()}
    tensors[NAME][3, 5] = 1e6
    source = write_folder(tmp_path / "large", tensors, official_config(SMALL))
    halves = Options(dtype=torch.float16)
    expect_refused(
        source, ValueError, r"--dtype: .*up_proj\.weight: has values up to 9.99e", halves
    )
    for value in (torch.nan, torch.inf, -torch.inf):
        tensors[NAME][3, 5] = value
        source = write_folder(tmp_path / str(value), tensors, official_config(SMALL))
        named = r"--quantize: .*up_proj\.weight: has values that are not finite"
        expect_refused(source, ValueError, named, Options(quantize="nf4"))
        # As they are they can be kept, and in a smaller dtype.
        convert_folder(source, tmp_path / f"{value} kept", halves)


@pytest.mark.parametrize(
    "option",
    [{"dtype": "float16"}, {"dtype": torch.int8}, {"quantize": "fp4"}, {"crayon_mode": "x"}]
    + [{"image_token": token} for token in (True, 3.5)],
)
def test_options_of_another_kind(option: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"{next(iter(option))}: expected None"):
        Options(**option)


@pytest.mark.parametrize("kind", ["safetensors", "torch"])
def test_shards_that_are_truncated_missing_or_too_many(kind: str, tmp_path: Path) -> None:
    tensors = official_tensors(SMALL)
    source = write_folder(
        tmp_path / "official", tensors, official_config(SMALL), kind=kind, shards=3
    )
    shards = sorted(source.glob("*-of-*"))
    whole = shards[1].read_bytes()
    for part in (whole[: len(whole) // 2], whole[:4], whole[:-1]):
        shards[1].write_bytes(part)
        expect_refused(source, ValueError, f"{shards[1].name}: not a complete {kind}")
    shards[1].unlink()
    expect_refused(source, FileNotFoundError, f"{shards[1].name}: missing")
    shards[1].write_bytes(whole)
    surplus = source / shards[2].name.replace("00003-of", "00004-of")
    surplus.write_bytes(whole)
    expect_refused(source, ValueError, f"surplus shards .* {surplus.name}")
    surplus.unlink()
    shards[1].write_bytes(shards[0].read_bytes())
    expect_refused(source, ValueError, r"holds .* which .* holds too")
    shards[1].write_bytes(whole)
    next(source.glob("*.index.json")).unlink()
    expect_refused(source, FileNotFoundError, r"index\.json: missing beside")


def test_an_index_that_does_not_describe_its_shards(tmp_path: Path) -> None:
    source = write_folder(
        tmp_path / "official", official_tensors(SMALL), official_config(SMALL), shards=2
    )
    path = source / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    first, second = sorted(set(index["weight_map"].values()))
    moved = index["weight_map"] | {NAME: second if index["weight_map"][NAME] == first else first}
    less = {name: file for name, file in index["weight_map"].items() if name != NAME}
    outside = dict.fromkeys(index["weight_map"], "../model.safetensors")
    for placed, message in (
        (moved, rf"its index expects {NAME} in"),
        (less, rf"in its shards and not in their index: {NAME}"),
        (outside, "expected names of files beside it"),
    ):
        path.write_text(json.dumps(index | {"weight_map": placed}))
        expect_refused(source, ValueError, message)
    path.write_text(json.dumps(index))
    save_file({"a": torch.zeros(1)}, source / "model.safetensors")
    expect_refused(source, ValueError, "expected the weights in one file or in shards")


def test_a_torch_file_of_code_is_not_run(tmp_path: Path) -> None:
    class Trap:
        def __reduce__(self) -> tuple[Any, ...]:
            return os.mkdir, (str(tmp_path / "ran"),)

    source = write_folder(
        tmp_path / "official", official_tensors(SMALL), official_config(SMALL), kind="torch"
    )
    torch.save({"a": Trap()}, source / "pytorch_model.bin")
    expect_refused(source, ValueError, "not a complete torch file of weights alone")
    torch.save([torch.zeros(1)], source / "pytorch_model.bin")
    expect_refused(source, ValueError, "expected a dictionary of tensors, got list")
    assert not (tmp_path / "ran").exists()


def test_the_command_says_it_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = write_folder(tmp_path / "official", official_tensors(SMALL), official_config(SMALL))
    full = tmp_path / "full"
    full.mkdir()
    (full / "notes.txt").write_text("mine")
    (tmp_path / "file").write_text("mine")
    for arguments, message in (
        (["official", "full"], "full: expected a new or empty folder, it holds notes.txt"),
        (["official", "official"], "official: expected a new or empty folder"),
        (["official", "file"], "file: expected a new or empty folder, got a file"),
        (["official", "new", "--to-official"], "is the official CoLLaVO: expected no --to-"),
        (["official", "new", "--image-token", "<im>"], "expected an id, since the source has no"),
        (["official", "new", "--image-token", "52"], "from 0 to the embedding's 50 rows, got 52"),
        (["nowhere", "new"], "nowhere: no such model folder"),
        (["full", "new"], "config.json: missing from the model folder"),
        (["official", "file/new"], "file"),
    ):
        places = [str(tmp_path / each) for each in arguments[:2]]
        assert main(["convert", *places, *arguments[2:]]) == 2
        said = capsys.readouterr()
        assert message in said.err and said.err.count("\n") == 1, said.err
    assert [path.name for path in full.iterdir()] == ["notes.txt"]
    assert not (tmp_path / "new").exists()
    assert main(["convert", str(source), str(tmp_path / "own"), "--image-token", "50"]) == 0
    said = capsys.readouterr()
    assert main(["convert", str(tmp_path / "own"), str(tmp_path / "new")]) == 2
    assert "is a CoLLaVO folder: expected --to-official" in capsys.readouterr().err
    options = ["--to-official", "--quantize", "nf4"]
    assert main(["convert", str(tmp_path / "own"), str(tmp_path / "new"), *options]) == 2
    assert "--quantize: expected none beside --to-official" in capsys.readouterr().err
