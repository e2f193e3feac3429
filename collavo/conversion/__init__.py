"""Model folders of other layouts become folders of this package, and back."""

from collavo.conversion.build import build_llava
from collavo.conversion.folders import convert_folder
from collavo.conversion.kinds import Options
from collavo.conversion.official import convert_state_dict
from collavo.conversion.official_layout import (
    IMAGE_ADAPTER,
    resize_position_embedding,
    unpack_wqkv,
)
from collavo.conversion.target import Conversion

__all__ = [
    "IMAGE_ADAPTER",
    "Conversion",
    "Options",
    "build_llava",
    "convert_folder",
    "convert_state_dict",
    "resize_position_embedding",
    "unpack_wqkv",
]
