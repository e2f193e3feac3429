"""``projector_type="linear"``, LLaVA-1's single layer: made, saved, loaded, trained."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_crayon_model import make_model

from collavo import CollavoConfig, CollavoForConditionalGeneration, CollavoModel, load_pretrained
from collavo.conversion import convert_folder
from collavo.train.parts import part_parameters

NAMES = {"model.multi_modal_projector.weight", "model.multi_modal_projector.bias"}


def batch(model: Any) -> dict[str, Any]:
    torch.manual_seed(4)
    size, token = model.config.vision_config.image_size, model.config.image_token_index
    tokens = (size // model.config.vision_config.patch_size) ** 2
    ids = torch.tensor([[1, *[token] * tokens, 5, 6]])
    return {"input_ids": ids, "pixel_values": torch.randn(1, 3, size, size)}


def test_features_are_one_product() -> None:
    model = make_model(projector_type="linear")
    assert {n for n in model.state_dict() if "multi_modal" in n} == NAMES
    inputs = batch(model)
    features = model.model.get_image_features(inputs["pixel_values"])
    found = getattr(features, "pooler_output", features)[0]
    hidden = model.model.vision_tower(inputs["pixel_values"], output_hidden_states=True)
    layer = model.config.vision_feature_layer
    weight, bias = (model.state_dict()[name] for name in sorted(NAMES, reverse=True))
    wanted = hidden.hidden_states[layer][0, 1:] @ weight.T + bias
    torch.testing.assert_close(found.reshape(wanted.shape), wanted)


@pytest.mark.parametrize("quantize", [None, "nf4"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_saved_model_is_loaded_as_it_was(tmp_path: Path, quantize: Any, dtype: Any) -> None:
    """Dense and in 4 bits, by either way; a model without its head too."""
    model = make_model(projector_type="linear").to(dtype)
    model.add_dual_qlora(quantize=quantize is not None)
    inputs = batch(model)
    inputs["pixel_values"] = inputs["pixel_values"].to(dtype)
    model.save_pretrained(tmp_path)
    for way in (load_pretrained, CollavoForConditionalGeneration.from_pretrained):
        loaded: Any = way(tmp_path)
        assert loaded.config.projector_type == "linear"
        for name, value in model.state_dict().items():
            assert torch.equal(loaded.state_dict()[name], value), name
        assert loaded(**inputs).logits.isfinite().all()
    inner: Any = CollavoModel.from_pretrained(tmp_path)
    assert isinstance(inner.multi_modal_projector, torch.nn.Linear)


def test_the_other_projectors_tensors_are_not_taken(tmp_path: Path) -> None:
    """Their names differ, so a wrong setting is named instead of a projector drawn."""
    make_model(projector_type="linear").save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"no place in the model: .*projector\.bias"):
        load_pretrained(tmp_path, projector_type="mlp2x_gelu")


def test_it_is_a_part_that_can_be_trained() -> None:
    model = make_model(projector_type="linear")
    found = {id(parameter) for parameter in part_parameters(model, "projector")}
    assert found == {id(p) for n, p in model.named_parameters() if n in NAMES}


def test_the_official_layout_has_no_place_for_it(tmp_path: Path) -> None:
    model = make_model(
        projector_type="linear",
        crayon_mode="projection", adapters=("plora",), image_adapters=("plora",), crayon_alpha=256,
        lora_rank=4, lora_alpha=4,
    )  # fmt: skip
    model.save_pretrained(tmp_path / "own")
    with pytest.raises(ValueError, match=r"projector_type: expected 'mlp2x_gelu', got 'linear'"):
        convert_folder(tmp_path / "own", tmp_path / "official", to_official=True)


def test_another_kind_is_named() -> None:
    with pytest.raises(ValueError, match=r"projector_type: expected one of .*got 'mlp3x_gelu'"):
        CollavoConfig(projector_type="mlp3x_gelu")  # type: ignore[arg-type]
