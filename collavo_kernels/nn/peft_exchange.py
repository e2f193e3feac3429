"""The former place of ``collavo_kernels.nn.linear.peft``; kept for those who import it."""

from collavo_kernels.nn.linear.peft import load_peft_adapter, save_peft_adapter

__all__ = ["load_peft_adapter", "save_peft_adapter"]
