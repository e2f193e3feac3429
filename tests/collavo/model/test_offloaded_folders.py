"""Folders that are loaded with a device map: what is on disk computes, is saved and loads again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_crayon_model import make_batch, make_model, make_patched

from collavo import load_pretrained
from collavo.model.llava import CollavoForConditionalGeneration
from collavo_kernels._requirements import shortfall

pytest.importorskip("accelerate")
PARTS = {
    **dict.fromkeys(("model.vision_tower", "model.multi_modal_projector", "lm_head"), "cpu"),
    **dict.fromkeys(("model.language_model", "model.crayon_prompt"), "disk"),
}


def load_offloaded(folder: Path, parts: Any = PARTS, **options: Any) -> Any:
    return CollavoForConditionalGeneration.from_pretrained(
        folder, device_map=parts, offload_folder=folder / "offloaded", **options
    )


def state(model: Any) -> dict[str, torch.Tensor]:
    """A layer that was loaded has its scaling from the configuration, and no entry for it."""
    return {k: v for k, v in model.state_dict().items() if ".lora_scaling." not in k}


@pytest.mark.parametrize("parts", [PARTS, {"": "disk"}], ids=["decoder", "all"])
@pytest.mark.parametrize("mode", ["attention", "projection"])
@pytest.mark.parametrize("make", [make_model, make_patched])
def test_a_4bit_folder_on_disk(make: Any, mode: str, parts: Any, tmp_path: Path) -> None:
    """transformers' loader stores parameters, which are not the entries of the state dict."""
    model, batch = make(adapters=("image",), crayon_mode=mode, quantize="nf4"), make_batch()
    expected = model(**batch).logits
    model.save_pretrained(tmp_path / "saved")
    loaded = load_pretrained(
        tmp_path / "saved", device_map=parts, offload_folder=tmp_path / "offloaded"
    )
    if len(parts) == 1 and shortfall("transformers", "5.15"):
        with pytest.raises(ValueError, match=r"a device map of one place"):
            loaded.save_pretrained(tmp_path / "again")
        return
    for _ in range(2):  # also after a forward has brought the values and let them go
        assert loaded.get_submodule("model.language_model.layers.0.mlp.up_proj").weight.is_meta
        loaded.save_pretrained(tmp_path / "again", max_shard_size="40KB")
        again = load_pretrained(tmp_path / "again")
        own, other = state(again), state(model)
        assert list(own) == list(other) and all(torch.equal(own[n], other[n]) for n in own)
        assert torch.equal(again(**batch).logits, expected)
        assert torch.equal(loaded(**batch).logits, expected)


@pytest.mark.parametrize("quantize", [None, "nf4"])
def test_what_would_be_lost_on_disk_is_refused(quantize: Any, tmp_path: Path) -> None:
    """Drawn adapters are in no file, and a hook keeps what a layer had when it was put on."""
    make_model(adapters=("image",), quantize=quantize).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"device_map: offloads .*\.vl\.weight to the disk, which"):
        load_offloaded(tmp_path, adapters=("image", "vl"))
    model = load_offloaded(tmp_path)
    before = model.config.to_dict()
    with pytest.raises(ValueError, match=r"add_dual_qlora: layers\.0\..*q_proj is offloaded"):
        model.add_dual_qlora(("vl",), quantize=False)
    if quantize is None:
        with pytest.raises(ValueError, match=r"add_dual_qlora: layers\.0\..*q_proj is offloaded"):
            model.add_dual_qlora((), quantize=True)
    assert model.config.to_dict() == before
    model.add_dual_qlora((), quantize=quantize is not None)  # nothing to change


def test_an_adapter_that_stays_in_memory_is_drawn(tmp_path: Path) -> None:
    make_model(adapters=("image",), quantize="nf4").save_pretrained(tmp_path)
    parts = {**PARTS, "model.language_model": "cpu"}
    model = load_offloaded(tmp_path, parts, adapters=("image", "vl"))
    expected = load_pretrained(tmp_path)(**make_batch()).logits
    assert torch.equal(model(**make_batch()).logits, expected)
