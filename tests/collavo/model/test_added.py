"""Crayon, branches and adapters in files of their own: bit-equal, whole, and where they belong."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_crayon_model import draw_added, make_batch, make_llava
from tiny_families import make_family, make_inputs
from transformers import MistralConfig, Phi3Config, Qwen2Config

import collavo
from collavo import apply_to_llava
from collavo.model.added import SETTINGS, WEIGHTS

ADAPTERS: dict[str, Any] = {
    "adapters": ("image", "vl"),
    "image_adapters": ("image",),
    "lora_rank": 3,
    "lora_alpha": 5.0,
    "crayon_rank": 2,
    "crayon_scaling": 0.5,
}


def patched(kind: Any = Qwen2Config, **options: Any) -> tuple[Any, Any]:
    model: Any = make_llava(kind)
    handle = apply_to_llava(model, **{**ADAPTERS, **options})
    draw_added(model)
    return model, handle


def with_odd_ranks(model: Any) -> None:
    """What ``load_peft_adapter`` of an rsLoRA adapter leaves: other ranks, scalings off a grid."""
    linear = model.model.language_model.layers[1].self_attn.o_proj
    a, b = (torch.randn(shape) * 0.1 for shape in ((33, 32), (32, 33)))
    linear.set_adapter("vl", a, b, 8 / 33**0.5)


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(**make_batch()).logits  # type: ignore[no-any-return]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("added")
    patched()[1].save_added(folder)
    return folder


@pytest.mark.parametrize("mode", ["attention", "projection", "none"])
@pytest.mark.parametrize("kind", [Qwen2Config, Phi3Config])
def test_they_come_back_to_a_stock_and_to_a_patched_model(
    tmp_path: Path, kind: Any, mode: Any
) -> None:
    model, handle = patched(kind, crayon_mode=mode)
    if kind is Qwen2Config:
        with_odd_ranks(model)
    handle.save_added(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [SETTINGS, WEIGHTS]
    stock = make_llava(kind)
    plain = {k: v for k, v in make_batch().items() if "crayon" not in k}
    before = stock(**plain).logits
    made = collavo.load_added(stock, tmp_path)
    _, other_handle = patched(kind, crayon_mode=mode, lora_rank=1, lora_alpha=1.0)
    other_handle.load_added(tmp_path)
    expected = handle.added_state_dict()
    for each in (made, other_handle):
        found = each.added_state_dict()
        assert list(found) == list(expected)
        for name, value in expected.items():
            assert found[name].dtype == value.dtype and torch.equal(found[name], value), name
        assert torch.equal(logits(each.model), logits(model))
    made.save_pretrained(tmp_path / "whole")
    assert torch.equal(logits(collavo.load_pretrained(tmp_path / "whole")), logits(model))
    assert torch.equal(made.undo()(**plain).logits, before)
    with pytest.raises(ValueError, match="save_added: the model was restored"):
        made.save_added(tmp_path)


def test_a_whole_model_keeps_scalings_that_no_alpha_gives(tmp_path: Path) -> None:
    """An alpha divided by its rank misses one in ten of rsLoRA's scalings by a last bit."""
    model, _ = patched()
    with_odd_ranks(model)
    for _ in range(2):
        model.save_pretrained(tmp_path)
        model = collavo.load_pretrained(tmp_path)
        scaling = model.model.language_model.layers[1].self_attn.o_proj.scaling
        assert scaling["vl"] == 8 / 33**0.5


def test_they_know_their_model_in_4_bits_and_in_16(saved: Path) -> None:
    """The same model quantised or cast is the same model."""
    model, _ = patched(quantize="nf4")
    stock = make_llava(Qwen2Config)
    handle = apply_to_llava(stock, quantize="nf4", **ADAPTERS)
    handle.load_added(saved)
    assert torch.equal(logits(stock), logits(model))
    for dtype in (torch.bfloat16, torch.float16):
        half = make_llava(Qwen2Config).to(dtype)
        added = collavo.load_added(half, saved).added_state_dict()
        assert next(iter(added.values())).dtype == torch.float32


def test_of_any_family(tmp_path: Path) -> None:
    model: Any = make_family("llava_next")
    handle = apply_to_llava(model, **ADAPTERS)
    draw_added(model)
    handle.save_added(tmp_path)
    stock: Any = make_family("llava_next")
    collavo.load_added(stock, tmp_path)
    inputs = make_inputs("llava_next", [1, 2])
    assert torch.equal(stock(**inputs).logits, model(**inputs).logits)
    with pytest.raises(ValueError, match="with model_type 'llava_next', and this one has 'llava'"):
        collavo.load_added(make_llava(MistralConfig), tmp_path)


