"""``crayon_context`` on a model that merges images by itself equals the crayon's dense form."""

from __future__ import annotations

import copy
import io
import threading
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import (
    CLIPVisionConfig,
    CLIPVisionModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from collavo_kernels.nn import (
    CrayonAttention,
    CrayonInputs,
    DualQLoRALinear,
    crayon_context,
    swap_linears,
)
from collavo_kernels.nn.foreign.decoder import find_decoder
from collavo_kernels.testing import assert_within_budget
from tests.nn.foreign.llava_stand_in import HIDDEN, SIZES, StandIn, stand_in
from tests.nn.foreign.stand_in_batch import (
    CLASSES,
    IDS,
    LABELS,
    MASK,
    NUMBERS,
    ROWS,
    batch,
    dense_form,
    images,
    prompt,
    results,
    scattered,
    where,
)

GREEDY: dict[str, Any] = {"max_new_tokens": 5, "do_sample": False}


@cache
def dense(dtype: torch.dtype, attention: str = "sdpa") -> dict[str, Tensor]:
    """A training step of the stand-in with the crayon's dense form."""
    model, crayon = stand_in(dtype), prompt(dtype)
    model.set_attn_implementation(attention)
    index = scattered(where(model).mask)

    def run() -> Any:
        with dense_form(model.model.layers, crayon.project(CLASSES, NUMBERS), index):
            return model(**batch(model), labels=LABELS)

    return results(run, model, crayon)


def step(model: StandIn) -> dict[str, Tensor]:
    """The same training step under a context; the backward runs outside of it."""
    crayon, found = prompt(), where(model)

    def run() -> Any:
        with crayon_context(model, (crayon.project(CLASSES, NUMBERS), ROWS), found):
            return model(**batch(model), labels=LABELS)

    return results(run, model, crayon)


def assert_dense(found: dict[str, Tensor]) -> None:
    """Every logit, the loss, and every gradient, those of the crayon's parameters included.

    PyTorch's own error is the larger one of two ways: sums have other orders here, too.
    """
    own = [dense(torch.float32, attention) for attention in ("sdpa", "eager")]
    exact = dense(torch.float64)
    assert set(found) == set(exact)
    for name, truth in exact.items():
        honest = max((each[name] for each in own), key=lambda x: float((x - truth).abs().max()))
        assert_within_budget(found[name], honest, truth, name=name)


def with_crayon_attention(model: StandIn) -> StandIn:
    for layer in model.model.layers:
        layer.self_attn = CrayonAttention.from_attention(layer.self_attn)
    return model


def with_dual_linears(model: StandIn) -> StandIn:
    swap_linears(model, adapters=(), quantized=False)
    return model


WAYS = {"linears": lambda m: m, "module": with_crayon_attention, "swapped": with_dual_linears}


@pytest.mark.parametrize("way", WAYS)
def test_loss_and_gradients_are_those_of_the_dense_form(way: str) -> None:
    assert_dense(step(WAYS[way](stand_in())))


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("way", WAYS)
def test_checkpoints_keep_the_crayon(way: str, reentrant: bool) -> None:
    """The backward runs every layer again when the context was left; counted, lest it did not."""
    model = WAYS[way](stand_in()).train()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    calls = []
    model.model.layers[0].input_layernorm.register_forward_hook(lambda *_: calls.append(1))
    assert_dense(step(model))
    assert len(calls) == 2


def test_two_forward_passes_before_a_backward_keep_a_crayon_each() -> None:
    model = stand_in().train()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    tables = [torch.randn(4, HIDDEN, requires_grad=True) for _ in range(2)]

    def loss(table: Tensor) -> Tensor:
        with crayon_context(model, (table, ROWS), where(model)):
            return model(**batch(model), labels=LABELS).loss

    alone = [torch.autograd.grad(loss(table), table)[0] for table in tables]
    torch.stack([loss(table) for table in tables]).sum().backward()
    for table, gradient in zip(tables, alone, strict=True):
        assert torch.equal(table.grad, gradient)


def test_the_backward_may_run_in_another_thread() -> None:
    """On a GPU the engine's own threads run checkpointed layers again."""
    model = stand_in().train()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    crayon, gradients = prompt(), []
    for thread in (False, True):
        with crayon_context(model, (crayon.project(CLASSES, NUMBERS), ROWS), where(model)):
            loss = model(**batch(model), labels=LABELS).loss
        crayon.zero_grad()
        if thread:
            other = threading.Thread(target=loss.backward)
            other.start()
            other.join()
        else:
            loss.backward()
        gradients.append([p.grad.clone() for p in crayon.parameters()])
    assert all(map(torch.equal, *gradients))


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"use_cache": True, "num_beams": 2}])
def test_generate(way: str, options: dict[str, Any]) -> None:
    """The prefill takes the crayon and decode steps are left alone, twice in one context."""
    model = stand_in()
    table, found = prompt().project(CLASSES, NUMBERS).detach(), where(model)
    inputs = {"inputs": IDS, "attention_mask": MASK, "images": images(), **GREEDY, **options}
    plain = model.generate(**inputs)
    with dense_form(model.model.layers, table, scattered(found.mask)):
        expected = model.generate(**inputs)
    assert not torch.equal(plain, expected)
    model = WAYS[way](model)
    with crayon_context(model, (table, ROWS), found):
        tokens = [model.generate(**inputs) for _ in range(2)]
    assert all(torch.equal(each, expected) for each in tokens)
    assert torch.equal(model.generate(**inputs), plain)


