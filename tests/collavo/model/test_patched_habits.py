"""What people do to a model around training and answering: the patched one does it or says why."""

from __future__ import annotations

import copy
import inspect
import io
from pathlib import Path
from typing import Any

import accelerate
import pytest
import torch
from accelerate.hooks import AlignDevicesHook, add_hook_to_module, remove_hook_from_module
from test_apply_to_llava import (
    DECODERS,
    IMAGE,
    assert_same,
    generate,
    make_batch,
    make_llava,
    plain,
    snapshot,
)
from tiny_families import make_family, make_inputs
from torch import Tensor, nn
from transformers import LlamaForCausalLM

from collavo import apply_to_llava
from collavo.loading import load_pretrained
from collavo.model.crayon import CrayonGenerationMixin, CrayonModelMixin
from collavo.model.rows import flatten_rows
from tests.fuzz.stock_crayon import layers_of

pytestmark = pytest.mark.usefixtures("one_thread")


# Images that are one picture each; crops with lines' ends; a padded list, and "text_model".
KINDS = ("llama", "llava_next", "smolvlm")
# What a mode adds to a decoder does not depend on the family.
MODES = [("qwen2", "projection"), *((kind, "attention") for kind in ("qwen2", *KINDS[1:]))]


def stock_of(kind: str) -> Any:
    """A stock LLaVA with that decoder, or a stock model of that family."""
    return make_llava(kind) if kind in DECODERS else make_family(kind)


def batch_of(kind: str) -> dict[str, Tensor]:
    return make_batch() if kind in DECODERS else make_inputs(kind, [2, 1])


def patched(kind: str = "llama", **options: Any) -> tuple[Any, Any]:
    """A patched model whose crayon and adapters have an effect, and its handle."""
    model = stock_of(kind)
    handle = apply_to_llava(model, crayon_rank=4, lora_rank=2, **options)
    torch.manual_seed(0)
    for name, parameter in model.named_parameters():
        if "crayon" in name or "lora_" in name:
            parameter.data.normal_(0.0, 0.2)
    return model, handle


def embedded(model: Any, batch: dict[str, Tensor], *, merged: bool = False) -> dict[str, Any]:
    """The batch with embeddings in place of ids; merged: with the image's features among them."""
    given: dict[str, Any] = dict(batch)
    ids = given.pop("input_ids")
    with torch.no_grad():
        embeds = model.get_input_embeddings()(ids).clone()
        if merged:
            features = model.get_image_features(given.pop("pixel_values")).pooler_output
            embeds[ids == IMAGE] = torch.cat(list(features))
    return given | {"inputs_embeds": embeds}


def test_a_mixin_has_every_parameter_that_transformers_looks_for() -> None:
    """transformers reads signatures to know what a model can do (``inputs_embeds``, ...)."""
    stock = type(make_llava("llama"))
    inner = type(make_llava("llama").model)
    for mixin, base in ((CrayonGenerationMixin, stock), (CrayonModelMixin, inner)):
        for name, method in vars(mixin).items():
            if not inspect.isfunction(method) or not hasattr(base, name):
                continue
            own = inspect.signature(method).parameters
            theirs = inspect.signature(getattr(base, name)).parameters
            open_ended = any(p.kind is p.VAR_POSITIONAL for p in own.values())
            # With ``mm_encoder_outputs`` transformers would encode images before turns are sorted.
            # The other two older ones name as well, and look for in forward's signature.
            unread = {"mm_encoder_outputs", "pixel_values", "logits_to_keep"}
            missing = set() if open_ended else set(theirs) - set(own) - unread
            assert not missing, (name, missing)


@pytest.mark.parametrize("beams", [1, 2])
def test_generating_from_embeddings(beams: int) -> None:
    """Beams as well: two images of a sample stay together where only embeddings say which."""
    model, _ = patched()
    batch = make_batch()
    two = {n: torch.cat([v, v], 1) if n != "pixel_values" else v for n, v in batch.items()}
    two["pixel_values"] = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(2))
    two["crayon_class"], two["crayon_number"] = batch["crayon_class"], batch["crayon_number"]
    for inputs in (batch, two):
        for given in (inputs, plain(inputs)):
            expected = generate(model, given, num_beams=beams)[:, inputs["input_ids"].shape[1] :]
            found = generate(model, embedded(model, given), num_beams=beams)
            assert torch.equal(found, expected)


