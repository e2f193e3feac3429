"""What people do with a patched decoder whose linear layers carry the crayon."""

from __future__ import annotations

import copy
import pickle
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import accelerate
import bitsandbytes
import peft
import pytest
import torch
import transformers as hf
from accelerate.hooks import remove_hook_from_module
from test_apply_to_llava import assert_same, generate, make_batch, plain, snapshot
from tiny_decoder_llavas import ADAPTERS, TEXTS, hooked, inputs, make_llava, patched
from tiny_decoders import counted
from torch import Tensor

from collavo import apply_to_llava, load_pretrained
from collavo.model.decoders import DECODERS
from collavo.model.layer import decoder_linears
from collavo_kernels.nn import peft_lora_config

pytestmark = pytest.mark.usefixtures("one_thread")

BOUND = [kind for kind, paths in DECODERS.items() if paths.layer == "linear"]
CRAYON = ("attention", "projection")


def gradients(model: Any) -> list[Tensor]:
    batch = make_batch()
    model.zero_grad()
    model(**batch, labels=batch["input_ids"]).loss.backward()
    return [p.grad.clone() for p in model.parameters() if p.grad is not None]


@pytest.mark.parametrize("mode", CRAYON)
@pytest.mark.parametrize("kind", BOUND)
def test_both_kinds_of_checkpointing_change_no_gradient(kind: str, mode: str) -> None:
    model = patched(kind, mode, **ADAPTERS).train()
    model.enable_input_require_grads()
    plainly = gradients(model)
    for reentrant in (False, True):
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        for once, again in zip(plainly, gradients(model), strict=True):
            # The table's gradients come from all layers, and are summed in another order.
            slack = 10 * torch.finfo(once.dtype).eps * float(once.abs().max())
            torch.testing.assert_close(again, once, rtol=0, atol=slack)


@pytest.mark.parametrize("options", [{"num_beams": 3}, {"use_cache": False}])
@pytest.mark.parametrize("implementation", ["eager", "crayon"])
@pytest.mark.parametrize("kind", BOUND)
def test_answers_are_those_of_the_hooks(
    kind: str, implementation: str, options: dict[str, Any]
) -> None:
    model = patched(kind, "attention", **ADAPTERS)
    stock = hooked(kind, model).model
    model.set_attn_implementation(implementation)
    with counted() as calls:
        found = generate(model, make_batch(), **options)
    assert torch.equal(found, generate(stock, inputs(torch.float32), **options))
    assert bool([call for call in calls if call["causal"]]) == (implementation == "crayon")


@pytest.mark.parametrize("kind", BOUND)
def test_a_second_turn_over_a_cache_that_was_kept(kind: str) -> None:
    """Tokens behind the image alone: the crayon's effect lies in the cache."""
    model, batch = patched(kind, "attention", **ADAPTERS), make_batch()
    batch = {name: value[:1] for name, value in batch.items()}
    more = torch.tensor([[9, 10, 11]])
    with torch.no_grad():
        cache = model(**batch, use_cache=True).past_key_values
        found = model(input_ids=more, past_key_values=cache).logits
        batch["input_ids"] = torch.cat([batch["input_ids"], more], 1)
        batch["attention_mask"] = torch.ones_like(batch["input_ids"])
        expected = model(**batch).logits[:, -3:]
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("mode", CRAYON)
@pytest.mark.parametrize("kind", BOUND)
def test_two_threads_run_one_model(kind: str, mode: str) -> None:
    """They meet between attention and MLP of every layer: state in a module would be mixed up."""
    model, first = patched(kind, mode, **ADAPTERS), make_batch()
    second = first | {
        "crayon_index": torch.tensor([[1, 0, 0, 1], [-1, 2, 2, 1]], dtype=torch.int32),
        "crayon_class": torch.tensor([[7, 2, -1], [4, 80, 133]], dtype=torch.int32),
    }
    with torch.no_grad():
        alone = [model(**batch).logits for batch in (first, second)]
    assert not torch.equal(*alone)
    meeting = threading.Barrier(2)

    def meet(*_: Any) -> None:
        meeting.wait(60)

    for layer in model.model.language_model.layers:
        layer.self_attn.register_forward_hook(meet)

    def run(batch: dict[str, Tensor]) -> list[Tensor]:
        try:
            with torch.no_grad():
                return [model(**batch).logits for _ in range(5)]
        except BaseException:
            meeting.abort()  # who waits for a thread that failed need not wait long
            raise

    with ThreadPoolExecutor(2) as pool:
        together = list(pool.map(run, (first, second)))
    for expected, rounds in zip(alone, together, strict=True):
        assert all(torch.equal(found, expected) for found in rounds)


