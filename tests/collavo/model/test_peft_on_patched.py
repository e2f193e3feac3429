"""PEFT's own adapters beside ours in a patched LLaVA: the crayon and the masks reach our layers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from tiny_crayon_model import make_batch, make_llava
from transformers import Phi3Config, Qwen2Config, Qwen3Config

from collavo import apply_to_llava
from collavo_kernels.nn import load_peft_adapter, peft_lora_config

TARGETS = r".*language_model.*\.(q_proj|k_proj|v_proj|qkv_proj|o_proj|gate(_up)?_proj|down_proj)"
OURS: dict[str, Any] = {"image_adapters": ("image",), "lora_rank": 3, "lora_alpha": 2.0}


def patched(kind: Any, mode: str, quantize: Any, adapters: tuple[str, ...]) -> tuple[Any, Any]:
    model: Any = make_llava(kind)
    handle = apply_to_llava(
        model, crayon_mode=mode, crayon_rank=2, adapters=adapters, quantize=quantize, **OURS
    )
    for name, parameter in model.named_parameters():
        if "crayon" in name or ".image." in name:
            generator = torch.Generator().manual_seed(len(name))
            parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return model, handle


@pytest.mark.parametrize("quantize", [None, "nf4"])
@pytest.mark.parametrize("mode", ["attention", "projection"])
# Qwen2's q, k and v have biases, which rows do not get; Qwen3's and Phi-3's linear layers take the
# crayon by themselves, Phi-3's are fused.
@pytest.mark.parametrize("kind", [Qwen2Config, Qwen3Config, Phi3Config])
def test_it_computes_what_a_slot_does(tmp_path: Path, kind: Any, mode: Any, quantize: Any) -> None:
    """Ours acts on image tokens alone, PEFT's on all, and rows stand behind the tokens."""
    model, handle = patched(kind, mode, quantize, ("image",))
    before = model(**make_batch()).logits
    tuned = get_peft_model(model, peft_lora_config(r=2, target_modules=TARGETS))
    assert torch.equal(tuned(**make_batch()).logits, before), "PEFT's B is zero"
    for name, parameter in tuned.named_parameters():
        if ".default." in name:
            parameter.data.normal_(std=0.3, generator=torch.Generator().manual_seed(len(name)))
    tuned.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"unload\(\)"):
        handle.undo()

    twin, _ = patched(kind, mode, quantize, ("image", "vl"))
    load_peft_adapter(twin, tmp_path, "vl")
    batch = make_batch() | {"labels": make_batch()["input_ids"]}
    for each in (tuned, twin):
        for parameter in each.parameters():
            parameter.requires_grad_(parameter.is_floating_point())
    found, expected = tuned(**batch), twin(**batch)
    valid = batch["attention_mask"].bool()
    torch.testing.assert_close(found.logits[valid], expected.logits[valid], rtol=1e-4, atol=1e-5)
    assert float((found.logits - before).detach()[valid].abs().max()) > 0.1
    found.loss.backward()
    expected.loss.backward()
    theirs = dict(twin.named_parameters())
    compared = 0
    for name, parameter in tuned.named_parameters():
        plain = name.removeprefix("base_model.model.").replace("base_layer.", "")
        plain = plain.replace(".default.", ".vl.")
        if parameter.grad is not None and (".lora_" in plain or "crayon" in plain):
            torch.testing.assert_close(parameter.grad, theirs[plain].grad, rtol=2e-3, atol=1e-5)
            compared += 1
    assert compared > 25
    tokens = [
        each.generate(**make_batch(), max_new_tokens=4, do_sample=False) for each in (tuned, twin)
    ]
    assert torch.equal(*tokens)

    tuned.unload()
    assert torch.equal(model(**make_batch()).logits, before)
    again = PeftModel.from_pretrained(model, tmp_path, config=peft_lora_config(tmp_path))
    assert torch.equal(again(**make_batch()).logits, found.logits)
    again.unload()
    stock = make_llava(kind)
    plain_batch = {k: v for k, v in make_batch().items() if "crayon" not in k}
    assert torch.equal(handle.undo()(**plain_batch).logits, stock(**plain_batch).logits)