def test_features_that_are_merged_in_never_lose_the_crayon_in_silence() -> None:
    model, _ = patched(adapters=("image",))
    batch = make_batch()
    with pytest.raises(ValueError, match=r"crayon_index: sample 0 has 0 image tokens and a row"):
        model(**embedded(model, batch, merged=True))
    with pytest.raises(ValueError, match=r"crayon_index: .* merged in already"):
        generate(model, embedded(model, batch, merged=True), input_ids=batch["input_ids"])
    # Without a crayon there is nothing to lose.
    expected = model(**plain(batch)).logits[batch["attention_mask"].bool()]
    found = model(**plain(embedded(model, batch, merged=True))).logits
    found = found[batch["attention_mask"].bool()]
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_adapters_of_image_tokens_ask_for_image_tokens() -> None:
    model, _ = patched(adapters=("image", "vl"), image_adapters=("image",))
    batch = plain(make_batch())
    with pytest.raises(ValueError, match=r"inputs_embeds: expected embeddings of image tokens"):
        model(**embedded(model, batch, merged=True))
    assert torch.equal(model(**embedded(model, batch)).logits, model(**batch).logits)
    with pytest.raises(ValueError, match=r"crayon: .* the decoder was called by itself"):
        model.model.language_model(batch["input_ids"])


@pytest.mark.parametrize("cells", [9, 5])
def test_a_crayon_of_another_grid(cells: int) -> None:
    """The first rows would be taken, of the wrong segments; what only pads is no crayon."""
    model, _ = patched()
    batch = make_batch()
    wrong = torch.zeros(2, cells, dtype=torch.int32)
    with pytest.raises(ValueError, match=rf"4 image tokens and a row for image token {cells - 1}"):
        model(**{**batch, "crayon_index": wrong})
    padded = torch.full((2, cells), -1, dtype=torch.int32)
    padded[:, :4] = batch["crayon_index"]
    found = model(**{**batch, "crayon_index": padded}).logits
    assert torch.equal(found, model(**batch).logits)


def test_rows_on_another_device_are_laid_out_without_a_look_at_values() -> None:
    batch = {name: value.to("meta") for name, value in make_batch().items()}
    crayon = [batch[name] for name in ("crayon_index", "crayon_class", "crayon_number")]
    rows = flatten_rows(batch["input_ids"] == IMAGE, *crayon)
    assert rows.row_index.shape == (2, 8) and rows.row_index.dtype == torch.int32


@pytest.mark.parametrize("quantize", [None, "nf4"])
@pytest.mark.parametrize(("kind", "mode"), [*MODES, ("qwen2", "none")])
def test_model_and_handle_pickle(kind: str, mode: Any, quantize: Any) -> None:
    """What spawned processes, ray and ``torch.save`` do."""
    model, handle = patched(kind, adapters=("a",), crayon_mode=mode, quantize=quantize)
    file = io.BytesIO()
    torch.save((model, handle), file)
    file.seek(0)
    twin, way_back = torch.load(file, weights_only=False)
    batch = batch_of(kind)
    assert type(twin) is type(model) and way_back.model is twin
    assert torch.equal(twin(**batch).logits, model(**batch).logits)
    stock = stock_of(kind)
    assert torch.equal(way_back.undo()(**plain(batch)).logits, stock(**plain(batch)).logits)
    assert type(twin) is type(stock)


def _answer(model: Any, queue: Any) -> None:
    torch.set_num_threads(1)
    # transformers learns what a class of model records when one is made: a stock model that comes
    # into a process where none was fails as well.
    make_llava("llama")
    with torch.no_grad():
        queue.put(model(**make_batch()).logits.numpy())