@pytest.mark.parametrize("quantize", [None, "nf4"])
@pytest.mark.parametrize("mode", [*CRAYON, "none"])
@pytest.mark.parametrize("kind", BOUND)
def test_saved_copied_and_pickled(kind: str, mode: str, quantize: Any, tmp_path: Path) -> None:
    model = patched(kind, mode, quantize=quantize, **ADAPTERS)
    # Before a forward: transformers' recording hooks do not pickle, in a stock model neither.
    twins = [copy.deepcopy(model), pickle.loads(pickle.dumps(model))]
    model.save_pretrained(tmp_path)
    expected = model(**make_batch()).logits
    for twin in (load_pretrained(tmp_path), *twins):
        assert torch.equal(twin(**make_batch()).logits, expected)


def in_4_bits(model: Any) -> Any:
    for layer in model.train().model.language_model.layers:  # in eval mode they repack themselves
        for parent, name in decoder_linears(layer):
            dense = getattr(parent, name)
            sizes = (dense.in_features, dense.out_features, dense.bias is not None)
            made = bitsandbytes.nn.Linear4bit(*sizes, quant_type="nf4")
            made.load_state_dict(dense.state_dict())
            setattr(parent, name, made.to("cpu"))
    return model


@pytest.mark.parametrize("mode", CRAYON)
@pytest.mark.parametrize("kind", list(TEXTS))
def test_what_bitsandbytes_quantised(kind: str, mode: str) -> None:
    """The same 4 bits as ours, and after ``undo`` its own layers again."""
    model, batch = in_4_bits(make_llava(kind)), make_batch()
    logits, before = model(**plain(batch)).logits, snapshot(model)
    handle = apply_to_llava(model, crayon_mode=mode, crayon_rank=4, **ADAPTERS)
    ours = patched(kind, mode, quantize="nf4", **ADAPTERS)
    added = {n: p for n, p in ours.named_parameters() if "crayon" in n or "lora" in n}
    model.load_state_dict(added, strict=False)
    assert torch.equal(model(**batch).logits, ours(**batch).logits)
    handle.undo()
    assert_same(before, snapshot(model))
    assert torch.equal(model(**plain(batch)).logits, logits)


@pytest.mark.parametrize("mode", CRAYON)
@pytest.mark.parametrize("kind", BOUND)
def test_adapters_that_peft_has_on_it(kind: str, mode: str) -> None:
    """They become slots, which see the crayon too, and come back with ``undo``."""
    targets = r".*language_model.*\.(\w*_proj)"
    config = peft.LoraConfig(r=2, target_modules=targets, init_lora_weights=False)
    model = peft.get_peft_model(make_llava(kind), config)
    batch = make_batch()
    logits = model(**plain(batch)).logits
    valid = batch["attention_mask"].bool()
    with pytest.warns(UserWarning, match="adapters of this PeftModel"):
        handle = apply_to_llava(model, crayon_mode=mode, crayon_rank=4)
    inner = model.get_base_model()
    found = inner(**batch).logits
    torch.testing.assert_close(found[valid], logits[valid], rtol=1e-5, atol=1e-5)
    linears = list(decoder_linears(inner.model.language_model.layers[0]))
    assert all(getattr(parent, name).adapter_names == ("default",) for parent, name in linears)
    handle.undo()
    assert torch.equal(model(**plain(batch)).logits, logits)


