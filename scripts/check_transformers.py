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

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from collavo_kernels import CrayonMap, NF4Weight, panoptic_lookup
from collavo_kernels.nn import CrayonAttention, CrayonPrompt, DualQLoRALinear, register_attention

REGISTERS_FROM = (5, 17)
TOKENS = torch.tensor([[3, 17, 5, 40, 8, 8, 21], [9, 2, 33, 7, 60, 1, 12]])
# Two roundings apart at most: the twin multiplies by the same weights in another order.
TOLERANCE = {"rtol": 1e-4, "atol": 1e-5}


def tiny_llama(**options: str) -> LlamaForCausalLM:
    """Return a decoder of two layers with random weights."""
    torch.manual_seed(0)
    config = LlamaConfig(
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
    )
    if options:
        return LlamaForCausalLM._from_config(config, **options).eval()
    return LlamaForCausalLM(config).eval()


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
    """Compare ``CrayonAttention`` in every layer with what it replaces; it may refuse, in words."""
    stock = tiny_llama()
    model = copy.deepcopy(stock)
    try:
        for layer in model.model.layers:
            layer.self_attn = CrayonAttention.from_attention(layer.self_attn)
    except ValueError as error:
        return f"CrayonAttention refuses: {error}"
    logits = [each(TOKENS, use_cache=False).logits for each in (model, stock)]
    same("logits of CrayonAttention", *logits)
    options = {"max_new_tokens": 8, "do_sample": False}
    expected = stock.generate(TOKENS, **options)
    uncached = model.generate(TOKENS, use_cache=False, **options)
    try:
        tokens = model.generate(TOKENS, **options)
    except ImportError as error:
        if not torch.equal(uncached, expected):
            raise AssertionError("generate without a cache gives other tokens") from error
        return f"CrayonAttention without a cache ({error})"
    if not torch.equal(tokens, expected):
        raise AssertionError(f"generate: {tokens.tolist()} is not {expected.tolist()}")
    return "CrayonAttention"


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
        tiny_llama(attn_implementation=name)(TOKENS, attention_mask=mask).logits[mask.bool()]
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
