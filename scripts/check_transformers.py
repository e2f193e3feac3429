"""Runs the modules of ``collavo_kernels.nn`` beside the transformers that is installed.

Prints one line: the versions, and "ok" or the first thing that fails. ``check_versions.sh`` runs it
in an environment per version.
"""

from __future__ import annotations

import copy
import importlib.metadata
import sys
import traceback
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from collavo_kernels import CrayonMap, NF4Weight, panoptic_lookup
from collavo_kernels.nn import (
    CrayonAttention,
    CrayonInputs,
    CrayonPrompt,
    DualQLoRALinear,
    register_attention,
)

REGISTERS_FROM = (5, 5)
TOKENS = torch.tensor([[3, 17, 5, 40, 8, 8, 21], [9, 2, 33, 7, 60, 1, 12]])
# Two roundings apart at most: the twin multiplies by the same weights in another order.
TOLERANCE = {"rtol": 1e-4, "atol": 1e-5}


# Vicuna is LLaMA. A window shorter than the prompt, which older versions put into masks alone.
KINDS = {
    "llama": (LlamaConfig, LlamaForCausalLM, {}),
    "mistral": (MistralConfig, MistralForCausalLM, {"sliding_window": 4}),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM, {"use_sliding_window": False}),
}


def tiny(kind: str, **options: str) -> Any:
    """Return a decoder of two layers with random weights."""
    torch.manual_seed(0)
    config_class, model_class, more = KINDS[kind]
    config = config_class(
        vocab_size=64,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        bos_token_id=1,
        eos_token_id=None,
        pad_token_id=0,
        initializer_range=0.2,
        **more,
    )
    return model_class._from_config(config, **options).eval()


def tiny_llama() -> LlamaForCausalLM:
    """Return the decoder that most checks use."""
    return tiny("llama", attn_implementation="sdpa")


def quantise(model: LlamaForCausalLM) -> tuple[LlamaForCausalLM, LlamaForCausalLM]:
    """Return the model with ``DualQLoRALinear`` in every linear place, and its dense twin."""
    twin = copy.deepcopy(model)
    for name, linear in list(model.model.named_modules()):
        if isinstance(linear, nn.Linear):
            parent, _, attribute = name.rpartition(".")
            layer = DualQLoRALinear.from_linear(linear, rank=4)
            setattr(model.model.get_submodule(parent), attribute, layer)
            base = layer.base()
            if not isinstance(base, NF4Weight):
                raise TypeError("from_linear made a dense layer")
            twin.model.get_submodule(name).weight.data = base.dequantize()
    return model, twin


def same(name: str, found: Tensor, expected: Tensor) -> None:
    """Raise unless two tensors are equal up to the order of a sum."""
    torch.testing.assert_close(found, expected, msg=lambda text: f"{name}: {text}", **TOLERANCE)


def check_linear() -> str:
    """Compare logits, gradients and greedy tokens of a quantised model with those of its twin."""
    model, twin = quantise(tiny_llama())
    results = [each(TOKENS, labels=TOKENS) for each in (model, twin)]
    same("logits", results[0].logits, results[1].logits)
    for result in results:
        result.loss.backward()
    same("gradient of the embedding", *(m.model.embed_tokens.weight.grad for m in (model, twin)))
    layers = [m for m in model.modules() if isinstance(m, DualQLoRALinear)]
    if len(layers) != 14 or not all(bool(m.adapter("vl").b.grad.any()) for m in layers):
        raise AssertionError("an adapter got no gradient")
    mask = torch.ones_like(TOKENS)
    mask[0, :2] = 0  # left padding
    options = {"attention_mask": mask, "max_new_tokens": 8, "do_sample": False}
    tokens = [each.generate(TOKENS, **options) for each in (model, twin)]
    if not torch.equal(*tokens):
        raise AssertionError(f"generate: {tokens[0].tolist()} is not {tokens[1].tolist()}")
    return "DualQLoRALinear"


def check_prompt() -> str:
    """Train a crayon that is added to the embeddings of image tokens; it changes the logits."""
    maps = torch.tensor([[[3, 3], [0, 7]]] * 2, dtype=torch.int32)
    ids, classes = torch.tensor([[3, 7], [0, 2]], dtype=torch.int32)
    crayon: CrayonMap = panoptic_lookup(maps, [ids] * 2, [classes] * 2, grid=(2, 2))
    model, prompt = tiny_llama(), CrayonPrompt(embed_dim=8, hidden_size=64, zero_init=False)
    plain = model.get_input_embeddings()(TOKENS).detach()
    rows = prompt(crayon)[crayon.row_index.long()]
    embeddings = torch.cat([plain[:, :1], plain[:, 1:5] + rows, plain[:, 5:]], dim=1)
    result = model(inputs_embeds=embeddings, labels=TOKENS)
    result.loss.backward()
    if torch.equal(result.logits, model(inputs_embeds=plain).logits):
        raise AssertionError("the crayon changes no logit")
    if not all(bool(p.grad.isfinite().all()) and bool(p.grad.any()) for p in prompt.parameters()):
        raise AssertionError("a parameter of the prompt got no gradient")
    return "CrayonPrompt"


def check_crayon_attention() -> str:
    """Compare ``CrayonAttention`` in every layer with what it replaces, and with a dense crayon."""
    for kind in KINDS:
        for implementation in ("sdpa", "eager"):
            stock = tiny(kind, attn_implementation=implementation)
            model = copy.deepcopy(stock)
            for layer in model.model.layers:
                layer.self_attn = CrayonAttention.from_attention(layer.self_attn)
            name = f"{kind}, {implementation}"
            compare_decoders(name, model, stock)
            compare_crayons(name, model, stock)
    return "CrayonAttention"


