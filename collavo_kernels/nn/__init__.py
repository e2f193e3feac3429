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
from collavo_kernels.nn.crayon_linears import (
    QKV_PROJECTIONS,
    BoundLinearMixin,
    CrayonLinearMixin,
    add_crayon_to_linears,
    remove_crayon_from_linears,
)
from collavo_kernels.nn.crayon_prompt import CrayonPrompt, checked_crayon_index
from collavo_kernels.nn.foreign import (
    ImagePositions,
    crayon_context,
    find_image_positions,
    swap_linears,
)
from collavo_kernels.nn.linear import (
    MODULE_HOOKS,
    DualQLoRALinear,
    LoRAFactor,
    has_hooks,
    has_own_forward,
    load_peft_adapter,
    peft_lora_config,
    save_peft_adapter,
)
from collavo_kernels.nn.mixins import with_mixin

__all__ = [
    "ATTENTION_PROJECTIONS",
    "MODULE_HOOKS",
    "QKV_PROJECTIONS",
    "BoundLinearMixin",
    "CrayonAttention",
    "CrayonBranch",
    "CrayonInputs",
    "CrayonLinearMixin",
    "CrayonPrompt",
    "DualQLoRALinear",
    "ImagePositions",
    "LoRAFactor",
    "add_crayon_to_linears",
    "bound_crayon",
    "checked_crayon_index",
    "crayon_context",
    "current_crayon",
    "find_image_positions",
    "has_hooks",
    "has_own_forward",
    "interval_range",
    "is_prefill_mask",
    "load_peft_adapter",
    "peft_lora_config",
    "prefill_mask",
    "read_prefill_mask",
    "register_attention",
    "remove_crayon_from_linears",
    "save_peft_adapter",
    "sdpa_without_plans",
    "swap_linears",
    "with_mixin",
]
