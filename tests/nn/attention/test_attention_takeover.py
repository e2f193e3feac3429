"""CrayonAttention in the place of a loaded module: what it shares, and what it refuses."""

from __future__ import annotations

import copy
import functools
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    CLIPVisionConfig,
    CohereConfig,
    Gemma2Config,
    GlmConfig,
    GptOssConfig,
    GraniteConfig,
    LlamaConfig,
    MistralConfig,
    Phi3Config,
    Qwen2Config,
    Qwen3Config,
    SmolLM3Config,
)
from transformers.models.clip.modeling_clip import CLIPAttention
from transformers.models.cohere.modeling_cohere import CohereAttention
from transformers.models.gemma2.modeling_gemma2 import Gemma2Attention
from transformers.models.glm.modeling_glm import GlmAttention
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssAttention
from transformers.models.granite.modeling_granite import GraniteAttention
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaRotaryEmbedding
from transformers.models.mistral.modeling_mistral import MistralAttention
from transformers.models.phi3.modeling_phi3 import Phi3Attention
from transformers.models.qwen2.modeling_qwen2 import Qwen2Attention
from transformers.models.qwen3.modeling_qwen3 import Qwen3Attention
from transformers.models.smollm3.modeling_smollm3 import SmolLM3Attention

from collavo_kernels.nn import CrayonAttention, CrayonInputs, DualQLoRALinear

SIZES: dict[str, Any] = {
    "hidden_size": 32,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "num_hidden_layers": 2,
}
KINDS: dict[str, tuple[Any, Any]] = {
    "llama": (LlamaAttention, LlamaConfig(**SIZES)),
    "mistral": (MistralAttention, MistralConfig(**SIZES, sliding_window=3)),
    "qwen2": (
        Qwen2Attention,
        Qwen2Config(**SIZES, use_sliding_window=True, sliding_window=3, max_window_layers=0),
    ),
    "granite": (GraniteAttention, GraniteConfig(**SIZES, attention_multiplier=0.3)),
    # The layer taken is its second, which does not rotate.
    "smollm3": (
        SmolLM3Attention,
        SmolLM3Config(**SIZES, no_rope_layers=[1, 0], pad_token_id=0, bos_token_id=1),
    ),
}
PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj")
B, S, T = 2, 6, 3
ROWS = torch.tensor([[-1, 0, 1, 1, -1, -1], [2, 2, -1, 0, 1, -1]], dtype=torch.int32)


def loaded(kind: str) -> Any:
    make, config = KINDS[kind]
    config._attn_implementation = "sdpa"
    module = make(config, 1).eval()
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.2)
    return module


def angles(first: int = 0, length: int = S) -> tuple[Tensor, Tensor]:
    positions = torch.arange(first, first + length)[None]
    return LlamaRotaryEmbedding(LlamaConfig(**SIZES))(torch.zeros(1), positions)


def causal(window: int | None) -> Tensor:
    i, j = torch.arange(S)[:, None], torch.arange(S)[None]
    return ((j <= i) if window is None else (j <= i) & (i - j < window))[None, None]


def dense(table: Tensor) -> Tensor:
    """The crayon per token, ``[B, S, hidden]``."""
    return torch.where((ROWS >= 0)[..., None], table[ROWS.clamp_min(0).long()], 0.0)


def with_crayon(attention: Any, x: Tensor, table: Tensor) -> Tensor:
    """A module of transformers with the crayon in its projections' input (attention mode)."""
    hooks = [
        getattr(attention, name).register_forward_pre_hook(lambda _, a: (a[0] + dense(table),))
        for name in PROJECTIONS[:3]
    ]
    window = getattr(attention.config, "sliding_window", None)
    out, _ = attention(x, position_embeddings=angles(), attention_mask=causal(window))
    for hook in hooks:
        hook.remove()
    return out


