"""CrayonAttention beside transformers' attention modules, and its own crayon paths."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, LlamaConfig, MistralConfig, Qwen2Config, StaticCache
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaRotaryEmbedding
from transformers.models.mistral.modeling_mistral import MistralAttention
from transformers.models.qwen2.modeling_qwen2 import Qwen2Attention

from collavo_kernels import crayon_attention
from collavo_kernels.nn import CrayonAttention, CrayonInputs, DualQLoRALinear

SIZES: dict[str, Any] = {
    "hidden_size": 32,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_hidden_layers": 2,
}
KINDS: dict[str, tuple[Any, Any]] = {
    "llama": (LlamaAttention, LlamaConfig(**SIZES)),
    "llama with bias": (LlamaAttention, LlamaConfig(**SIZES, attention_bias=True)),
    "mistral": (MistralAttention, MistralConfig(**SIZES, sliding_window=3)),
    "qwen2": (
        Qwen2Attention,
        Qwen2Config(**SIZES, use_sliding_window=True, sliding_window=3, max_window_layers=0),
    ),
}
B, S, T = 2, 6, 3


def pair(kind: str, **options: Any) -> tuple[CrayonAttention, Any, Any]:
    """The module, transformers' own with the same weights, and the configuration."""
    make, config = KINDS[kind]
    config._attn_implementation = "sdpa"
    ours, theirs = CrayonAttention(config, 0, **options).eval(), make(config, 0).eval()
    theirs.load_state_dict({k: v for k, v in ours.state_dict().items() if "crayon" not in k})
    return ours, theirs, config


def angles(config: Any, first: int = 0, length: int = S) -> tuple[Tensor, Tensor]:
    positions = torch.arange(first, first + length)[None]
    return LlamaRotaryEmbedding(LlamaConfig(**SIZES))(torch.zeros(1), positions)


def causal(length: int, window: int | None) -> Tensor:
    i, j = torch.arange(length)[:, None], torch.arange(length)[None]
    visible = (j <= i) if window is None else (j <= i) & (i - j < window)
    return visible[None, None]


def crayon(**changes: Any) -> CrayonInputs:
    rows = torch.tensor([[-1, 0, 1, 1, -1, -1], [2, 2, -1, 0, 1, -1]], dtype=torch.int32)
    base = CrayonInputs(table=torch.randn(T, 32), row_index=rows, fused=True)
    return base._replace(**changes)


@pytest.mark.parametrize("kind", list(KINDS))
def test_same_keys_and_same_output_as_the_module_it_replaces(kind: str) -> None:
    ours, theirs, config = pair(kind)
    assert {k: v.shape for k, v in ours.state_dict().items()} == {
        k: v.shape for k, v in theirs.state_dict().items()
    }
    x, cos_sin = torch.randn(B, S, 32), angles(config)
    mask = causal(S, ours.sliding_window)
    expected, _ = theirs(x, position_embeddings=cos_sin, attention_mask=mask)
    for found in (
        ours(x, cos_sin)[0],
        ours(x, position_embeddings=cos_sin, attention_mask=mask)[0],
        ours(x, cos_sin, crayon=CrayonInputs(fused=True))[0],
    ):
        torch.testing.assert_close(found, expected, atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("kind", list(KINDS))
@pytest.mark.parametrize("mode", ["attention", "projection"])
def test_fused_prefill_equals_the_path_on_sdpa(kind: str, mode: Any) -> None:
    """Forward and gradients; the crayon added to the projections' input, or to their output."""
    ours, _, config = pair(kind, crayon_mode=mode, crayon_rank=4)
    for parameter in ours.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    x, cos_sin, given = torch.randn(B, S, 32), angles(config), crayon()
    grads = []
    for fused in (True, False):
        leaf = x.clone().requires_grad_()
        table = given.table.clone().requires_grad_()
        out, _ = ours(leaf, cos_sin, crayon=given._replace(table=table, fused=fused))
        ours.zero_grad()
        (out * torch.linspace(-1, 1, out.numel()).view_as(out)).sum().backward()
        grads.append([out, leaf.grad, table.grad, *(p.grad.clone() for p in ours.parameters())])
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)


