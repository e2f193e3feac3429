"""Modules that are dropped into LLaVA-family models."""

from collavo_kernels.nn.attention import (
    ATTENTION_PROJECTIONS,
    CrayonAttention,
    CrayonInputs,
    interval_range,
    is_prefill_mask,
    prefill_mask,
    read_prefill_mask,
    register_attention,
    sdpa_without_plans,
)
from collavo_kernels.nn.bound import bound_crayon, current_crayon
from collavo_kernels.nn.crayon_branch import CrayonBranch
from collavo_kernels.nn.crayon_prompt import CrayonPrompt, checked_crayon_index
from collavo_kernels.nn.linear import (
    DualQLoRALinear,
    LoRAFactor,
    has_own_forward,
    load_peft_adapter,
    save_peft_adapter,
)

__all__ = [
    "ATTENTION_PROJECTIONS",
    "CrayonAttention",
    "CrayonBranch",
    "CrayonInputs",
    "CrayonPrompt",
    "DualQLoRALinear",
    "LoRAFactor",
    "bound_crayon",
    "checked_crayon_index",
    "current_crayon",
    "has_own_forward",
    "interval_range",
    "is_prefill_mask",
    "load_peft_adapter",
    "prefill_mask",
    "read_prefill_mask",
    "register_attention",
    "save_peft_adapter",
    "sdpa_without_plans",
]