@pytest.mark.slow
def test_a_spawned_process_is_given_the_model() -> None:
    model, _ = patched(adapters=("a",))
    context = torch.multiprocessing.get_context("spawn")
    queue = context.Queue()
    process = context.Process(target=_answer, args=(model, queue))
    process.start()
    found = torch.from_numpy(queue.get(timeout=120))
    process.join()
    assert torch.equal(found, model(**make_batch()).logits)


@pytest.mark.parametrize("crayon", [True, False])
@pytest.mark.parametrize("kind", ["language model", "stock", "patched", "look-up"])
def test_assisted_decoding(kind: str, crayon: bool) -> None:
    """An assistant is given what it knows; the answer is that without one."""
    model, _ = patched(adapters=("a",))
    batch = {name: value[:1] for name, value in make_batch().items()}
    batch = batch if crayon else plain(batch)
    helpers = {
        "language model": lambda: LlamaForCausalLM(DECODERS["llama"]()).eval(),
        "stock": lambda: make_llava("llama"),
        "patched": lambda: copy.deepcopy(model),
    }
    assistant = {"assistant_model": helpers[kind]()} if kind in helpers else {}
    way = assistant or {"prompt_lookup_num_tokens": 2}
    assert torch.equal(generate(model, batch, **way), generate(model, batch))


def test_hooks_of_the_attention_run_and_stay() -> None:
    """Those put on before, and those put on while the crayon is in."""
    model, calls = make_llava("llama"), []
    attention = model.model.language_model.layers[0].self_attn
    before = attention.register_forward_hook(lambda *_: calls.append("before"))
    handle = apply_to_llava(model)
    inside = model.model.language_model.layers[0].self_attn
    inside.register_forward_hook(lambda *_: calls.append("inside"))
    model(**make_batch())
    before.remove()
    handle.undo()
    model(**plain(make_batch()))
    assert calls == ["before", "inside", "inside"]


