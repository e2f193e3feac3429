"""The model's forward and backward: table against dense crayon, masks, mixed batches, precision."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny_crayon_model import IMAGE, PAD, make_batch, make_model
from torch import Tensor
from transformers import LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

MODES = ("attention", "projection")


def stock_model(model: Any) -> LlavaForConditionalGeneration:
    """transformers' own LLaVA with the model's weights, which knows no crayon."""
    text = {
        name: getattr(model.config.text_config, name)
        for name in LlamaConfig().to_dict()
        if hasattr(model.config.text_config, name) and name != "model_type"
    }
    config = LlavaConfig(
        vision_config=model.config.vision_config,
        text_config=LlamaConfig(**text),
        image_token_index=IMAGE,
        vision_feature_layer=-1,
    )
    stock = LlavaForConditionalGeneration(config).eval()
    shared = {k: v for k, v in model.state_dict().items() if "crayon" not in k}
    stock.load_state_dict(shared, strict=True)
    return stock


def crayon_per_token(model: Any, batch: dict[str, Tensor]) -> Tensor:
    """The crayon written out for every token ``[B, S, hidden]``: zero off the image."""
    rows = model.model.crayon_prompt.project(batch["crayon_class"], batch["crayon_number"])
    dense = torch.zeros(*batch["input_ids"].shape, rows.shape[-1])
    for sample, tokens in enumerate(batch["input_ids"]):
        places = (tokens == IMAGE).nonzero()[:, 0]
        for place, row in zip(places, batch["crayon_index"][sample], strict=True):
            if row >= 0:
                dense[sample, place] = rows[sample, row]
    return dense


def inject(stock: Any, model: Any, mode: str, crayon: Tensor) -> None:
    """Put the dense crayon into the stock model with hooks on its linear layers."""
    layers = zip(stock.model.language_model.layers, model.model.language_model.layers, strict=True)
    for plain, ours in layers:
        attention, mlp = plain.self_attn, plain.mlp
        if mode == "attention":
            for linear in (attention.q_proj, attention.k_proj, attention.v_proj):
                linear.register_forward_pre_hook(lambda _, args: (args[0] + crayon,))
            continue
        q, k, v = ours.self_attn.crayon_qkv(crayon).split((32, 16, 16), dim=-1)
        tables = {
            attention.q_proj: q,
            attention.k_proj: k,
            attention.v_proj: v,
            attention.o_proj: ours.self_attn.crayon_o(crayon),
            mlp.gate_proj: ours.mlp.crayon_gate(crayon),
            mlp.up_proj: ours.mlp.crayon_up(crayon),
        }
        for linear, table in tables.items():
            linear.register_forward_hook(lambda _, __, out, table=table: out + table)


@pytest.mark.parametrize("bias", [False, True])  # the table has no bias, the tokens have it
@pytest.mark.parametrize("mode", MODES)
def test_table_equals_dense_crayon(mode: str, bias: bool) -> None:
    model = make_model(crayon_mode=mode, text={"attention_bias": bias})
    batch = make_batch()
    valid = batch["attention_mask"].bool()
    stock = stock_model(model)
    inject(stock, model, mode, crayon_per_token(model, batch))
    plain = {k: v for k, v in batch.items() if not k.startswith("crayon")}
    labels = batch["input_ids"].masked_fill(~valid, -100)

    out = model(**batch, labels=labels)
    out.loss.backward()
    ours = {n: p.grad for n, p in model.named_parameters()}
    model.zero_grad()
    dense = stock(**plain, labels=labels)
    dense.loss.backward()
    theirs = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    theirs |= {n: p.grad for n, p in stock.named_parameters()}

    torch.testing.assert_close(out.logits[valid], dense.logits[valid], atol=2e-5, rtol=1e-5)
    for name, grad in ours.items():
        if theirs.get(name) is None:
            assert grad is None or not grad.any(), name
            continue
        scale = float(theirs[name].abs().max())
        assert (grad - theirs[name]).abs().max() <= 2e-5 * max(scale, 1.0), name
    assert any("crayon" in name for name in theirs)


@pytest.mark.parametrize("mode", MODES)
def test_rows_shared_by_tokens_equal_a_row_for_every_token(mode: str) -> None:
    model, batch = make_model(crayon_mode=mode), make_batch()
    dense = dict(batch)
    index = batch["crayon_index"].long()
    for name in ("crayon_class", "crayon_number"):
        taken = batch[name].gather(1, index.clamp_min(0))
        dense[name] = torch.where(index >= 0, taken, -1).int()
    dense["crayon_index"] = torch.where(index >= 0, torch.arange(4), -1).int()
    torch.testing.assert_close(model(**batch).logits, model(**dense).logits, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("mode", MODES)
def test_crayon_gets_gradients_within_two_steps(mode: str) -> None:
    """One factor on the crayon's path starts at zero: it moves first, then everything behind it."""
    model, batch = make_model(crayon_mode=mode, trained=False).train(), make_batch()
    plain = {k: v for k, v in batch.items() if not k.startswith("crayon")}
    assert torch.equal(model(**batch).logits, model(**plain).logits)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    for _ in range(2):
        optimizer.zero_grad()
        model(**batch, labels=batch["input_ids"]).loss.backward()
        optimizer.step()
    crayon = list(model.crayon_parameters())
    assert crayon
    # The last layer's output and MLP branches act on tokens that predict the next one as well.
    assert all(p.grad is not None and bool(p.grad.any()) for p in crayon)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("mode", MODES)