@torch.no_grad()
def test_a_turn_on_a_filled_cache_is_left_alone() -> None:
    """Even one that is as long as the prefill: the image's crayon is in the cache."""
    model = stand_in()
    table, found = prompt().project(CLASSES, NUMBERS), where(model)
    turn = torch.randint(1, 20, (2, found.mask.shape[1]))
    logits = []
    for inside in (True, False):
        with crayon_context(model, (table, ROWS), found):
            first = model(**batch(model), use_cache=True)
            if inside:
                logits.append(model(turn, past_key_values=first.past_key_values).logits)
        if not inside:
            logits.append(model(turn, past_key_values=first.past_key_values).logits)
    assert torch.equal(*logits)


@torch.no_grad()
def test_two_threads_have_their_own_crayons() -> None:
    model = stand_in()
    found = where(model)
    tables = [torch.randn(4, HIDDEN) for _ in range(2)]

    @torch.no_grad()
    def run(table: Tensor) -> Tensor:
        with crayon_context(model, (table, ROWS), found):
            return model(**batch(model)).logits

    alone = [run(table) for table in tables]
    assert not torch.equal(*alone)
    with ThreadPoolExecutor(2) as pool:
        together = list(pool.map(run, tables * 15))
    assert all(torch.equal(logits, alone[i % 2]) for i, logits in enumerate(together))


@torch.no_grad()
def test_another_model_inside_has_no_crayon() -> None:
    """A reference model beside the one that is trained, both seen by a context before."""
    model = stand_in()
    other = copy.deepcopy(model)
    crayon = (torch.randn(4, HIDDEN), ROWS)
    expected = other(**batch(other)).logits
    with crayon_context(other, crayon, where(other)):
        assert not torch.equal(other(**batch(other)).logits, expected)
    with crayon_context(model, crayon, where(model)):
        model(**batch(model))
        assert torch.equal(other(**batch(other)).logits, expected)


@torch.no_grad()
def test_copies_and_pickles_have_what_the_model_has() -> None:
    model = stand_in()
    names = list(model.state_dict())
    crayon = (torch.randn(4, HIDDEN), ROWS)
    for again in range(2):
        with crayon_context(model, crayon, where(model)):
            expected = model(**batch(model)).logits
        file = io.BytesIO()
        torch.save(model, file)
        file.seek(0)
        loaded = torch.load(file, weights_only=False) if again else copy.deepcopy(model)
        with crayon_context(loaded, crayon, where(loaded)):
            assert torch.equal(loaded(**batch(loaded)).logits, expected)
    assert list(model.state_dict()) == names


class SomebodysModel(nn.Module):
    """A tower whose class knows an input embedding, too, before the language model."""

    def __init__(self, wrapped: bool) -> None:
        super().__init__()
        vision = CLIPVisionConfig(
            hidden_size=HIDDEN, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
            image_size=4, patch_size=2,
        )  # fmt: skip
        self.tower = CLIPVisionModel(vision)
        self.language = nn.ModuleDict({"module": stand_in()}) if wrapped else stand_in()


@pytest.mark.parametrize("wrapped", [False, True])
def test_the_decoder_is_found_in_what_somebody_built(wrapped: bool) -> None:
    model = SomebodysModel(wrapped)
    found = find_decoder(model)
    assert type(found.module).__name__ == "StandInModel"
    assert len(found.attentions) == 2 and all("language" in name for name in found.attentions)


def fused() -> Any:
    return Phi3ForCausalLM(Phi3Config(**SIZES))


