"""``apply_to_llava`` on every family: as the stock model with plain hooks, there and back."""

from __future__ import annotations

import copy
import inspect
from pathlib import Path
from typing import Any

import pytest
import torch
from test_apply_to_llava import assert_same, plain, snapshot
from tiny_families import FAMILIES, HIDDEN, IMAGE, VIDEO, make_family, make_inputs
from torch import Tensor, nn
from transformers import Idefics2Config, Idefics2ForConditionalGeneration, MistralConfig
from transformers.models.idefics2.configuration_idefics2 import (
    Idefics2PerceiverConfig,
    Idefics2VisionConfig,
)

from collavo import apply_to_llava
from collavo_kernels.nn import load_peft_adapter
from collavo_kernels.testing import assert_within_budget
from tests.fuzz.stock_crayon import StockWithCrayon

pytestmark = pytest.mark.usefixtures("one_thread")

SETTINGS: dict[str, Any] = {"num_crayon_classes": 9, "max_crayon_number": 4, "crayon_rank": 4}
LORA: dict[str, Any] = {"lora_rank": 2, "lora_alpha": 4.0}
# Of those that differ in how a model is built, not only in what its images are.
CLASSES = [name for name in FAMILIES if "," not in name]


def patched(name: str, **options: Any) -> tuple[Any, Any, StockWithCrayon]:
    """A stock model patched, its handle, and the same stock model with plain hooks."""
    stock = make_family(name)
    model = copy.deepcopy(stock)
    handle = apply_to_llava(model, **SETTINGS, **LORA, **options)
    torch.manual_seed(0)
    for key, parameter in model.named_parameters():
        if "crayon" in key or "lora_" in key:
            parameter.data.normal_(0.0, 0.2)
    names = (tuple(options.get("adapters", ())), tuple(options.get("image_adapters", ())))
    return model, handle, StockWithCrayon(stock, model, *names, 2.0)