def test_gradient_checkpointing_changes_nothing(mode: str, reentrant: bool) -> None:
    """Two forwards before a backward: state kept on modules would mix the two up silently."""
    grads = []
    for checkpointing in (False, True):
        model = make_model(crayon_mode=mode, adapters=("image", "vl")).train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
            model.enable_input_require_grads()
        batch = make_batch()
        other = {**batch, "crayon_class": batch["crayon_class"].clamp_max(3)}
        losses = [model(**b, labels=b["input_ids"]).loss for b in (batch, other)]
        (losses[0] + 2 * losses[1]).backward()
        grads.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    assert grads[0].keys() == grads[1].keys()
    # The crayon's gradient is a sum over layers and projections, which re-entry groups by layer:
    # each of its few additions rounds once.
    slack = 8 * torch.finfo(torch.float32).eps if reentrant else 0.0
    for name, grad in grads[0].items():
        assert (grad - grads[1][name]).abs().max() <= slack * grad.abs().max(), name


@pytest.mark.parametrize("mode", (*MODES, "none"))
def test_text_only_batch(mode: str) -> None:
    model = make_model(crayon_mode=mode)
    tokens = torch.tensor([[1, 5, 6, 7], [PAD, 1, 8, 9]])
    mask = torch.tensor([[1] * 4, [0, 1, 1, 1]])
    logits = model(tokens, attention_mask=mask).logits
    expected = stock_model(model)(tokens, attention_mask=mask).logits
    valid = mask.bool()
    torch.testing.assert_close(logits[valid], expected[valid], atol=1e-5, rtol=1e-5)