@pytest.mark.parametrize("quantize", [None, "nf4"])
@pytest.mark.parametrize("mode", CRAYON)
@pytest.mark.parametrize("kind", ["Qwen3", "Phi3"])
def test_adapters_that_peft_puts_on_it_see_the_crayon(kind: str, mode: str, quantize: Any) -> None:
    """PEFT's branches around our layers compute what a slot does: on tokens and on rows."""
    model, twin = (
        patched(kind, mode, adapters=names, lora_rank=2, quantize=quantize)
        for names in (("a",), ("a", "b"))
    )
    before, batch = model(**make_batch()).logits, make_batch()
    targets = r".*language_model.*\.(\w*_proj)"
    tuned = peft.get_peft_model(
        model, peft_lora_config(r=2, lora_alpha=64, target_modules=targets, init_lora_weights=False)
    )
    theirs = dict(twin.named_parameters())
    own = {}
    for name, value in tuned.named_parameters():
        plainly = name.removeprefix("base_model.model.").replace("base_layer.", "")
        own[plainly.replace(".default.", ".b.")] = value
    for name, value in theirs.items():
        if "crayon" in name or "lora" in name:
            value.data.copy_(own[name].data)
    valid = batch["attention_mask"].bool()
    found, expected = tuned(**batch).logits[valid], twin(**batch).logits[valid]
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert float((found - before[valid]).detach().abs().max()) > 0.1
    tuned.unload()
    assert torch.equal(model(**batch).logits, before)


@pytest.mark.parametrize("mode", CRAYON)
@pytest.mark.parametrize("kind", ["Qwen3", "Phi3"])
def test_offload(kind: str, mode: str, tmp_path: Path) -> None:
    model = make_llava(kind)
    stock = make_llava(kind)(**plain(make_batch())).logits
    handle = apply_to_llava(model, crayon_mode=mode, crayon_rank=4, quantize="nf4", **ADAPTERS)
    for name, parameter in model.named_parameters():
        if "crayon" in name or "lora" in name:
            parameter.data.normal_(0.0, 0.2)
    expected, tokens = model(**make_batch()).logits, generate(model, make_batch())
    accelerate.disk_offload(model, str(tmp_path), execution_device=torch.device("cpu"))
    assert any(p.is_meta for p in model.parameters())
    with torch.no_grad():
        assert torch.equal(model(**make_batch()).logits, expected)
    assert torch.equal(generate(model, make_batch()), tokens)
    remove_hook_from_module(model, recurse=True)
    assert torch.equal(handle.undo()(**plain(make_batch())).logits, stock)


@pytest.mark.parametrize("mode", CRAYON)
def test_compiled(mode: str) -> None:
    model = patched("Qwen3", mode, **ADAPTERS)
    decoder = model.model.language_model
    expected = model(**make_batch()).logits
    for layer in decoder.layers:
        layer.compile(backend="eager")
    torch.testing.assert_close(model(**make_batch()).logits, expected)


@pytest.mark.parametrize(
    "config",
    [
        hf.GemmaConfig,
        hf.StableLmConfig,
        hf.GPTNeoXConfig,
        hf.MixtralConfig,
        hf.Glm4Config,
    ],
)
def test_another_decoder_is_refused_by_name(config: Any) -> None:
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "vocab_size": 32}
    text = config(**sizes, num_attention_heads=2, num_key_value_heads=2, pad_token_id=0)
    kwargs = {"vision_config": make_llava("Llama").config.vision_config, "image_token_index": 31}
    model = hf.LlavaForConditionalGeneration(hf.LlavaConfig(text_config=text, **kwargs))
    name = config.__name__.removesuffix("Config")
    before = [type(m) for m in model.modules()]
    match = rf"Llama, .*, Olmo2, got .*{name}.*attn_implementation=.crayon"
    with pytest.raises(ValueError, match=match):
        apply_to_llava(model)
    assert [type(m) for m in model.modules()] == before
