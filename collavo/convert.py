"""The former place of ``collavo.conversion``; kept for those who import it."""

from collavo.conversion import (
    IMAGE_ADAPTER,
    convert_state_dict,
    resize_position_embedding,
    unpack_wqkv,
)

__all__ = ["IMAGE_ADAPTER", "convert_state_dict", "resize_position_embedding", "unpack_wqkv"]
