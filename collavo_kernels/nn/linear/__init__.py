"""Linear layers with a frozen 4-bit base and several adapters."""

from collavo_kernels.nn.linear.module import DualQLoRALinear
from collavo_kernels.nn.linear.offload import MODULE_HOOKS, has_hooks, has_own_forward
from collavo_kernels.nn.linear.peft import load_peft_adapter, save_peft_adapter
from collavo_kernels.nn.linear.peft_targets import peft_lora_config
from collavo_kernels.nn.linear.slots import LoRAFactor

__all__ = [
    "MODULE_HOOKS",
    "DualQLoRALinear",
    "LoRAFactor",
    "has_hooks",
    "has_own_forward",
    "load_peft_adapter",
    "peft_lora_config",
    "save_peft_adapter",
]
