"""Fast, exact kernels for vision-language models that see objects."""

from collavo_kernels._flags import check
from collavo_kernels.ops.crayon_attention import CrayonAttentionOutput, crayon_attention

__version__ = "0.1.0"

__all__ = ["CrayonAttentionOutput", "__version__", "check", "crayon_attention"]
