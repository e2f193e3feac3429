"""Attention with the crayon inside: a module that takes a model's own attention over."""

from __future__ import annotations

from collavo_kernels._requirements import OLDEST_WITH_SEAMS, require
from collavo_kernels._sdpa import sdpa_without_plans
from collavo_kernels.nn.attention.masks import (
    interval_range,
    is_prefill_mask,
    prefill_mask,
    read_prefill_mask,
)
from collavo_kernels.nn.attention.module import CrayonAttention
from collavo_kernels.nn.attention.projections import CrayonInputs
from collavo_kernels.nn.attention.source import ATTENTION_PROJECTIONS

__all__ = [
    "ATTENTION_PROJECTIONS",
    "CrayonAttention",
    "CrayonInputs",
    "interval_range",
    "is_prefill_mask",
    "prefill_mask",
    "read_prefill_mask",
    "register_attention",
    "sdpa_without_plans",
]


def register_attention() -> None:
    r"""Make ``attn_implementation="crayon"`` known to transformers.

    Every model that reads its attention from transformers' ``AttentionInterface`` and hands its
    mask on unchanged (LLaMA, Vicuna, Mistral, Qwen2, LLaVA and its CLIP tower, ...) can then run
    its prefills and its training on ``crayon_attention``:

    ``out_i = sum_j softmax_j(scale q_i . k_j) v_j``

    The interface comes after the rotary embedding and the cache update, so q and k arrive rotated
    and no crayon table takes part; ``CrayonAttention`` is the module that has one. What goes where
    is decided when the mask is made, once per forward pass:

    - An empty cache (or none) and a plain mask, causal, sliding or bidirectional: the operator.
      Padding left or right becomes its ``key_range`` and a sliding window its ``window``; no mask
      of S x S elements exists. Outputs at padding are zeros.
    - Everything else (decoding, a later chat turn, chunked prefill, assisted generation, packed or
      holed or ready-made masks, dropout, position biases, head dims that are odd or above 256,
      float64): transformers' SDPA function with transformers' mask. So does a padding mask under
      ``torch.compile``, whose values cannot be read, and, before transformers 5.14, which does not
      tell such a mask from others, the prefill of a static cache.

    Soft-capped scores, attention sinks and head masks raise a ``ValueError`` when they are used:
    transformers' SDPA function, which would serve them, lacks them too.

    A second call changes nothing, and nothing else of transformers is changed. Importing
    ``collavo``'s models calls it.

    Raises:
        ImportError: if transformers is not installed, or is older than 5.5.

    Source: transformers' ``AttentionInterface`` and ``AttentionMaskInterface``.

    Example:
        >>> import torch
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> register_attention()
        >>> config = LlamaConfig(hidden_size=32, intermediate_size=48, num_hidden_layers=1,
        ...     num_attention_heads=4, vocab_size=16, attn_implementation="crayon")
        >>> model = LlamaForCausalLM(config)
        >>> mask = torch.tensor([[0, 1, 1], [1, 1, 1]])
        >>> model(torch.tensor([[0, 1, 2], [3, 4, 5]]), attention_mask=mask).logits.shape
        torch.Size([2, 3, 16])
    """
    require("transformers", OLDEST_WITH_SEAMS, "register_attention")
    from collavo_kernels.nn.attention import transformers

    transformers.register()