def asked(model: Any, batch: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        return model(**batch).logits[batch["attention_mask"].bool()]


def in_double(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    return {k: v.double() if v.is_floating_point() else v for k, v in batch.items()}


def exact_logits(oracle: StockWithCrayon, batch: dict[str, Tensor]) -> Tensor:
    """Logits in float64, of a copy."""
    exact = copy.deepcopy(oracle)
    exact.to(torch.float64)
    return asked(exact.model, in_double(batch))


@pytest.mark.parametrize("mode", ["attention", "projection"])
@pytest.mark.parametrize("name", list(FAMILIES))
def test_forward_gradients_and_the_way_back(name: str, mode: Any) -> None:
    """Two samples of two images and one, padded on the left."""
    fresh, batch = make_family(name), make_inputs(name, [2, 1])
    untouched = asked(fresh, plain(batch))
    exact = asked(copy.deepcopy(fresh).double(), in_double(plain(batch)))
    before = snapshot(fresh)
    handle = apply_to_llava(fresh, **SETTINGS, crayon_mode=mode)
    assert_within_budget(asked(fresh, batch), untouched, exact)
    assert torch.equal(asked(handle.undo(), plain(batch)), untouched)
    assert_same(before, snapshot(fresh))

    model, _, oracle = patched(name, crayon_mode=mode)
    oracle.crayon = {k: v for k, v in batch.items() if k.startswith("crayon")}
    found, expected = asked(model, batch), asked(oracle.model, plain(batch))
    assert not torch.allclose(found, untouched, atol=0.1)
    assert_within_budget(found, expected, exact_logits(oracle, plain(batch)))
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    model(**batch, labels=labels).loss.backward()
    oracle.model(**plain(batch), labels=labels).loss.backward()
    for key, parameter in model.named_parameters():
        if "crayon" in key:
            own = key.split("crayon_prompt.")[-1].split("_model.layers.")[-1]
            wanted = oracle.of(own).grad
            assert parameter.grad is not None and wanted is not None and bool(wanted.any())
            torch.testing.assert_close(parameter.grad, wanted, atol=2e-5, rtol=2e-3)


@pytest.mark.parametrize("name", CLASSES)
def test_adapters_and_4_bits(name: str) -> None:
    """An adapter of image tokens alone beside one of all; the towers stay as they are."""
    options = {"adapters": ("image", "vl"), "image_adapters": ("image",), "quantize": "nf4"}
    stock, batch = make_family(name), make_inputs(name, [1, 2])
    model, handle, oracle = patched(name, **options)
    oracle.crayon = {k: v for k, v in batch.items() if k.startswith("crayon")}
    found, expected = asked(model, batch), asked(oracle.model, plain(batch))
    assert_within_budget(found, expected, exact_logits(oracle, plain(batch)))
    assert torch.equal(asked(handle.undo(), plain(batch)), asked(stock, plain(batch)))


@pytest.mark.parametrize("name", CLASSES)
def test_signatures_are_those_of_the_stock_class(name: str) -> None:
    """``generate`` and Trainer read them; only what encodes images too early is left out."""
    stock = make_family(name)
    model = copy.deepcopy(stock)
    handle = apply_to_llava(model, **SETTINGS)
    crayon = {"crayon_index", "crayon_class", "crayon_number"}
    for own, other in ((model, stock), (model.model, stock.model)):
        found, theirs = (inspect.signature(m.forward).parameters for m in (own, other))
        assert set(found) == set(theirs) - {"mm_encoder_outputs"} | crayon
        assert [n for n in found if n not in crayon] == [n for n in theirs if n in found]
        prepare = "prepare_inputs_for_generation"
        if hasattr(other, prepare):
            found, theirs = (inspect.signature(getattr(m, prepare)) for m in (own, other))
            assert found == theirs
    for modality in ("image", "video"):
        encode = f"get_{modality}_features"
        assert hasattr(model.model, encode) == hasattr(stock.model, encode)
    prompt = model.model.crayon_prompt.class_embedding
    assert prompt.embedding_dim == stock.config.vision_config.hidden_size
    handle.undo()
    assert inspect.signature(model.forward) == inspect.signature(stock.forward)


@pytest.mark.parametrize("name", CLASSES)
def test_features_that_are_merged_in_have_no_places(name: str) -> None:
    model, *_ = patched(name)
    batch = make_inputs(name, [1, 1])
    merged: dict[str, Any] = {k: v for k, v in batch.items() if k.startswith("crayon")}
    merged["inputs_embeds"] = torch.randn(*batch["input_ids"].shape, HIDDEN)
    with pytest.raises(ValueError, match=r"crayon_index: sample 0 has 0 image tokens"):
        model(**merged, attention_mask=batch["attention_mask"])
    with pytest.raises(ValueError, match=r"crayon_index: sample 0 has .* image tokens and a row"):
        wide = torch.zeros(2, batch["crayon_index"].shape[1] + 9, dtype=torch.int32)
        model(**batch | {"crayon_index": wide})


def test_positional_inputs() -> None:
    """Their order differs from class to class."""
    model, *_ = patched("llava_next")
    batch = make_inputs("llava_next", [1, 1])
    named = dict(batch)
    first = [named.pop(n) for n in ("input_ids", "pixel_values", "image_sizes", "attention_mask")]
    assert torch.equal(model(*first, **named).logits, model(**batch).logits)
    with pytest.raises(TypeError, match="expected at most"):
        model.model(*[None] * 40)


def test_images_and_videos_in_a_sample() -> None:
    """The crayon counts the tokens of both, in their order."""
    model, _, oracle = patched("llava_onevision")
    image, video = (make_inputs(f"llava_onevision{s}", [1, 1]) for s in ("", ", videos"))
    batch = {k: torch.cat([image[k], video[k]], 1) for k in ("input_ids", "attention_mask")}
    places = [(each["crayon_index"]) for each in (video, image)]
    batch |= {"crayon_index": torch.cat(places, 1).int()}
    batch |= {k: image[k] for k in ("crayon_class", "crayon_number")}
    batch |= {k: image[k] for k in ("pixel_values", "image_sizes", "batch_num_images")}
    batch |= {"pixel_values_videos": video["pixel_values_videos"]}
    # One sample has its video first.
    for name in ("input_ids", "attention_mask"):
        batch[name][1] = torch.cat([video[name][1], image[name][1]])
    # The images of the two samples have other numbers of tokens.
    images = (batch["input_ids"] == IMAGE) | (batch["input_ids"] == VIDEO)
    counts = images.sum(1)
    batch["crayon_index"] = batch["crayon_index"][:, : int(counts.max())].clone()
    for sample, count in enumerate(counts.tolist()):
        batch["crayon_index"][sample, count:] = -1
    oracle.crayon = {k: v for k, v in batch.items() if k.startswith("crayon")}
    found, expected = asked(model, batch), asked(oracle.model, plain(batch))
    assert_within_budget(found, expected, exact_logits(oracle, plain(batch)))


def make_idefics2() -> Any:
    sizes = {"vocab_size": 64, "hidden_size": HIDDEN, "intermediate_size": 64, "pad_token_id": 0}
    heads = {"num_hidden_layers": 1, "num_attention_heads": 4, "num_key_value_heads": 2}
    tower = {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2}
    config = Idefics2Config(
        vision_config=Idefics2VisionConfig(
            **tower, num_hidden_layers=1, image_size=8, patch_size=4
        ),
        perceiver_config=Idefics2PerceiverConfig(
            hidden_size=HIDDEN,
            resampler_n_latents=3,
            resampler_depth=1,
            resampler_n_heads=2,
            num_key_value_heads=1,
            resampler_head_dim=8,
        ),
        text_config=MistralConfig(**sizes, **heads, sliding_window=None),
        image_token_id=IMAGE,
    )
    torch.manual_seed(0)
    return Idefics2ForConditionalGeneration(config).eval()


def test_a_resampler_leaves_no_places() -> None:
    """Its latents have looked at the whole image: no crayon, but adapters and 4 bits."""
    model = make_idefics2()
    ids = torch.tensor([[1, IMAGE, IMAGE, IMAGE, 5, 6]])
    batch = {"input_ids": ids, "pixel_values": torch.randn(1, 1, 3, 8, 8)}
    before, logits = snapshot(model), model(**batch).logits
    with pytest.raises(ValueError, match=r"crayon_mode: .*Idefics2.* \(config\.perceiver_config\)"):
        apply_to_llava(model)
    assert_same(before, snapshot(model))
    handle = apply_to_llava(model, crayon_mode="none", adapters=("a",), quantize="nf4")
    model(**batch, labels=ids).loss.backward()
    assert all(p.grad is not None for p in model.adapter_parameters("a"))
    handle.undo()
    assert torch.equal(model(**batch).logits, logits)


def test_what_lacks_a_part_is_named() -> None:
    class Headless(nn.Module):
        def generate(self) -> None: ...

    for lacking in (nn.Linear(2, 2), Headless(), make_family("llava").model.language_model):
        with pytest.raises(TypeError, match=r"got .*, which lacks "):
            apply_to_llava(lacking)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["llava_next", "smolvlm"])
def test_adapters_of_peft(name: str, tmp_path: Path) -> None:
    """Loaded from PEFT's folder by the decoder's name, or taken over and given back."""
    peft = pytest.importorskip("peft")
    stock, batch = make_family(name), plain(make_inputs(name, [2, 1]))
    targets = r".*(language|text)_model\.layers.*\.(q|up)_proj"
    lora = peft.LoraConfig(r=2, lora_alpha=4, target_modules=targets, init_lora_weights=False)
    tuned = peft.get_peft_model(copy.deepcopy(stock), lora).eval()
    untouched = asked(tuned, batch)
    exact = asked(copy.deepcopy(tuned).double(), in_double(batch))
    tuned.save_pretrained(tmp_path)
    model = copy.deepcopy(stock)
    apply_to_llava(model, **SETTINGS, **LORA, adapters=("a",))
    load_peft_adapter(model, tmp_path, "a")
    assert_within_budget(asked(model, batch), untouched, exact)
    with pytest.warns(UserWarning, match="adapters of this PeftModel"):
        handle = apply_to_llava(tuned, **SETTINGS)
    assert_within_budget(asked(handle.model, batch), untouched, exact)
    handle.undo()
    assert torch.equal(asked(tuned, batch), untouched)
