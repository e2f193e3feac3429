"""The 4-bit weight: its format, its packing for CPUs, quantisation, bitsandbytes' bytes."""

from collavo_kernels.ops.qlora_linear.nf4.format import NF4_CODE
from collavo_kernels.ops.qlora_linear.nf4.quantize import quantize_nf4
from collavo_kernels.ops.qlora_linear.nf4.weight import NF4Weight

__all__ = ["NF4_CODE", "NF4Weight", "quantize_nf4"]
