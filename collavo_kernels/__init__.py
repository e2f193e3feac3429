"""Fast, exact kernels for vision-language models that see objects."""

from collavo_kernels import _console as _console  # first: before torch
from collavo_kernels._flags import check
from collavo_kernels.ops.crayon_attention import CrayonAttentionOutput, crayon_attention
from collavo_kernels.ops.panoptic_lookup import CrayonMap, decode_colours, panoptic_lookup
from collavo_kernels.ops.panoptic_lookup.validation import MAX_SIDE as MAX_MAP_SIDE
from collavo_kernels.ops.qlora_linear import (
    LoRAAdapter,
    NF4Weight,
    qlora_linear,
    quantize_nf4,
)

__version__ = "0.1.0"

__all__ = [
    "MAX_MAP_SIDE",
    "CrayonAttentionOutput",
    "CrayonMap",
    "LoRAAdapter",
    "NF4Weight",
    "__version__",
    "check",
    "crayon_attention",
    "decode_colours",
    "panoptic_lookup",
    "qlora_linear",
    "quantize_nf4",
]
