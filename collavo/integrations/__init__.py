"""CoLLaVO inside models of other packages."""

from collavo.integrations.llava import LlavaHandle, apply_to_llava

__all__ = ["LlavaHandle", "apply_to_llava"]
