"""What ``CrayonAttention`` reads from a configuration or takes over from a loaded module."""

from __future__ import annotations

from typing import Any

from torch import nn

from collavo_kernels.nn.linear.offload import has_own_forward
from collavo_kernels.ops.crayon_attention.inputs import LARGEST_HEAD_DIM

ATTENTION_PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj")
"""The linear layers of a LLaMA-shaped attention, by the names that its checkpoints have."""

SOURCES = (
    "LlamaAttention",
    "MistralAttention",
    "Qwen2Attention",
    "GraniteAttention",
    "SmolLM3Attention",
)
# Before 4.48 each implementation is a class. Masks of FlashAttention's are of another kind.
_OLDER = tuple(name.replace("Attention", "SdpaAttention") for name in SOURCES)


def head_dim(config: Any) -> int:
    """Return D: ``config.head_dim``, or the hidden size divided by the heads."""
    given = getattr(config, "head_dim", None)
    return int(given or config.hidden_size // config.num_attention_heads)


def sliding_window(config: Any, layer_idx: int) -> int | None:
    """Return the window of a layer, or None where it sees everything."""
    kinds = getattr(config, "layer_types", None)
    if getattr(config, "use_sliding_window", None) is False:  # older Qwen2 keeps a size
        return None
    window = getattr(config, "sliding_window", None)
    sliding = kinds is None or kinds[layer_idx] == "sliding_attention"
    return int(window) if window and sliding else None


def refuse_config(config: Any) -> None:
    """Check a configuration for what ``crayon_attention`` lacks.

    Raises:
        ValueError: naming the field.
    """
    for name in ("attn_logit_softcapping", "attn_logit_softcap", "softcap"):
        if getattr(config, name, None):
            raise ValueError(
                f"config.{name}: soft-capped scores are not supported, got {getattr(config, name)}"
            )
    if getattr(config, "is_causal", True) is False:
        raise ValueError("config.is_causal: expected True, got False; the module is causal")
    rope = getattr(config, "rope_parameters", None)
    rope = rope if isinstance(rope, dict) else {}
    partial = rope.get("partial_rotary_factor", getattr(config, "partial_rotary_factor", None))
    if partial not in (None, 1, 1.0):
        raise ValueError(
            f"config.partial_rotary_factor: expected 1 (all of a head rotates), got {partial}"
        )
    dim = head_dim(config)
    if dim % 2 or not 0 < dim <= LARGEST_HEAD_DIM:
        raise ValueError(
            f"config.head_dim: expected an even size up to {LARGEST_HEAD_DIM}, got {dim}"
        )
    heads, kv_heads = int(config.num_attention_heads), int(config.num_key_value_heads)
    if heads % kv_heads:
        raise ValueError(
            f"config.num_key_value_heads: expected a divisor of {heads} heads, got {kv_heads}"
        )


def projection_sizes(config: Any) -> dict[str, tuple[int, int]]:
    """Return the inputs and outputs of the four projections, by name."""
    dim = head_dim(config)
    query, key = config.num_attention_heads * dim, config.num_key_value_heads * dim
    hidden = config.hidden_size
    outputs = {"q_proj": query, "k_proj": key, "v_proj": key}
    return {name: (hidden, n) for name, n in outputs.items()} | {"o_proj": (query, hidden)}


def new_projections(config: Any) -> dict[str, nn.Module]:
    """Return fresh projections as the configuration describes them."""
    # Qwen2 hard-codes its biases: q, k and v have one, o has none.
    qwen2 = getattr(config, "model_type", None) == "qwen2"
    bias = bool(getattr(config, "attention_bias", False))
    return {
        name: nn.Linear(*size, bias=bias and not qwen2 if name == "o_proj" else bias or qwen2)
        for name, size in projection_sizes(config).items()
    }


def check_source(attention: Any, own_rotary: bool = False) -> None:
    """Check that a loaded module computes what ``CrayonAttention`` would.

    A module is known by the class that wrote its forward: others look alike and rotate or scale in
    another way.

    Args:
        attention: The module.
        own_rotary: Whether it may have a rotary embedding, as before transformers 4.48.

    Raises:
        TypeError: if it is no module.
        ValueError: naming what it has that ``CrayonAttention`` lacks, or its class.
    """
    if not isinstance(attention, nn.Module):
        raise TypeError(f"attention: expected a module, got {type(attention).__name__}")
    kind = type(attention).__name__
    own = [n for n, _ in (*attention.named_children(), *attention.named_parameters(recurse=False))]
    known = (*ATTENTION_PROJECTIONS, "rotary_emb") if own_rotary else ATTENTION_PROJECTIONS
    extra = [name for name in own if name not in known]
    if extra:
        raise ValueError(
            f"attention.{extra[0]}: not supported, got a {kind} that has it (CrayonAttention has "
            "projections only: no norms of q and k, no sinks, no fused qkv_proj); "
            "add_crayon_to_linears serves any attention"
        )
    if not getattr(attention, "is_causal", True) or getattr(attention, "is_cross_attention", False):
        raise ValueError(
            f"attention: expected causal self-attention, got a {kind} that is bidirectional or "
            'cross attention; leave it, or run it with attn_implementation="crayon"'
        )
    if has_own_forward(attention):
        raise ValueError(
            f"attention: the {kind} has a forward of its own instance (a device map's hooks, or "
            "another patch), which would be lost; take it off first"
        )
    owner = next(base for base in type(attention).__mro__ if "forward" in vars(base))
    if own_rotary and "FlashAttention2" in owner.__name__:
        raise ValueError(
            f"attention: expected one of sdpa or eager, got {kind}, whose masks are not read; load "
            'the model with attn_implementation="sdpa": what runs here is crayon_attention'
        )
    if owner.__name__ not in (
        SOURCES + _OLDER if own_rotary else SOURCES
    ) or not owner.__module__.startswith("transformers."):
        wrote = f"{owner.__module__}.{owner.__qualname__}"
        found = kind if owner.__name__ == kind else f"a {kind} with the forward of {wrote}"
        raise ValueError(
            f"attention: expected transformers' {', '.join(SOURCES)}, got {found}; "
            "add_crayon_to_linears serves any attention, and without a crayon "
            'attn_implementation="crayon" does'
        )


def check_projections(projections: dict[str, Any], config: Any) -> None:
    """Check that there are four projections of the configuration's sizes.

    Raises:
        ValueError: naming the projection.
    """
    for name, (inputs, outputs) in projection_sizes(config).items():
        layer = projections.get(name)
        if not isinstance(layer, nn.Module):
            raise ValueError(
                f"projections[{name!r}]: expected a linear layer, got {type(layer).__name__}"
            )
        found = (
            getattr(layer, "in_features", inputs),
            getattr(layer, "out_features", outputs),
        )
        if found != (inputs, outputs):
            raise ValueError(
                f"projections[{name!r}]: expected {inputs} inputs and {outputs} outputs, as the "
                f"configuration has it, got {found[0]} and {found[1]}"
            )
