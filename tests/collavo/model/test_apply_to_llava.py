"""A stock LLaVA model with the crayon put in, and taken out again to the last bit."""

from __future__ import annotations

import copy
import functools
from typing import Any

import pytest
import torch
from tiny import tiny_vision
from torch import nn
from transformers import (
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    MistralConfig,
    Qwen2Config,
)

from collavo import apply_to_llava
from collavo.configuration import CollavoConfig
from collavo.model.layer import CrayonLayerMixin, CrayonMLPMixin
from collavo.model.llava import CollavoForConditionalGeneration
from collavo_kernels.nn import CrayonInputs

pytestmark = pytest.mark.usefixtures("one_thread")

IMAGE = 31
SIZES: dict[str, Any] = {
    "vocab_size": 32,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
}
# Windows shorter than the batch, so that the fused prefill must apply them.
DECODERS = {
    "llama": lambda: LlamaConfig(**SIZES),
    "mistral": lambda: MistralConfig(**SIZES, sliding_window=4),
    "qwen2": lambda: Qwen2Config(
        **SIZES, use_sliding_window=True, sliding_window=4, max_window_layers=1
    ),
}


def make_llava(kind: str) -> Any:
    vision = tiny_vision()
    config = LlavaConfig(
        vision_config=vision,
        text_config=DECODERS[kind](),
        image_token_index=IMAGE,
        vision_feature_layer=-1,
    )
    torch.manual_seed(4)
    model = LlavaForConditionalGeneration(config).eval()
    for parameter in model.parameters():
        parameter.data.add_(torch.randn_like(parameter), alpha=0.1)
    return model


def make_batch() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {
        "input_ids": torch.tensor([[1, 31, 31, 31, 31, 5, 6, 7], [0, 1, 9, 31, 31, 31, 31, 9]]),
        "attention_mask": torch.tensor([[1] * 8, [0] + [1] * 7]),
        "pixel_values": torch.randn(2, 3, 8, 8, generator=generator),
        "crayon_index": torch.tensor([[0, 1, 1, -1], [2, 1, 0, 1]], dtype=torch.int32),
        "crayon_class": torch.tensor([[0, 18, -1], [0, 3, 5]], dtype=torch.int32),
        "crayon_number": torch.tensor([[0, 1, 0], [0, 1, 2]], dtype=torch.int32),
    }