def test_attention_mode_equals_the_crayon_in_the_projections_input() -> None:
    """The table has no bias: with biases on, adding W c + b would add b twice."""
    ours, theirs, config = pair("llama with bias")
    for parameter in ours.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    theirs.load_state_dict(ours.state_dict())
    x, cos_sin, given = torch.randn(B, S, 32), angles(config), crayon()
    rows = given.row_index
    dense = torch.where((rows >= 0)[..., None], given.table[rows.clamp_min(0).long()], 0.0)
    for linear in (theirs.q_proj, theirs.k_proj, theirs.v_proj):
        linear.register_forward_pre_hook(lambda _, args: (args[0] + dense,))
    expected, _ = theirs(x, position_embeddings=cos_sin, attention_mask=causal(S, None))
    found, _ = ours(x, cos_sin, crayon=given)
    torch.testing.assert_close(found, expected, atol=5e-6, rtol=1e-5)


@pytest.mark.parametrize("kind", ["llama", "mistral"])
@pytest.mark.parametrize("static", [False, True])
def test_prefill_then_cached_calls_equal_one_call(kind: str, static: bool) -> None:
    """A fused prefill fills the cache; S = 1 and S > 1 calls go on from it."""
    ours, _, config = pair(kind)
    x, cos, sin = torch.randn(B, 10, 32), *angles(config, length=10)
    whole, _ = ours(x, (cos, sin))
    plain = LlamaConfig(**SIZES)  # every layer of the cache keeps all tokens
    cache: Any = StaticCache(config=plain, max_cache_len=12) if static else DynamicCache()
    parts, first = [], 0
    for length in (6, 1, 3):
        at = slice(first, first + length)
        now = CrayonInputs(fused=first == 0)
        out, _ = ours(x[:, at], (cos[:, at], sin[:, at]), past_key_values=cache, crayon=now)
        parts.append(out)
        first += length
    torch.testing.assert_close(torch.cat(parts, 1), whole, atol=2e-6, rtol=1e-5)


def test_key_range_equals_rows_alone() -> None:
    ours, _, config = pair("llama")
    x, cos_sin = torch.randn(B, S, 32), angles(config)
    ranges = torch.tensor([[2, 6], [0, 4]], dtype=torch.int32)
    found, _ = ours(x, cos_sin, crayon=CrayonInputs(key_range=ranges, fused=True))
    for sample, (first, end) in enumerate(ranges.tolist()):
        part = tuple(angle[:, first:end] for angle in cos_sin)
        alone, _ = ours(x[sample : sample + 1, first:end], part)
        torch.testing.assert_close(
            found[sample : sample + 1, first:end], alone, atol=2e-6, rtol=1e-5
        )


def test_rows_carry_the_adapters_of_their_tokens() -> None:
    """An adapter on image tokens only acts on their crayon as well: W and B A of h + c."""
    _, config = KINDS["llama"]
    options: dict[str, Any] = {"adapters": ("plora",), "rank": 4, "quantized": False}
    sizes = {"q_proj": (32, 32), "k_proj": (32, 16), "v_proj": (32, 16), "o_proj": (32, 32)}
    layers = {name: DualQLoRALinear(*size, **options) for name, size in sizes.items()}
    for layer in layers.values():
        torch.nn.init.normal_(layer.lora_B["plora"].weight, std=0.2)
    ours = CrayonAttention(config, 0, projections=layers).eval().double()
    x, given = torch.randn(B, S, 32).double(), crayon(table=torch.randn(T, 32).double())
    cos, sin = (angle.double() for angle in angles(config))
    rows = given.row_index
    mask = (rows >= 0).to(torch.uint8)
    row_mask = torch.ones(T, dtype=torch.uint8)
    found, _ = ours(x, (cos, sin), crayon=given._replace(adapter_mask=mask, row_mask=row_mask))
    dense = torch.where((rows >= 0)[..., None], given.table[rows.clamp_min(0).long()], 0.0)
    states = [
        layers[n](x + dense, mask).unflatten(-1, (-1, 8)) for n in ("q_proj", "k_proj", "v_proj")
    ]
    out = crayon_attention(*states, cos=cos, sin=sin).out.flatten(2)
    torch.testing.assert_close(found, layers["o_proj"](out, mask), atol=1e-10, rtol=1e-10)


