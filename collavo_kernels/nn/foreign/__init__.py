"""The crayon and the linear layers for models whose code is somebody else's."""

from __future__ import annotations

from collavo_kernels.nn.foreign.context import crayon_context
from collavo_kernels.nn.foreign.linears import swap_linears
from collavo_kernels.nn.foreign.positions import ImagePositions, find_image_positions

__all__ = ["ImagePositions", "crayon_context", "find_image_positions", "swap_linears"]
