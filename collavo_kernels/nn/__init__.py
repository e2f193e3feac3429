"""Modules that are dropped into LLaVA-family models."""

from collavo_kernels.nn.crayon_prompt import CrayonPrompt

__all__ = ["CrayonPrompt"]