def test_attention_weights_are_recorded() -> None:
    """transformers records them by hooks on the class of its own attention."""
    for first in (False, True):  # before the patch too: transformers installs its hooks once
        model = make_llava("llama")
        model.set_attn_implementation("eager")
        batch = plain(make_batch())
        expected = make_llava("llama")
        expected.set_attn_implementation("eager")
        if first:
            model(**batch, output_attentions=True)
        apply_to_llava(model)
        found = model(**batch, output_attentions=True).attentions
        weights = expected(**batch, output_attentions=True).attentions
        assert len(found) == 2
        for one, other in zip(found, weights, strict=True):
            torch.testing.assert_close(one, other, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("quantize", [None, "nf4"])
@pytest.mark.parametrize("kind", ["qwen2", *KINDS[1:]])
def test_undo_follows_casts_training_and_assigned_weights(kind: str, quantize: Any) -> None:
    model, handle = patched(kind, quantize=quantize)
    stock = stock_of(kind)
    for each in (model, stock):
        each.to(torch.bfloat16)
    if quantize is None:
        for each in (model, stock):
            layers_of(each)[0].self_attn.q_proj.weight.data.mul_(1.5)
        state = {name: value.clone() for name, value in model.state_dict().items()}
        model.load_state_dict(state, assign=True)
    handle.undo()
    batch = plain(batch_of(kind))
    batch["pixel_values"] = batch["pixel_values"].bfloat16()
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert torch.equal(model(**batch).logits, stock(**batch).logits)


def test_undo_casts_no_more_than_was_cast() -> None:
    """Scripts that train in 16 bits bring the norms to float32, not the linear layers."""
    model, handle = patched("qwen2")
    model.to(torch.bfloat16)
    norms = [layer.input_layernorm for layer in model.model.language_model.layers]
    for norm in norms:
        norm.to(torch.float32)
    handle.undo()
    layer = model.model.language_model.layers[0]
    for linear in (layer.self_attn.q_proj, layer.mlp.up_proj):
        assert {p.dtype for p in linear.parameters()} == {torch.bfloat16}
    assert norms[0].weight.dtype == torch.float32


@pytest.mark.parametrize("which", KINDS)
def test_undo_is_whole_or_not_at_all(which: str) -> None:
    """What something else put in is named, and nothing is undone."""
    model, handle = patched(which, adapters=("a",))
    layer, batch = layers_of(model)[1], batch_of(which)
    logits = model(**batch).logits

    def refused(message: str) -> None:
        with pytest.raises(ValueError, match=message):
            handle.undo()
        assert torch.equal(model(**batch).logits, logits)

    for part in (model, layer, layer.mlp.up_proj, layer.mlp.up_proj.lora_A["a"]):
        add_hook_to_module(part, AlignDevicesHook("cpu", io_same_device=True))
        refused(r"undo: .* has a forward of its own instance; take it off first")
        remove_hook_from_module(part)
    linear = layer.mlp.up_proj
    layer.mlp.up_proj = nn.Sequential(linear)
    layer.mlp.up_proj.forward = linear.forward
    refused(r"undo: model\.\w+_model\.layers\.1\.mlp\.up_proj is now a torch.*Sequential")
    layer.mlp.up_proj = linear
    kind = type(layer)
    layer.__class__ = type("Sharded", (kind,), {})
    refused(r"undo: model\.\w+_model\.layers\.1 is now a .*Sharded")
    layer.__class__ = kind
    prompt = model.model.crayon_prompt
    del model.model.crayon_prompt
    with pytest.raises(ValueError, match=r"undo: model\.crayon_prompt was deleted"):
        handle.undo()
    model.model.crayon_prompt = prompt
    handle.undo()
    stock = stock_of(which)
    assert torch.equal(model(**plain(batch)).logits, stock(**plain(batch)).logits)


@pytest.mark.parametrize("kind", KINDS)
def test_re_entrant_checkpointing_without_an_input_that_asks(kind: str) -> None:
    """Torch warns and leaves adapters without gradients; with such an input it is right."""
    model, _ = patched(kind, adapters=("a",))
    model.requires_grad_(False)
    for parameter in model.adapter_parameters("a"):
        parameter.requires_grad_()
    model.train().gradient_checkpointing_enable({"use_reentrant": True})
    model.disable_input_require_grads()
    batch = batch_of(kind)
    with pytest.raises(ValueError, match=r"gradient checkpointing: .*'use_reentrant': False"):
        model(**batch)
    model.enable_input_require_grads()
    grads = []
    for reentrant in (True, False):
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        model(**batch, labels=batch["input_ids"]).loss.backward()
        grads.append([p.grad for p in model.adapter_parameters("a")])
        model.zero_grad()
    assert all(torch.equal(one, other) for one, other in zip(*grads, strict=True))


@pytest.mark.parametrize("mode", ["attention", "projection"])
@pytest.mark.parametrize("first", [True, False])
def test_pefts_preparation_for_training(first: bool, mode: Any) -> None:
    """``prepare_model_for_kbit_training`` checkpoints the re-entrant way, before or after."""
    peft = pytest.importorskip("peft")
    grads = []
    for prepared in (False, True):
        model = make_llava("qwen2").train()
        model.is_loaded_in_4bit = True
        if prepared and first:
            peft.prepare_model_for_kbit_training(model)
        apply_to_llava(model, crayon_mode=mode, crayon_rank=4, adapters=("a",), quantize="nf4")
        if prepared and not first:
            peft.prepare_model_for_kbit_training(model)
        trained = [*model.crayon_parameters(), *model.adapter_parameters("a")]
        torch.manual_seed(0)
        for parameter in trained:
            parameter.requires_grad_().data.normal_(0.0, 0.2)
        batch = make_batch()
        model(**batch, labels=batch["input_ids"]).loss.backward()
        grads.append([p.grad for p in trained])
    for one, other in zip(*grads, strict=True):
        # The table's gradients come from ten places, and are summed in another order.
        slack = 10 * torch.finfo(one.dtype).eps * float(one.abs().max())
        assert one.any() and float((one - other).abs().max()) <= slack


@pytest.mark.parametrize("way", ["memory", "disk", "map"])
@pytest.mark.parametrize("quantize", [None, "nf4"])
@pytest.mark.parametrize(("kind", "mode"), MODES)
def test_offload(kind: str, quantize: Any, mode: Any, way: str, tmp_path: Path) -> None:
    """Qwen2, for its biases; the hooks taken off, all is back, and undo too."""
    model, handle = patched(
        kind, adapters=("a", "b"), image_adapters=("b",), crayon_mode=mode, quantize=quantize
    )
    batch, cpu = batch_of(kind), torch.device("cpu")
    expected, tokens = model(**batch).logits, generate(model, batch, num_beams=2)
    if way == "memory":
        accelerate.cpu_offload(model, execution_device=cpu)
    elif way == "disk":
        accelerate.disk_offload(model, str(tmp_path), execution_device=cpu)
    else:
        own = (*model.model._modules, *model.model._parameters)
        parts = {f"model.{name}": "cpu" for name in own} | {"lm_head": "cpu"}
        decoder = "language_model" if hasattr(model.model, "language_model") else "text_model"
        parts |= {f"model.{decoder}": "disk", "model.crayon_prompt": "disk"}
        accelerate.dispatch_model(model, parts, offload_dir=str(tmp_path))
    assert any(p.is_meta for p in model.parameters())
    with torch.no_grad():
        assert torch.equal(model(**batch).logits, expected)
    assert torch.equal(generate(model, batch, num_beams=2), tokens)
    with pytest.raises(ValueError, match=r"undo: .*forward of its own instance"):
        handle.undo()
    with pytest.raises(ValueError, match=r"added_state_dict: .* is offloaded"):
        handle.added_state_dict()
    remove_hook_from_module(model, recurse=True)
    assert torch.equal(model(**batch).logits, expected)
    stock = stock_of(kind)
    assert torch.equal(handle.undo()(**plain(batch)).logits, stock(**plain(batch)).logits)


@pytest.mark.parametrize("quantize", [None, "nf4"])
def test_a_model_that_is_offloaded_by_a_map_is_saved_whole(quantize: Any, tmp_path: Path) -> None:
    """transformers reads offloaded parameters one by one; of 4 bits a file has other parts."""
    model, _ = patched(adapters=("a",), quantize=quantize)
    batch = make_batch()
    expected = model(**batch).logits
    parts = {"model.vision_tower": "cpu", "model.multi_modal_projector": "cpu", "lm_head": "cpu"}
    parts |= {"model.language_model": "disk", "model.crayon_prompt": "disk"}
    accelerate.dispatch_model(model, parts, offload_dir=str(tmp_path / "offload"))
    model.save_pretrained(tmp_path / "saved")
    loaded = load_pretrained(tmp_path / "saved").eval()
    assert torch.equal(loaded(**batch).logits, expected)


def test_hooks_that_were_taken_off_leave_no_trace() -> None:
    """accelerate leaves the method it found as an attribute, of the class that was."""
    model = make_llava("llama")
    before = snapshot(model)
    add_hook_to_module(model.model, AlignDevicesHook("cpu"))
    with pytest.raises(ValueError, match=r"forward of its own instance .* after apply_to_llava"):
        apply_to_llava(model)
    remove_hook_from_module(model, recurse=True)
    for _ in range(2):
        handle = apply_to_llava(model)
        for layer in model.model.language_model.layers:
            add_hook_to_module(layer, AlignDevicesHook("cpu"))
        remove_hook_from_module(model, recurse=True)
        handle.undo()
    assert_same(before, snapshot(model))


def test_a_linear_layer_that_does_more_is_refused() -> None:
    model = make_llava("llama")
    linear = model.model.language_model.layers[1].mlp.down_proj
    hook = linear.register_forward_hook(lambda *_: None)
    with pytest.raises(
        ValueError, match=r"^layers\.1\.mlp\.down_proj: expected a linear layer without hooks"
    ):
        apply_to_llava(model)
    hook.remove()
    linear.forward = lambda x: x
    with pytest.raises(ValueError, match="Linear has a forward of its own instance"):
        apply_to_llava(model)
    del linear.forward
    apply_to_llava(model)
