"""Linear layers with a frozen 4-bit base and several adapters."""

from collavo_kernels.nn.linear.module import DualQLoRALinear, LoRAFactor
from collavo_kernels.nn.linear.peft import load_peft_adapter, save_peft_adapter

__all__ = ["DualQLoRALinear", "LoRAFactor", "load_peft_adapter", "save_peft_adapter"]