def other_weights() -> Any:
    model = make_llava(Qwen2Config)
    weight = model.model.language_model.layers[1].mlp.up_proj.weight
    weight.data.copy_(torch.randn(weight.shape))
    return model


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: make_llava(MistralConfig), "with decoder 'qwen2', and this one has 'mistral'"),
        (other_weights, r"another model\.language_model\.layers\.1\.mlp\.up_proj\.weight"),
        (lambda: patched()[0], "has the crayon already"),
    ],
)
def test_another_model_is_refused_and_stays_what_it_was(
    saved: Path, make: Any, message: str
) -> None:
    model = make()
    kind, before = type(model), {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(ValueError, match=message):
        collavo.load_added(model, saved)
    after = model.state_dict()
    assert type(model) is kind and list(after) == list(before)
    assert all(torch.equal(after[k], before[k]) for k in before)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"crayon_mode": "projection"}, "crayon_mode 'attention', and the model .* 'projection'"),
        ({"adapters": ("image",)}, r"adapters \['image', 'vl'\]"),
        ({"image_adapters": ()}, "image_adapters"),
        ({"num_crayon_classes": 5}, "num_crayon_classes 133"),
        ({"crayon_embed_dim": 8}, "crayon_embed_dim 16"),
        ({"adapter_dtype": torch.bfloat16}, r"adapter_dtype=torch\.float32"),
    ],
)
def test_another_kind_is_refused_before_anything_changes(
    saved: Path, options: dict[str, Any], message: str
) -> None:
    _, handle = patched(**options)
    before = {name: value.clone() for name, value in handle.added_state_dict().items()}
    with pytest.raises(ValueError, match=message):
        handle.load_added(saved)
    after = handle.added_state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items())


def test_damaged_files_are_named(tmp_path: Path, saved: Path) -> None:
    _, handle = patched()

    def refused(message: str, kind: type[Exception] = ValueError) -> None:
        for load in (handle.load_added, lambda f: collavo.load_added(make_llava(Qwen2Config), f)):
            with pytest.raises(kind, match=message):
                load(tmp_path)
        shutil.copytree(saved, tmp_path, dirs_exist_ok=True)

    refused(f"{SETTINGS}: missing", FileNotFoundError)
    (tmp_path / WEIGHTS).unlink()
    refused(f"{WEIGHTS}: missing", FileNotFoundError)
    content = (tmp_path / WEIGHTS).read_bytes()
    (tmp_path / WEIGHTS).write_bytes(content[:-8])
    refused(f"{WEIGHTS}: not a whole safetensors file")
    facts = json.loads((tmp_path / SETTINGS).read_text())
    (tmp_path / SETTINGS).write_text(json.dumps(facts | {"save": "another"}))
    refused("is not of the same save")
    (tmp_path / SETTINGS).write_text(json.dumps(facts | {"samples": None}))
    refused("samples: expected an object")
    decoder, samples = facts["crayon"]["decoder"], facts["samples"]
    for part, field, message in (
        (decoder, "crayon_rank", "a field is of another kind"),
        (decoder, "lora_dropout", "a field is of another kind"),
        (samples, "lm_head.weight", r"lm_head\.weight: expected bits and values"),
        (samples["model.language_model.embed_tokens.weight"], 1, "expected bits and values"),
    ):
        value, part[field] = part[field], ["nf4"]
        (tmp_path / SETTINGS).write_text(json.dumps(facts))
        part[field] = value
        refused(message)
    tensors, meta = load_file(tmp_path / WEIGHTS), {"format": "pt", "save": facts["save"]}
    first = next(iter(tensors))
    save_file({k: v for k, v in tensors.items() if k != first}, tmp_path / WEIGHTS, meta)
    refused("1 tensors are missing")
    save_file(tensors | {"surplus": torch.zeros(1)}, tmp_path / WEIGHTS, meta)
    refused("1 tensors have no place in the model, the first is surplus")
    name = "model.crayon_prompt.class_embedding.weight"
    save_file(tensors | {name: torch.zeros(3, 16)}, tmp_path / WEIGHTS, meta)
    factor = next(name for name in tensors if ".lora_A." in name)
    refused(r"class_embedding\.weight: expected floating values \[134, 16\]")
    save_file(
        tensors | {factor: torch.zeros(7, tensors[factor].shape[1])}, tmp_path / WEIGHTS, meta
    )
    refused("expected the rank of its B")