def plain(batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {k: v for k, v in batch.items() if not k.startswith("crayon")}


def generate(model: Any, batch: dict[str, torch.Tensor], **options: Any) -> torch.Tensor:
    options = {"do_sample": False, "max_new_tokens": 4, "suppress_tokens": [IMAGE]} | options
    return model.generate(**batch, **options)


def snapshot(model: nn.Module) -> Any:
    return (
        {k: v.clone() for k, v in model.state_dict().items()},
        [(n, type(m)) for n, m in model.named_modules()],
        [(n, id(p), p.requires_grad) for n, p in model.named_parameters()],
        [(n, len(m._forward_hooks), len(m._forward_pre_hooks)) for n, m in model.named_modules()],
        [sorted(set(vars(m)) - {"training"}) for m in model.modules()],
    )


def assert_same(before: Any, after: Any) -> None:
    assert list(before[0]) == list(after[0])
    assert all(torch.equal(before[0][name], after[0][name]) for name in before[0])
    assert before[1:] == after[1:]


@pytest.mark.parametrize("quantize", [None, "nf4"])
@pytest.mark.parametrize("mode", ["attention", "projection"])
@pytest.mark.parametrize("kind", list(DECODERS))
def test_apply_use_undo(kind: str, mode: Any, quantize: Any) -> None:
    model, batch = make_llava(kind), make_batch()
    model.model.language_model.layers[0].self_attn.register_forward_hook(lambda *_: None)
    valid = batch["attention_mask"].bool()
    logits, tokens = model(**plain(batch)).logits, generate(model, plain(batch))
    before = snapshot(model)

    handle = apply_to_llava(
        model,
        crayon_mode=mode,
        crayon_rank=4,
        adapters=("image", "vl"),
        lora_rank=4,
        quantize=quantize,
    )
    if quantize is None:  # a fresh crayon and fresh adapters have no effect
        torch.testing.assert_close(
            model(**batch).logits[valid], logits[valid], atol=1e-5, rtol=1e-5
        )
        assert torch.equal(generate(model, batch), tokens)
    for parameter in model.crayon_parameters():
        parameter.data.normal_(0.0, 0.3)
    out = model(**batch, labels=batch["input_ids"])
    out.loss.backward()
    assert all(p.grad is not None and bool(p.grad.any()) for p in model.crayon_parameters())
    assert not torch.allclose(model(**plain(batch)).logits[valid], out.logits[valid], atol=1e-3)
    assert torch.equal(generate(model, batch), generate(model, batch, use_cache=False))
    assert generate(model, batch, num_beams=2).shape[0] == 2

    assert handle.undo() is model
    assert_same(before, snapshot(model))
    assert torch.equal(model(**plain(batch)).logits, logits)
    with pytest.raises(ValueError, match="undo"):
        handle.undo()


@pytest.mark.parametrize("mode", ["attention", "projection"])
def test_the_patched_model_equals_the_collavo_model(mode: Any) -> None:
    llava, batch = make_llava("llama"), make_batch()
    apply_to_llava(llava, crayon_mode=mode, crayon_rank=4, adapters=("image",), lora_rank=4)
    for name, parameter in llava.named_parameters():
        if "crayon" in name or "lora" in name:
            parameter.data.normal_(0.0, 0.2)
    config = CollavoConfig(
        vision_config=llava.config.vision_config,
        text_config=SIZES,
        image_token_index=IMAGE,
        vision_feature_layer=-1,
        crayon_mode=mode,
        crayon_rank=4,
        adapters=("image",),
        lora_rank=4,
    )
    own = CollavoForConditionalGeneration(config).eval()
    own.load_state_dict(llava.state_dict(), strict=True)
    assert torch.equal(own(**batch).logits, llava(**batch).logits)


def test_only_this_instance_changes() -> None:
    model, other, batch = make_llava("llama"), make_llava("llama"), make_batch()
    apply_to_llava(model)
    assert type(other) is LlavaForConditionalGeneration
    assert type(make_llava("llama")) is LlavaForConditionalGeneration
    assert not hasattr(other.model, "crayon_prompt")
    assert torch.equal(other(**plain(batch)).logits, make_llava("llama")(**plain(batch)).logits)
    twin = copy.deepcopy(model)
    for parameter in twin.crayon_parameters():
        parameter.data.normal_(0.0, 0.3)
    assert not torch.equal(twin(**batch).logits, model(**batch).logits)


def test_what_was_added_moves_to_another_model() -> None:
    batch = make_batch()
    models = [make_llava("qwen2") for _ in range(2)]
    handles = [apply_to_llava(m, adapters=("image", "vl"), lora_rank=4) for m in models]
    for name, parameter in models[0].named_parameters():
        if "crayon" in name or "lora" in name:
            parameter.data.normal_(0.0, 0.2)
    added = handles[0].added_state_dict()
    assert added and all("crayon_prompt" in n or "lora_" in n for n in added)
    models[1].load_state_dict(added, strict=False)
    assert torch.equal(models[0](**batch).logits, models[1](**batch).logits)


def test_gradient_checkpointing_in_a_patched_model() -> None:
    grads = []
    for checkpointing in (False, True):
        model = make_llava("mistral").train()
        apply_to_llava(model, crayon_mode="projection", crayon_rank=4)
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        torch.manual_seed(0)
        for parameter in model.crayon_parameters():
            parameter.data.normal_(0.0, 0.2)
        batch = make_batch()
        model(**batch, labels=batch["input_ids"]).loss.backward()
        grads.append([p.grad for p in model.crayon_parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


def test_what_cannot_be_patched_is_refused_and_left_as_it_was() -> None:
    with pytest.raises(TypeError, match="expected a vision-language model of transformers"):
        apply_to_llava(nn.Linear(2, 2))  # type: ignore[arg-type]
    model = make_llava("llama")
    handle = apply_to_llava(model)
    with pytest.raises(ValueError, match="has the crayon already"):
        apply_to_llava(model)
    handle.undo()
    before = snapshot(model)
    with pytest.raises(ValueError, match="image_adapters"):
        apply_to_llava(model, image_adapters=("plora",))
    second = model.model.language_model.layers[1].mlp
    second.up_proj = nn.Sequential(second.up_proj)
    with pytest.raises(ValueError, match=r"up_proj: expected nn\.Linear"):
        apply_to_llava(model, crayon_mode="projection", crayon_rank=4)
    second.up_proj = second.up_proj[0]
    assert_same(before, snapshot(model))
    layer = model.model.language_model.layers[0]
    layer.forward = functools.partial(layer.forward)
    with pytest.raises(ValueError, match="forward of its own instance"):
        apply_to_llava(model)


class StandIn(nn.Module):
    """Takes the place of attention or a linear layer, and does not mind what else it is given."""

    def __init__(self, factor: float, *, is_attention: bool = False) -> None:
        super().__init__()
        self.factor, self.is_attention = factor, is_attention

    def forward(self, x: Any = None, *_: Any, hidden_states: Any = None, **__: Any) -> Any:
        if self.is_attention:
            return hidden_states.cumsum(1) * self.factor, None
        return x.sin() * self.factor


@pytest.mark.parametrize("kind", list(DECODERS))
def test_the_layers_own_forward_is_transformers_line_by_line(kind: str) -> None:
    """The mixins write it anew; a transformers that changes it is noticed here."""
    layer = make_llava(kind).model.language_model.layers[0]
    layer.self_attn = StandIn(0.3, is_attention=True)
    for factor, name in enumerate(("gate_proj", "up_proj", "down_proj"), start=1):
        setattr(layer.mlp, name, StandIn(factor))
    x = torch.randn(2, 5, 32)
    theirs = layer(x)
    layer.mlp.__class__ = type("MLP", (CrayonMLPMixin, type(layer.mlp)), {})
    layer.__class__ = type("Layer", (CrayonLayerMixin, type(layer)), {})
    assert torch.equal(layer(x), theirs)
    assert torch.equal(layer(x, crayon=CrayonInputs()), theirs)


@pytest.mark.parametrize("part", ["layer", "mlp"])
def test_a_forward_that_transformers_did_not_write_is_refused(part: str) -> None:
    """The crayon would replace what another package computes."""
    model = make_llava("qwen2")
    layer = model.model.language_model.layers[1]
    module = layer if part == "layer" else layer.mlp
    original = type(module)
    module.__class__ = type("Patched", (original,), {"forward": lambda self, x: x})
    with pytest.raises(ValueError, match=r"got test_apply_to_llava\..*, which the crayon does"):
        apply_to_llava(model)
    # A subclass that leaves the forward alone is none of our business.
    module.__class__ = type("Renamed", (original,), {})
    apply_to_llava(model).undo()
    assert type(module).__name__ == "Renamed"
