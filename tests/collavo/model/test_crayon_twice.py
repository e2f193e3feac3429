"""A crayon gets into a model in one way: ``apply_to_llava``, or ``crayon_context`` around stock."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from test_apply_to_llava import IMAGE, assert_same, make_batch, plain, snapshot
from tiny_crayon_model import tiny_vision
from tiny_decoder_llavas import ADAPTERS, MODES, SIZES, make_llava, patched
from torch import Tensor
from transformers import GemmaConfig, LlavaConfig, LlavaForConditionalGeneration

from collavo import apply_to_llava
from collavo_kernels.nn import (
    CrayonAttention,
    CrayonInputs,
    CrayonLinearMixin,
    crayon_context,
    remove_crayon_from_linears,
)

# Its attention is replaced; its linear layers carry the crayon; they do, and are fused.
KINDS = ("Llama", "Qwen3", "Phi3")


def context_of(model: Any) -> Any:
    where = make_batch()["input_ids"] == IMAGE
    rows = torch.where(where, 0, -1).int()
    return crayon_context(model, CrayonInputs(torch.ones(1, 64), rows), where)


@torch.no_grad()
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", KINDS)
def test_crayon_context_refuses_a_patched_model_before_it_changes(kind: str, mode: Any) -> None:
    """Put on, it would take the crayon off layers that PEFT stands around, for instance."""
    model = patched(kind, mode, **ADAPTERS)
    before = snapshot(model)
    with (
        pytest.raises(ValueError, match=r"hands crayons to its layers itself .*crayon_index"),
        context_of(model),
    ):
        raise AssertionError("entered")
    assert_same(before, snapshot(model))


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
def test_apply_to_llava_says_that_a_context_was_there(kind: str) -> None:
    """The layers' classes have the names of the stock ones, which a message would print."""
    model, batch = make_llava(kind), plain(make_batch())

    def logits() -> Tensor:
        return model(**batch).logits

    stock = logits()
    with context_of(model):
        crayoned = logits()
    before = snapshot(model)
    with pytest.raises(
        ValueError,
        match=r"^layers\.0\.self_attn\.q.*_proj: carries a crayon already \(crayon_context",
    ):
        apply_to_llava(model)
    assert_same(before, snapshot(model))
    with context_of(model):
        assert torch.equal(logits(), crayoned)

    layers = [module for module in model.modules() if isinstance(module, CrayonLinearMixin)]
    remove_crayon_from_linears(layers)
    handle = apply_to_llava(model)
    fresh = make_llava(kind)
    apply_to_llava(fresh)
    for each in (model, fresh):
        each.model.crayon_prompt.load_state_dict(
            {k: torch.ones_like(v) for k, v in each.model.crayon_prompt.state_dict().items()}
        )
    assert torch.equal(model(**make_batch()).logits, fresh(**make_batch()).logits)
    handle.undo()
    assert torch.equal(logits(), stock)
    with context_of(model):
        assert torch.equal(logits(), crayoned)


def test_crayon_attention_does_not_take_over_a_patched_one() -> None:
    """Its class has the name of the stock one: the message says whose forward it has."""
    attention = patched("Llama", "attention").model.language_model.layers[0].self_attn
    with pytest.raises(ValueError, match=r"got a LlamaAttention with the forward of \S+Crayon"):
        CrayonAttention.from_attention(attention)


@torch.no_grad()
def test_another_decoder_is_refused_with_a_way_that_works() -> None:
    """``crayon_context`` around the stock model is what plain hooks on q, k and v compute."""
    text = GemmaConfig(**SIZES, head_dim=16)
    config = LlavaConfig(
        vision_config=tiny_vision(),
        text_config=text,
        image_token_index=IMAGE,
        vision_feature_layer=-1,
    )
    torch.manual_seed(0)
    model, batch = LlavaForConditionalGeneration(config).eval(), plain(make_batch())
    stock = model(**batch).logits
    with pytest.raises(ValueError, match=r"GemmaAttention.*crayon_context of collavo_kernels\.nn"):
        apply_to_llava(model)
    with context_of(model):
        found = model(**batch).logits
    ones = (batch["input_ids"] == IMAGE)[..., None].float()
    for layer in model.model.language_model.layers:
        for name in ("q_proj", "k_proj", "v_proj"):
            linear = getattr(layer.self_attn, name)
            linear.register_forward_pre_hook(lambda _, args: (args[0] + ones,))
    valid = batch["attention_mask"].bool()
    dense = model(**batch).logits[valid]
    torch.testing.assert_close(found[valid], dense)
    assert float((dense - stock[valid]).abs().max()) > 1e-3
