"""The former place of ``collavo.model.convert``; kept for those who import it."""

from collavo.model.convert import (
    IMAGE_ADAPTER,
    convert_state_dict,
    resize_position_embedding,
    unpack_wqkv,
)

__all__ = ["IMAGE_ADAPTER", "convert_state_dict", "resize_position_embedding", "unpack_wqkv"]