def test_mixed_batch_with_a_sample_without_image() -> None:
    model, batch = make_model(), make_batch()
    text = torch.tensor([[PAD, PAD, PAD, 1, 4, 5, 6, 7]])
    mixed = {
        "input_ids": torch.cat([batch["input_ids"], text]),
        "attention_mask": torch.cat([batch["attention_mask"], (text != PAD).long()]),
        "pixel_values": batch["pixel_values"],
        "crayon_index": torch.cat([batch["crayon_index"], torch.full((1, 4), -1)]).int(),
        "crayon_class": torch.cat([batch["crayon_class"], torch.full((1, 3), -1)]).int(),
        "crayon_number": torch.cat([batch["crayon_number"], torch.zeros(1, 3)]).int(),
    }
    logits = model(**mixed).logits
    expected = model(**batch).logits
    valid = batch["attention_mask"].bool()
    torch.testing.assert_close(logits[:2][valid], expected[valid], atol=1e-5, rtol=1e-5)
    alone = model(text[:, 3:]).logits
    torch.testing.assert_close(logits[2:, 3:], alone, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("mode", MODES)
def test_image_adapters_act_on_image_tokens_only(mode: str) -> None:
    """Text before the image sees no adapter; with the scope lifted it does."""
    options: dict[str, Any] = {"crayon_mode": mode, "adapters": ("plora", "vl")}
    scoped = make_model(**options, image_adapters=("plora", "vl"))
    free = make_model(**options)
    free.load_state_dict(scoped.state_dict())
    bare = make_model(crayon_mode=mode)
    bare.load_state_dict({k: v for k, v in scoped.state_dict().items() if "lora" not in k})
    batch = make_batch()
    first = (slice(0, 1), slice(0, 1))  # the token before the image
    assert torch.equal(scoped(**batch).logits[first], bare(**batch).logits[first])
    assert not torch.equal(free(**batch).logits[first], bare(**batch).logits[first])
    assert not torch.equal(scoped(**batch).logits, bare(**batch).logits)
    # with a dense per-token mask in place of the scope, the same comes out
    free.model.crayon_image_adapters = ("plora", "vl")
    assert torch.equal(free(**batch).logits, scoped(**batch).logits)


@pytest.mark.parametrize("mode", MODES)
def test_a_mask_with_a_hole_takes_the_other_path(mode: str) -> None:
    """Not an interval: SDPA with the crayon added, as the stock model with a dense crayon."""
    model, batch = make_model(crayon_mode=mode), make_batch()
    batch["attention_mask"][0, 5] = 0
    stock = stock_model(model)
    inject(stock, model, mode, crayon_per_token(model, batch))
    plain = {k: v for k, v in batch.items() if not k.startswith("crayon")}
    valid = batch["attention_mask"].bool()
    found, expected = model(**batch).logits[valid], stock(**plain).logits[valid]
    torch.testing.assert_close(found, expected, atol=2e-5, rtol=1e-5)


def test_packed_sequences_do_not_see_each_other() -> None:
    model = make_model()
    tokens = torch.tensor([[1, 5, 6, 1, 8, 9]])
    positions = torch.tensor([[0, 1, 2, 0, 1, 2]])
    # transformers looks for packing where there is neither mask nor cache
    packed = model(tokens, position_ids=positions, use_cache=False).logits
    for part in (slice(0, 3), slice(3, 6)):
        alone = model(tokens[:, part]).logits
        torch.testing.assert_close(packed[:, part], alone, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("mode", MODES)
def test_eager_attention_agrees(mode: str) -> None:
    model, batch = make_model(crayon_mode=mode), make_batch()
    fused = model(**batch).logits
    model.set_attn_implementation("eager")
    out = model(**batch, output_attentions=True)
    assert len(out.attentions) == 2
    valid = batch["attention_mask"].bool()
    torch.testing.assert_close(out.logits[valid], fused[valid], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("quantize", [None, "nf4"])
@pytest.mark.parametrize("mode", MODES)
def test_bfloat16(mode: str, quantize: str | None) -> None:
    """Adapters and crayon stay float32 beside a bfloat16 model, as PEFT trains them."""
    model = make_model(crayon_mode=mode, adapters=("image", "vl"), quantize=quantize)
    batch = make_batch()
    exact = model(**batch).logits
    trained = {id(p) for p in model.crayon_parameters()}
    trained |= {id(p) for name in ("image", "vl") for p in model.adapter_parameters(name)}
    for parameter in model.parameters():
        if parameter.is_floating_point() and id(parameter) not in trained:
            parameter.data = parameter.data.bfloat16()
    out = model.train()(**batch, labels=batch["input_ids"])
    out.loss.backward()
    assert out.logits.dtype == torch.bfloat16
    valid = batch["attention_mask"].bool()
    # A handful of roundings of 2^-9 on values below 2 in each of two layers.
    assert (out.logits.float() - exact)[valid].abs().max() < 0.1
    assert all(
        p.grad is not None and p.grad.dtype == torch.float32 for p in model.crayon_parameters()
    )


def test_decoder_layer_compiles_without_graph_breaks() -> None:
    for mode in MODES:
        model, batch = make_model(crayon_mode=mode, adapters=("image", "vl")), make_batch()
        expected = model(**batch).logits
        for layer in model.model.language_model.layers[:1]:
            layer.forward = torch.compile(layer.forward, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(model(**batch).logits, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"crayon_class": None}, "crayon_class: expected all of"),
        ({"crayon_index": torch.zeros(1, 4, dtype=torch.int32)}, "crayon_index: expected two dim"),
        ({"crayon_number": torch.zeros(2, 2, dtype=torch.int32)}, "crayon_number: expected the sh"),
        ({"crayon_index": torch.zeros(2, 3, dtype=torch.int32)}, "sample 0 has 4 image tokens"),
        ({"crayon_index": torch.full((2, 4), 3, dtype=torch.int32)}, "got 3 at sample 0, image t"),
        ({"crayon_class": torch.full((2, 3), 134, dtype=torch.int32)}, "row_class"),
    ],
)
def test_bad_crayon_inputs_are_named(change: dict[str, Tensor | None], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_model()(**{**make_batch(), **change})


@pytest.mark.parametrize("name", ["crayon_index", "crayon_class", "crayon_number"])
def test_a_crayon_that_was_cast_with_the_pixels_is_named(name: str) -> None:
    """bfloat16 has no 257, and a row of another segment was taken in silence; so with an array."""
    batch: dict[str, Any] = dict(make_batch())
    for wrong, said in ((batch[name].bfloat16(), "bfloat16"), (batch[name].numpy(), "ndarray")):
        with pytest.raises(TypeError, match=f"{name}: expected an int32 or int64 .*{said}"):
            make_model()(**{**batch, name: wrong})


@pytest.mark.parametrize("mode", MODES)
def test_right_padding_equals_left_padding(mode: str) -> None:
    model, left = make_model(crayon_mode=mode), make_batch()
    right = {name: value.clone() for name, value in left.items()}
    for name in ("input_ids", "attention_mask"):
        right[name][1] = right[name][1].roll(-1)
    found, expected = model(**right).logits, model(**left).logits
    torch.testing.assert_close(found[1, :-1], expected[1, 1:], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(found[0], expected[0], atol=1e-5, rtol=1e-5)
