"""``swap_linears`` changes a decoder's linear layers alone, all of them or none."""

from __future__ import annotations

import copy
from typing import Any

import bitsandbytes
import peft
import pytest
import torch
from torch import nn

from collavo_kernels.nn import DualQLoRALinear, crayon_context, swap_linears
from tests.nn.foreign.llava_stand_in import HIDDEN, stand_in
from tests.nn.foreign.stand_in_batch import ROWS, batch, where

SEVEN = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def kinds(model: nn.Module) -> dict[str, type[nn.Module]]:
    return {name: type(module) for name, module in model.named_modules()}


@torch.no_grad()
def test_the_decoders_linear_layers_and_no_others() -> None:
    """Not the tower's, which have the same names, the projector, or lm_head."""
    model = stand_in()
    before, names, expected = kinds(model), list(model.state_dict()), model(**batch(model)).logits
    old = swap_linears(model, adapters=(), quantized=False)
    assert [n.split(".")[-1] for n in old] == SEVEN * 2
    after = kinds(model)
    assert {n for n in before if before[n] is not after[n]} == set(old)
    assert all(after[name] is DualQLoRALinear for name in old)
    assert sorted(model.state_dict()) == sorted(names)
    torch.testing.assert_close(model(**batch(model)).logits, expected, rtol=1e-5, atol=1e-5)
    assert swap_linears(model) == {}
    for name, layer in old.items():
        model.set_submodule(name, layer)
    assert kinds(model) == before
    assert torch.equal(model(**batch(model)).logits, expected)


def test_a_pattern_chooses_and_modes_stay() -> None:
    model = stand_in().train()
    model.model.layers[0].eval()
    old = swap_linears(model, r"layers\.0\..*(q|gate)_proj$", rank=4)
    assert list(old) == ["model.layers.0.self_attn.q_proj", "model.layers.0.mlp.gate_proj"]
    layer = model.model.layers[0].self_attn.q_proj
    assert isinstance(layer, DualQLoRALinear) and layer.quantized and not layer.training
    assert layer.adapter("vl").a.shape == (4, HIDDEN)
    with pytest.raises(ValueError, match=r"pattern: .* like model.layers.0.* got 'vision_tower'"):
        swap_linears(model, "vision_tower")


def four_bits(model: Any) -> Any:
    for layer in model.model.layers:
        q = layer.self_attn.q_proj
        made = bitsandbytes.nn.Linear4bit(HIDDEN, HIDDEN, quant_type="nf4")
        # Of blocks that span two rows its CPU kernel reads other scales than it wrote.
        made.weight = bitsandbytes.nn.Params4bit(
            q.weight.data, requires_grad=False, quant_type="nf4", blocksize=32
        )
        made.bias = q.bias
        layer.self_attn.q_proj = made.to("cpu")
    return model


@torch.no_grad()
def test_bitsandbytes_layers_give_their_bytes() -> None:
    model = four_bits(stand_in()).train()  # in eval mode it repacks them at its first forward
    expected = model(**batch(model)).logits
    codes = model.model.layers[1].self_attn.q_proj.weight.clone()
    swap_linears(model, "q_proj", rank=4, block_size=64)
    layer = model.model.layers[1].self_attn.q_proj
    assert isinstance(layer, DualQLoRALinear) and torch.equal(layer.weight, codes)
    torch.testing.assert_close(model(**batch(model)).logits, expected, rtol=1e-4, atol=1e-4)


def hooked(model: Any) -> Any:
    model.model.layers[1].self_attn.o_proj.register_forward_hook(lambda *_: None)
    return model


def hooked_behind(model: Any) -> Any:
    model.model.layers[1].self_attn.o_proj.register_full_backward_hook(lambda *_: None)
    return model


def normed(model: Any) -> Any:
    nn.utils.parametrizations.weight_norm(model.model.layers[1].self_attn.o_proj)
    return model


def tuned(model: Any) -> Any:
    config = peft.LoraConfig(r=2, target_modules=r".*layers.1.self_attn.q_proj")
    return peft.get_peft_model(model, config)


def subclassed(model: Any) -> Any:
    class Scaled(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return 2 * super().forward(x)

    model.model.layers[1].mlp.up_proj = Scaled(HIDDEN, 48)
    return model


def not_yet_in_4_bits(model: Any) -> Any:
    layer = bitsandbytes.nn.Linear4bit(HIDDEN, HIDDEN, quant_type="nf4")
    model.model.layers[1].self_attn.o_proj = layer
    return model


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (hooked, r"model.layers.1.self_attn.o_proj: has hooks"),
        (hooked_behind, r"model.layers.1.self_attn.o_proj: has hooks"),
        (normed, r"layers.1.self_attn.o_proj: its weight is made by a parametrization"),
        (tuned, r"layers.1.self_attn.q_proj.base_layer: PEFT's adapters"),
        (subclassed, r"layers.1.mlp.up_proj: expected nn.Linear .* got .*Scaled"),
        (not_yet_in_4_bits, "quantised yet|quant_state"),
    ],
)
def test_all_or_nothing(damage: Any, words: str) -> None:
    model = damage(stand_in())
    before = kinds(model)
    with pytest.raises(ValueError, match=words):
        swap_linears(model)
    assert kinds(model) == before
    with pytest.raises(TypeError, match="ranks"):
        swap_linears(stand_in(), ranks=4)


@torch.no_grad()
def test_layers_that_a_context_has_seen() -> None:
    """They have a class of their own then; what comes in their place gets it anew."""
    model = stand_in()
    crayon = (torch.randn(4, HIDDEN), ROWS)
    with crayon_context(model, crayon, where(model)):
        expected = model(**batch(model)).logits
    twin = copy.deepcopy(model)
    assert len(swap_linears(model, adapters=(), quantized=False)) == 14
    for each in (model, twin):
        with crayon_context(each, crayon, where(each)):
            found = each(**batch(each)).logits
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
