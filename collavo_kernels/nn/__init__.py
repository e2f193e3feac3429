"""Modules that are dropped into LLaVA-family models."""

from collavo_kernels.nn.attention.inputs import CrayonInputs
from collavo_kernels.nn.attention.interface import register_attention
from collavo_kernels.nn.attention.module import CrayonAttention
from collavo_kernels.nn.crayon_branch import CrayonBranch
from collavo_kernels.nn.crayon_prompt import CrayonPrompt
from collavo_kernels.nn.linear.module import DualQLoRALinear
from collavo_kernels.nn.linear.peft import load_peft_adapter, save_peft_adapter

__all__ = [
    "CrayonAttention",
    "CrayonBranch",
    "CrayonInputs",
    "CrayonPrompt",
    "DualQLoRALinear",
    "load_peft_adapter",
    "register_attention",
    "save_peft_adapter",
]