def test_one_mask_without_the_other_is_refused() -> None:
    """Adapters that act on a token and not on its row would give another crayon."""
    ours, _, config = pair("llama")
    mask, row_mask = torch.ones(B, S, dtype=torch.uint8), torch.ones(T, dtype=torch.uint8)
    x, cos_sin = torch.randn(B, S, 32), angles(config)
    with pytest.raises(ValueError, match=r"crayon\.row_mask: expected"):
        ours(x, cos_sin, crayon=crayon(adapter_mask=mask))
    with pytest.raises(ValueError, match=r"crayon\.adapter_mask: expected"):
        ours(x, cos_sin, crayon=crayon(row_mask=row_mask))


@pytest.mark.parametrize("fused", [True, False])
def test_rows_out_of_range_are_named_on_both_paths(fused: bool) -> None:
    ours, _, config = pair("llama")
    given = crayon(fused=fused)
    given.row_index[1, 2] = T
    with pytest.raises(ValueError, match=rf"row_index: .* got {T} at sample 1, token 2"):
        ours(torch.randn(B, S, 32), angles(config), crayon=given)


@pytest.mark.parametrize("mode", ["attention", "projection"])
def test_both_paths_round_alike_in_16_bits(mode: Any) -> None:
    """What a cache gets does not depend on the path: float32 inside, rounded once."""
    ours, _, config = pair("llama", crayon_mode=mode, crayon_rank=4)
    ours = ours.bfloat16()
    x, cos_sin = torch.randn(B, S, 32).bfloat16(), angles(config)
    caches: list[Any] = []
    for fused in (True, False):
        caches.append(DynamicCache())
        given = crayon(fused=fused, table=torch.ones(T, 32).bfloat16())
        ours(x, cos_sin, past_key_values=caches[-1], crayon=given)
    for name in ("keys", "values"):
        one, other = (getattr(cache.layers[0], name) for cache in caches)
        assert torch.equal(one, other)


def test_autocast_on_both_paths() -> None:
    ours, _, config = pair("llama", crayon_mode="projection", crayon_rank=4)
    x, cos_sin = torch.randn(B, S, 32), angles(config)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        fused, plain = (ours(x, cos_sin, crayon=crayon(fused=f))[0] for f in (True, False))
    assert fused.dtype == plain.dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"attn_logit_softcapping": 50.0}, "soft-capped"),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor"),
        ({"partial_rotary_factor": 0.25}, "partial_rotary_factor"),
        ({"head_dim": 7}, "head_dim: expected an even"),
        ({"head_dim": 512}, "head_dim: expected an even"),
        ({"num_key_value_heads": 3}, "num_key_value_heads: expected a divisor"),
    ],
)
def test_what_the_operator_lacks_is_refused_at_construction(
    change: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        CrayonAttention(SimpleNamespace(**{**SIZES, **change}), 0)


def test_a_padding_mask_is_refused_with_what_to_do() -> None:
    ours, _, config = pair("llama")
    with pytest.raises(ValueError, match=r"expected \[B, 1, S, keys\].*key_range"):
        ours(torch.randn(B, S, 32), angles(config), attention_mask=torch.ones(B, S))
