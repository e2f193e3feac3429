"""``crayon_context`` is right or refuses: nothing drops a crayon, or misplaces it, in silence."""

from __future__ import annotations

import copy
import threading
from typing import Any

import pytest
import torch
import torch.utils.checkpoint
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import (
    CheckpointImpl,
    CheckpointWrapper,
)

from collavo_kernels.nn import (
    CrayonAttention,
    CrayonInputs,
    bound_crayon,
    crayon_context,
    find_image_positions,
)
from tests.nn.foreign.llava_stand_in import HIDDEN, stand_in
from tests.nn.foreign.stand_in_batch import IDS, LABELS, MASK, ROWS, batch, images, where

TABLE = torch.randn(4, HIDDEN, generator=torch.Generator().manual_seed(0))


def enter(crayon: Any, positions: Any, model: Any = None) -> None:
    with crayon_context(stand_in() if model is None else model, crayon, positions):
        raise AssertionError("entered")


BAD = {
    "another grid": (lambda w: ((TABLE, ROWS.repeat(1, 2)), w), "expected 8 image tokens in sam"),
    "too few cells": (lambda w: ((TABLE, ROWS[:, :3]), w), "expected 3 image tokens in sample 0"),
    "fewer images": (lambda w: ((TABLE, ROWS[:1]), w), r"those of 2 images, .*\(1, 1 by sample\)"),
    "more images": (lambda w: ((TABLE, ROWS.repeat(2, 1)), w), "those of 2 images"),
    "fewer, by mask": (
        lambda w: ((TABLE, ROWS[:1]), w.mask),
        "expected 0 image tokens in sample 1",
    ),
    "more, by mask": (lambda w: ((TABLE, ROWS.repeat(2, 1)), w.mask), "expected 12 image tokens"),
    "a row too high": (lambda w: ((TABLE[:3], ROWS), w), "expected entries from -1 to 2"),
    "another width": (lambda w: ((TABLE[:, :8], ROWS), w), r"crayon.table: expected \[T, 32\]"),
    "a table of integers": (lambda w: ((ROWS, ROWS), w), "crayon.table"),
    "floats for rows": (lambda w: ((TABLE, ROWS.float()), w), "crayon.row_index"),
    "a table alone": (lambda w: (TABLE, w), r"expected \(table, row_index\)"),
    "no rows": (lambda w: ((TABLE, None), w), r"expected \(table, row_index\)"),
    "no positions": (lambda w: ((TABLE, ROWS), None), "image_positions: expected"),
    "positions of one line": (lambda w: ((TABLE, ROWS), w.mask[0]), "image_positions: expected"),
    "other positions": (lambda w: ((TABLE, ROWS), torch.arange(3).expand(2, 3)), "a position for"),
    "single tokens": (lambda w: ((TABLE, ROWS[:, :1]), w.mask[:, 1:2]), "two tokens or more"),
    "rows of text": (
        lambda w: (CrayonInputs(TABLE, torch.zeros_like(w.mask, dtype=torch.int32)), w),
        "expected -1 where image_positions has no image token, got 0 at sample 0, token 0",
    ),
    "rows of image tokens": (lambda w: (CrayonInputs(TABLE, ROWS), w), r"expected \[2, 9\]"),
    "masks": (
        lambda w: (CrayonInputs(TABLE, ROWS, row_mask=ROWS), w),
        "crayon.row_mask: expected None",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_a_crayon_that_does_not_fit_is_refused_on_entry(case: str) -> None:
    make, words = BAD[case]
    with pytest.raises((TypeError, ValueError), match=words):
        enter(*make(where(stand_in())))


def test_models_whose_layers_cannot_take_it_are_named() -> None:
    found = where(stand_in())
    attention = "model.layers.1.self_attn"

    def without(name: str) -> Any:
        model = stand_in()
        delattr(model.get_submodule(attention), name)
        return model

    offloaded = stand_in()
    layer = offloaded.get_submodule(f"{attention}.q_proj")
    layer.forward = lambda x: nn.Linear.forward(layer, x)
    crossed = stand_in()
    crossed.model.layers[1].cross_attn = copy.deepcopy(crossed.model.layers[1].self_attn)
    two = nn.ModuleList([stand_in(), stand_in()])
    cases = (
        (without("k_proj"), r"model.layers.1: expected one attention .* got none"),
        (offloaded, rf"{attention}.q_proj: the Linear has a forward of its own"),
        (nn.Linear(2, 2), "get_input_embeddings"),
        (crossed, rf"got {attention}, model.layers.1.cross_attn"),
        (two, "ModuleList with 0.model.embed_tokens, 1.model.embed_tokens; pass the language mod"),
    )
    for model, words in cases:
        with pytest.raises(ValueError, match=words):
            enter((TABLE, ROWS), found, model)
    with pytest.raises(TypeError, match="model: expected a module, got dict"):
        enter((TABLE, ROWS), found, {})


def test_a_forward_pass_of_other_sequences_is_refused() -> None:
    model = stand_in()
    found, inputs = where(model), batch(model)
    embeds = torch.randn(2, 9, HIDDEN)
    others: tuple[tuple[dict[str, Any], str], ...] = (
        ({"inputs_embeds": embeds[:, :8]}, "2 samples of 9 tokens, got 2 of 8"),
        ({"inputs_embeds": embeds[:1]}, "got 1 of 9"),
        # Twice the batch, and not as beams stand: rows would be another sample's.
        ({"inputs_embeds": torch.cat([embeds, embeds])}, "got 4 of 9"),
        ({**inputs, "images": None, "input_ids": IDS}, "got 2 of 6"),
        (
            {"inputs_embeds": embeds, "attention_mask": torch.zeros(2, 9)},
            "no image token at paddin",
        ),
    )
    for given, words in others:
        with pytest.raises(ValueError, match=words), crayon_context(model, (TABLE, ROWS), found):
            model(**given)
    # What was refused leaves nothing behind.
    plain = stand_in()(**inputs).logits
    assert torch.equal(model(**inputs).logits, plain)
    with (
        pytest.raises(ValueError, match="expected positions below 9"),
        crayon_context(model, (TABLE, ROWS), torch.tensor([[0, 1, 2, 3], [5, 6, 7, 9]])),
    ):
        model(inputs_embeds=embeds)


def test_a_context_without_a_forward_pass_is_an_error() -> None:
    """LLaVA's server starts ``generate`` in a thread, which would have no crayon."""
    model = stand_in()
    found, inputs = where(model), batch(model)
    with (
        pytest.raises(RuntimeError, match="no StandInModel took the crayon"),
        crayon_context(model, (TABLE, ROWS), found),
    ):
        thread = threading.Thread(target=model, kwargs=inputs)
        thread.start()
        thread.join()
    with pytest.raises(KeyError), crayon_context(model, (TABLE, ROWS), found):
        raise KeyError("an error inside comes first")


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_checkpoint_that_loses_the_crayon_is_refused(reentrant: bool) -> None:
    """Somebody's own call of torch's checkpoint: gradients without the crayon would be wrong."""
    model = stand_in().train()
    run = model.model.layers[1].forward
    model.model.layers[1].forward = lambda x, **kwargs: torch.utils.checkpoint.checkpoint(
        lambda x: run(x, **kwargs), x, use_reentrant=reentrant
    )
    with crayon_context(model, (TABLE, ROWS), where(model)):
        loss = model(**batch(model), labels=LABELS, use_cache=False).loss
    with pytest.raises(RuntimeError, match="runs a layer again without the crayon"):
        loss.backward()


@pytest.mark.parametrize("inside", [False, True])
def test_checkpointing_may_be_turned_on_at_any_time(inside: bool) -> None:
    """Evaluated first, then trained, with crayons or without: what a Trainer's user does."""
    model = stand_in()
    gradients = []
    for again in range(2):
        table = TABLE.clone().requires_grad_()
        with crayon_context(model, (table, ROWS), where(model)):
            if again and inside:
                model.train().gradient_checkpointing_enable()
            loss = model(**batch(model), labels=LABELS).loss
        loss.backward()
        gradients.append(table.grad)
        if not inside:
            model.train().gradient_checkpointing_enable()
            model(**batch(model), labels=LABELS).loss.backward()
    torch.testing.assert_close(*gradients, rtol=1e-5, atol=1e-6)


def test_a_checkpoint_that_is_not_torchs_is_refused() -> None:
    model = stand_in().train()
    model.gradient_checkpointing_enable()
    for module in model.modules():
        if hasattr(module, "_gradient_checkpointing_func"):
            module._gradient_checkpointing_func = lambda function, *args: function(*args)
    with (
        pytest.raises(
            ValueError, match=r"torch.utils.checkpoint.checkpoint behind .* got .*lambda"
        ),
        crayon_context(model, (TABLE, ROWS), where(model)),
    ):
        model(**batch(model))
    model(**batch(model))  # without a crayon it is the model's own affair


@pytest.mark.parametrize("kind", [CheckpointImpl.NO_REENTRANT, CheckpointImpl.REENTRANT])
def test_torchs_wrapper_keeps_the_crayon(kind: CheckpointImpl) -> None:
    """FSDP's recipes checkpoint so, around a layer."""
    gradients = []
    for wrapped in (False, True):
        model, table = stand_in(), TABLE.clone().requires_grad_()
        if wrapped:
            for i, layer in enumerate(model.model.layers):
                model.model.layers[i] = CheckpointWrapper(layer, checkpoint_impl=kind)
        with crayon_context(model, (table, ROWS), where(model)):
            loss = model(**batch(model), labels=LABELS, use_cache=False).loss
        (2 * loss).backward()
        gradients.append((table.grad, model.model.embed_tokens.weight.grad))
    for found, expected in zip(*gradients, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)


@torch.no_grad()
def test_all_forms_of_positions_are_one() -> None:
    model = stand_in()
    found = where(model)
    places = torch.stack([line.nonzero().flatten() for line in found.mask])
    whole = torch.full(found.mask.shape, -1, dtype=torch.int32)
    whole[found.mask] = ROWS.flatten()
    forms: list[tuple[Any, Any]] = [
        ((TABLE, ROWS), found),
        ((TABLE, ROWS.long()), found.mask),
        ((TABLE, list(ROWS)), found),
        ((TABLE, ROWS), places),
        ((TABLE, ROWS[:, [1, 0, 2, 3]]), places.int()[:, [1, 0, 2, 3]]),
        (CrayonInputs(TABLE, whole), found),
        (CrayonInputs(TABLE, whole), found.mask),
    ]
    logits: list[Tensor] = []
    for crayon, positions in forms:
        with crayon_context(model, crayon, positions):
            logits.append(model(IDS, attention_mask=MASK, images=images()).logits)
    assert all(torch.equal(each, logits[0]) for each in logits)
    left_out = torch.where(ROWS == 2, -1, places)
    with crayon_context(model, (TABLE, ROWS), left_out):
        fewer = model(**batch(model)).logits
    with crayon_context(model, (TABLE, ROWS.masked_fill(ROWS == 2, -1)), found):
        assert torch.equal(model(**batch(model)).logits, fewer)


class HandsItsOwn(nn.Module):
    """A layer of a model that has crayons by itself: it hands its attention one, or binds one."""

    def __init__(self, layer: nn.Module, binds: bool) -> None:
        super().__init__()
        self.layer, self.binds = layer, binds

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if not self.binds:
            return self.layer(*args, **kwargs, crayon=CrayonInputs())
        with bound_crayon(CrayonInputs()):
            return self.layer(*args, **kwargs)


@pytest.mark.parametrize("binds", [False, True])
def test_a_model_with_crayons_of_its_own_is_refused(binds: bool) -> None:
    """Its own, empty one would stand in front of the context's."""
    model = stand_in()
    for i, layer in enumerate(model.model.layers):
        if not binds:
            layer.self_attn = CrayonAttention.from_attention(layer.self_attn)
        model.model.layers[i] = HandsItsOwn(layer, binds)
    with (
        pytest.raises(ValueError, match="the model hands crayons to its layers itself"),
        crayon_context(model, (TABLE, ROWS), where(model)),
    ):
        model(**batch(model))


@torch.no_grad()
def test_hooks_that_are_put_on_after_a_first_context() -> None:
    """A device map's; the ones before are refused, as their forward would pass the crayon by."""
    model = stand_in()
    found, expected = where(model), []
    for _ in range(2):
        with crayon_context(model, (TABLE, ROWS), found):
            expected.append(model(**batch(model)).logits)
        for module in model.model.layers[0].modules():
            if isinstance(module, nn.Linear):
                add_hook_to_module(module, AlignDevicesHook("cpu", io_same_device=True))
    assert torch.equal(*expected)


@pytest.mark.parametrize("reentrant", [None, False, True])
def test_a_batch_of_words_alone(reentrant: bool | None) -> None:
    """Its crayon's gradient is zero and not absent, which sharded training needs."""
    model, words = stand_in().train(), torch.tensor([[1, 2, 3], [4, 5, 6]])
    if reentrant is not None:
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    found = find_image_positions(model, words, images())
    for rows in (ROWS, ROWS[:0], []):
        table = TABLE.clone().requires_grad_()
        with crayon_context(model, (table, rows), found):
            model(words, labels=words, images=images()).loss.backward()
        assert table.grad is not None and not table.grad.any()