def normed() -> Any:
    return Qwen3ForCausalLM(Qwen3Config(**SIZES, head_dim=8))


def parallel() -> Any:
    """Attention and MLP side by side, layers and embedding under other names."""
    sizes = {name: size for name, size in SIZES.items() if name != "num_key_value_heads"}
    return GPTNeoXForCausalLM(GPTNeoXConfig(**sizes))


@pytest.mark.parametrize("make", [fused, normed, parallel])
@torch.no_grad()
def test_decoders_of_other_shapes(make: Any) -> None:
    model = make().eval()
    embeds, mask = torch.randn(2, 7, HIDDEN), torch.zeros(2, 7, dtype=torch.bool)
    mask[:, 2:6] = True
    table = torch.randn(4, HIDDEN)
    logits = {}
    for dtype in (torch.float32, torch.float64):
        twin = copy.deepcopy(model).to(dtype)
        with dense_form(twin.base_model.layers, table.to(dtype), scattered(mask)):
            logits[dtype] = twin(inputs_embeds=embeds.to(dtype)).logits
    with crayon_context(model, CrayonInputs(table, scattered(mask)), mask):
        found = model(inputs_embeds=embeds).logits
    assert_within_budget(found, logits[torch.float32], logits[torch.float64])


@pytest.mark.parametrize("first", [False, True], ids=["PEFT first", "context first"])
@torch.no_grad()
def test_the_rows_go_through_adapters_of_peft(first: bool) -> None:
    """Also if they come after a first context, which gave the layers inside a class."""
    model, crayon = stand_in(), (torch.randn(4, HIDDEN), ROWS)
    found = where(model)
    if first:
        with crayon_context(model, crayon, found):
            model(**batch(model))
    config = LoraConfig(
        r=2, target_modules=r".*layers.*self_attn.[qv]_proj", init_lora_weights=False
    )
    tuned = get_peft_model(model, config).eval()
    logits = {}
    for dtype in (torch.float32, torch.float64):
        twin = copy.deepcopy(tuned).to(dtype)
        layers = twin.base_model.model.model.layers
        with dense_form(layers, crayon[0].to(dtype), scattered(found.mask)):
            logits[dtype] = twin(**batch(twin)).logits
    with crayon_context(tuned, crayon, found):
        result = tuned(**batch(tuned)).logits
    assert_within_budget(result, logits[torch.float32], logits[torch.float64])


def test_swapped_linears_train_their_adapters_with_the_rows() -> None:
    """The rows have the adapters of their tokens: 4 bits and adapters against the dense form."""
    model, crayon = stand_in(), (torch.randn(4, HIDDEN), ROWS)
    swap_linears(model, rank=4)
    layers = [m for m in model.modules() if isinstance(m, DualQLoRALinear)]
    for layer in layers:
        layer.adapter("vl").b.data.normal_(0, 0.2)
    found = where(model)

    def run(context: Any, model: Any) -> Any:
        with context:
            return model(**batch(model), labels=LABELS)

    expected = {}
    for dtype in (torch.float32, torch.float64):
        twin = copy.deepcopy(model).to(dtype)
        dense = dense_form(twin.model.layers, crayon[0].to(dtype), scattered(found.mask))
        expected[dtype] = results(lambda dense=dense, twin=twin: run(dense, twin), twin)
    own = results(lambda: run(crayon_context(model, crayon, found), model), model)
    adapters = [name for name in own if ".lora_B.vl" in name]
    assert len(adapters) == len(layers) == 14
    for name in ("logits", *adapters):
        honest, exact = (expected[dtype][name] for dtype in expected)
        assert_within_budget(own[name], honest, exact, name=name)


def test_contexts_of_generators_end_in_any_order() -> None:
    """The first to be entered is left first, or left in another thread: the other one stays."""
    first, second = stand_in(), stand_in()
    table, found = prompt().project(CLASSES, NUMBERS), where(first)

    def steps(model: StandIn) -> Any:
        with crayon_context(model, (table, ROWS), found):
            while True:
                yield model(**batch(model)).logits

    def close(running: Any) -> None:
        thread = threading.Thread(target=running.close)
        thread.start()
        thread.join()

    plain, (one, other) = first(**batch(first)).logits, (steps(first), steps(second))
    expected = next(one), next(other)
    one.close()
    assert torch.equal(next(other), expected[1])
    assert torch.equal(first(**batch(first)).logits, plain)
    close(other)
    assert torch.equal(second(**batch(second)).logits, plain)