def compare_decoders(name: str, model: Any, stock: Any) -> None:
    """Compare logits, gradients and tokens: padded, with every kind of cache, in two turns."""
    if list(model.state_dict()) != list(stock.state_dict()):
        raise AssertionError(f"{name}: the state dict has other names")
    mask = torch.ones_like(TOKENS)
    mask[0, :2] = 0  # left padding
    for each in (None, mask):
        valid = mask.bool() if each is not None else torch.ones_like(TOKENS).bool()
        logits = [m(TOKENS, attention_mask=each).logits[valid] for m in (model, stock)]
        same(f"{name}: logits", *logits)
        gradients = []
        for m, out in zip((model, stock), logits, strict=True):
            weights = [layer.self_attn.k_proj.weight for layer in m.model.layers]
            gradients.append(torch.cat(torch.autograd.grad(out.square().sum(), weights)))
        scale = gradients[1].abs().max()
        same(f"{name}: gradients", *(gradient / scale for gradient in gradients))
    ways: dict[str, dict[str, Any]] = {
        "": {},
        "beams": {"num_beams": 3},
        "uncached": {"use_cache": False},
        "static": {"cache_implementation": "static"},
    }
    for way, options in ways.items():
        options |= {"attention_mask": mask, "max_new_tokens": 8, "do_sample": False}
        try:  # 4.38 to 4.40 leave a static cache in the model
            expected = copy.deepcopy(stock).generate(TOKENS, **options)
        except (ValueError, AttributeError, TypeError, IndexError):
            if way != "static":  # not every version can
                raise
            continue
        tokens = copy.deepcopy(model).generate(TOKENS, **options)
        if not torch.equal(tokens, expected):
            raise AssertionError(f"{name} {way}: {tokens.tolist()} is not {expected.tolist()}")
    parts = [two_turns(each) for each in (model, stock)]
    same(f"{name}: a second turn", *parts)


@torch.no_grad()
def two_turns(model: Any) -> Tensor:
    """Return the logits of tokens that come in two parts, over one cache."""
    first = model(TOKENS[:, :4], use_cache=True)
    second = model(TOKENS[:, 4:], past_key_values=first.past_key_values, use_cache=True)
    return torch.cat([first.logits, second.logits], 1)


def compare_crayons(name: str, model: Any, stock: Any) -> None:
    """Compare a table and a row index with vectors added to the projections' input."""
    rows = torch.tensor([[-1, 0, 1, 1, 2, -1, -1], [-1, 2, 2, 0, 0, 1, -1]], dtype=torch.int32)
    tables = [torch.randn(3, 64, generator=torch.manual_seed(1)).requires_grad_() for _ in "ab"]
    crayon = CrayonInputs(tables[0], rows)
    padded = torch.cat([tables[1], torch.zeros(1, 64)])
    handles = []
    for ours, theirs in zip(model.model.layers, stock.model.layers, strict=True):
        handles.append(
            ours.self_attn.register_forward_pre_hook(
                lambda _, args, kwargs: (args, {**kwargs, "crayon": crayon}), with_kwargs=True
            )
        )
        for projection in ("q_proj", "k_proj", "v_proj"):
            handles.append(
                getattr(theirs.self_attn, projection).register_forward_pre_hook(
                    lambda _, args: (args[0] + padded[rows.long()],)
                )
            )
    logits = [each(TOKENS, use_cache=False).logits for each in (model, stock)]
    same(f"{name}: logits with a crayon", *logits)
    found, expected = (
        torch.autograd.grad(out.square().sum(), table)[0]
        for out, table in zip(logits, tables, strict=True)
    )
    same(
        f"{name}: gradient of the table",
        found / expected.abs().max(),
        expected / expected.abs().max(),
    )
    for handle in handles:
        handle.remove()


def check_attention() -> str:
    """Compare ``attn_implementation="crayon"`` with SDPA; older versions are refused by name."""
    version = importlib.metadata.version("transformers")
    numbers = tuple(int(part) for part in version.split(".")[:2])
    try:
        register_attention()
    except ImportError as error:
        sentence = str(error)
        if numbers >= REGISTERS_FROM or f"found {version};" not in sentence:
            raise
        return f"({sentence})"
    if numbers < REGISTERS_FROM:
        raise AssertionError("register_attention did not refuse")
    mask = torch.ones_like(TOKENS)
    mask[1, :3] = 0
    logits = [
        tiny("llama", attn_implementation=name)(TOKENS, attention_mask=mask).logits[mask.bool()]
        for name in ("crayon", "sdpa")
    ]
    same("logits of the crayon implementation", *logits)
    return "register_attention"


def main() -> int:
    """Run the checks; returns the exit status."""
    names = ("transformers", "tokenizers", "numpy", "torch")
    versions = [f"{name} {importlib.metadata.version(name)}" for name in names]
    line = f"{versions[0]:<20} ({', '.join(versions[1:])})"
    checks: tuple[Callable[[], str], ...] = (
        check_linear,
        check_prompt,
        check_crayon_attention,
        check_attention,
    )
    passed = []
    for check in checks:
        try:
            passed.append(check())
        except Exception as error:
            traceback.print_exc()
            words = " ".join(str(error).split())
            print(f"{line}: {check.__name__} FAILED: {type(error).__name__}: {words}")
            return 1
    print(f"{line}: ok: {', '.join(passed)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