@pytest.mark.parametrize("mode", ["attention", "projection", "none"])
@pytest.mark.parametrize("kind", list(KINDS))
def test_everything_is_shared_and_nothing_is_changed(kind: str, mode: Any) -> None:
    theirs = loaded(kind)
    theirs.q_proj.weight.requires_grad_(False)
    theirs.v_proj.train()
    before = {name: (id(p), p.requires_grad) for name, p in theirs.named_parameters()}
    ours = CrayonAttention.from_attention(theirs, crayon_mode=mode, crayon_rank=4)
    shared = {n: (id(p), p.requires_grad) for n, p in ours.named_parameters() if "crayon" not in n}
    assert shared == before
    assert [getattr(ours, n) is getattr(theirs, n) for n in PROJECTIONS] == [True] * 4
    assert not ours.training and ours.v_proj.training and ours.layer_idx == 1
    assert all(not m.training for n, m in ours.named_modules() if "crayon" in n)
    x = torch.randn(B, S, 32)
    window = getattr(theirs.config, "sliding_window", None)
    expected, _ = theirs(x, position_embeddings=angles(), attention_mask=causal(window))
    torch.testing.assert_close(ours(x, angles())[0], expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("mode", ["attention", "projection"])
def test_hooks_of_the_projections_run(mode: Any) -> None:
    """A plain layer's weight is multiplied without calling it: not where something hangs on it."""
    ours: Any = CrayonAttention.from_attention(loaded("qwen2"), crayon_mode=mode, crayon_rank=4)
    ran: list[str] = []
    ours.q_proj.register_forward_hook(lambda *_: ran.append("q forward"))
    ours.k_proj.register_full_backward_hook(lambda *_: ran.append("k backward"))
    ours.v_proj.register_full_backward_pre_hook(lambda *_: ran.append("v backward"))
    crayon = CrayonInputs(table=torch.randn(T, 32), row_index=ROWS)
    ours(torch.randn(B, S, 32, requires_grad=True), angles(), crayon=crayon)[0].sum().backward()
    assert set(ran) == {"q forward", "k backward", "v backward"}


def test_the_modules_own_scale_counts() -> None:
    """Some families scale by another factor than D ** -0.5; both paths must follow."""
    theirs = loaded("llama")
    theirs.scaling = 0.07
    ours, x = CrayonAttention.from_attention(theirs), torch.randn(B, S, 32)
    expected, _ = theirs(x, position_embeddings=angles(), attention_mask=causal(None))
    for fused in (True, False):
        found, _ = ours(x, angles(), crayon=CrayonInputs(fused=fused))
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def four_bit(linear: nn.Linear) -> Any:
    bitsandbytes = pytest.importorskip("bitsandbytes")
    bias = linear.bias is not None
    layer = bitsandbytes.nn.Linear4bit(
        linear.in_features, linear.out_features, bias=bias, quant_type="nf4"
    )
    layer.load_state_dict(linear.state_dict())
    return layer.to("cpu")


class Doubled(nn.Linear):
    """A linear layer of another package: a subclass of ``nn.Linear`` with its own forward."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + nn.functional.linear(x, self.weight)


def adapted(linear: nn.Linear) -> DualQLoRALinear:
    layer = DualQLoRALinear.from_linear(linear, rank=4, adapters=("image",), quantized=False)
    nn.init.normal_(layer.lora_B["image"].weight, std=0.2)
    return layer


def doubled(linear: nn.Linear) -> Doubled:
    layer = Doubled(linear.in_features, linear.out_features, bias=linear.bias is not None)
    layer.load_state_dict(linear.state_dict())
    return layer


@pytest.mark.parametrize("wrap", [four_bit, adapted, doubled])
@pytest.mark.parametrize("kind", ["llama", "qwen2"])
def test_projections_of_other_packages(kind: str, wrap: Any) -> None:
    """The rows ride through them without bias (Qwen2 has some), in attention mode."""
    theirs = loaded(kind)
    for name in PROJECTIONS:
        setattr(theirs, name, wrap(getattr(theirs, name)))
    ours = CrayonAttention.from_attention(theirs)
    assert all(getattr(ours, name) is getattr(theirs, name) for name in PROJECTIONS)
    x, table = torch.randn(B, S, 32), torch.randn(T, 32)
    expected = with_crayon(theirs, x, table)
    for fused in (True, False, None):
        crayon = CrayonInputs(table=table, row_index=ROWS, fused=fused)
        found, _ = ours(x, angles(), crayon=crayon)
        torch.testing.assert_close(found, expected, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("wrap", [four_bit, adapted, doubled])
def test_the_output_projection_takes_a_table(wrap: Any) -> None:
    """Projection mode adds rows behind o_proj, whatever kind of layer it is."""
    theirs = loaded("llama")
    theirs.o_proj = wrap(theirs.o_proj)
    ours = CrayonAttention.from_attention(theirs, crayon_mode="projection", crayon_rank=4)
    nn.init.normal_(ours.crayon_o.B.weight, std=0.2)
    x, table = torch.randn(B, S, 32), torch.randn(T, 32, requires_grad=True)
    plain, _ = ours(x, angles())
    found, _ = ours(x, angles(), crayon=CrayonInputs(table=table, row_index=ROWS))
    expected = plain + dense(ours.crayon_o(table))
    torch.testing.assert_close(found, expected, atol=2e-5, rtol=1e-4)
    grads = [torch.autograd.grad(y.square().sum(), table)[0] for y in (found, expected)]
    torch.testing.assert_close(*grads, atol=2e-4, rtol=1e-4)


def test_a_renamed_subclass_is_known_by_its_forward() -> None:
    """FSDP2 puts a class of another name in front; its forward is still LLaMA's."""
    theirs = loaded("llama")
    theirs.__class__ = type("FSDPLlamaAttention", (LlamaAttention,), {})
    assert CrayonAttention.from_attention(theirs).q_proj is theirs.q_proj


class OwnForward(LlamaAttention):
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return super().forward(*args, **kwargs)


class CrossAttention(LlamaAttention):
    def __init__(self, config: Any, layer_idx: int) -> None:
        super().__init__(config, layer_idx)
        self.is_causal = False


@pytest.mark.parametrize(
    ("make", "config", "message"),
    [
        (Qwen3Attention, Qwen3Config(**SIZES), r"attention\.q_norm: not supported.*Qwen3Attention"),
        (GptOssAttention, GptOssConfig(**SIZES), r"attention\.sinks: not supported"),
        (Phi3Attention, Phi3Config(**SIZES, pad_token_id=0), r"attention\.qkv_proj: not supported"),
        (CLIPAttention, CLIPVisionConfig(hidden_size=32, num_attention_heads=4), "out_proj"),
        (CrossAttention, LlamaConfig(**SIZES), "bidirectional or cross attention"),
        # LLaMA's parameters, another computation: rotation by pairs, part of a head, a softcap.
        (CohereAttention, CohereConfig(**SIZES), "LlamaAttention.*got CohereAttention"),
        (GlmAttention, GlmConfig(**SIZES, pad_token_id=0), "LlamaAttention.*got GlmAttention"),
        (Gemma2Attention, Gemma2Config(**SIZES), "LlamaAttention.*got Gemma2Attention"),
        (OwnForward, LlamaConfig(**SIZES), "LlamaAttention.*got OwnForward"),
        (
            LlamaAttention,
            LlamaConfig(**SIZES, attn_logit_softcapping=30.0),
            r"config\.attn_logit_softcapping: soft-capped",
        ),
        # A decoder that was made an encoder.
        (
            LlamaAttention,
            LlamaConfig(**SIZES, is_causal=False),
            r"config\.is_causal: expected True",
        ),
        (
            LlamaAttention,
            LlamaConfig(
                **SIZES,
                rope_parameters={
                    "rope_type": "default",
                    "rope_theta": 1e4,
                    "partial_rotary_factor": 0.5,
                },
            ),
            "partial_rotary_factor",
        ),
    ],
)
def test_what_it_would_compute_wrongly_is_refused_by_name(
    make: Any, config: Any, message: str
) -> None:
    attention = make(config) if make is CLIPAttention else make(config, 0)
    with pytest.raises(ValueError, match=message):
        CrayonAttention.from_attention(attention)


def test_other_refusals() -> None:
    with pytest.raises(TypeError, match="attention: expected a module, got str"):
        CrayonAttention.from_attention("self_attn")  # type: ignore[arg-type]
    patched = loaded("llama")
    patched.forward = functools.partial(patched.forward)
    with pytest.raises(ValueError, match="forward of its own instance"):
        CrayonAttention.from_attention(patched)
    theirs = loaded("llama")
    layers: dict[str, nn.Module] = {name: getattr(theirs, name) for name in PROJECTIONS}
    with pytest.raises(ValueError, match=r"projections\['k_proj'\]: expected 32 inputs and 16"):
        CrayonAttention.from_attention(theirs, projections={**layers, "k_proj": nn.Linear(32, 32)})
    layers.pop("o_proj")
    with pytest.raises(
        ValueError, match=r"projections\['o_proj'\]: expected a linear layer, got N"
    ):
        CrayonAttention.from_attention(theirs, projections=layers)


def test_masks_of_other_implementations_are_refused() -> None:
    """Flash attention's mask says nothing of packed rows; they would see each other."""
    theirs = loaded("llama")
    theirs.config = copy.copy(theirs.config)
    theirs.config._attn_implementation = "flash_attention_2"
    ours = CrayonAttention.from_attention(theirs)
    with pytest.raises(ValueError, match=r"_attn_implementation: expected sdpa, eager or crayon"):
        ours(torch.randn(B, S, 32), angles())


def test_a_bidirectional_call_is_refused() -> None:
    """How transformers tells attention modules of ``config.is_causal = False`` set later."""
    ours = CrayonAttention.from_attention(loaded("llama"))
    with pytest.raises(ValueError, match="is_causal: expected True or nothing, got False"):
        ours(torch.randn(B, S, 32), angles(), is_causal=False)
