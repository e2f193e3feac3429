"""The official CoLLaVO's names, InternLM2 with PLoRA, beside this package's; for both ways."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

IMAGE_ADAPTER = "plora"
VISION = "vit.vision_tower.vision_model."
OWN_VISION = "model.vision_tower."
QKV = ("q_proj", "k_proj", "v_proj")


class Linear(NamedTuple):
    """A linear layer with one counterpart.

    Attributes:
        official: Its official name within a layer.
        own: Its name here.
        branch: Where its crayon branch lives here; None where the official model never uses it.
    """

    official: str
    own: str
    branch: str | None


LINEARS = (
    Linear("attention.wo", "self_attn.o_proj", "self_attn.crayon_o"),
    Linear("feed_forward.w1", "mlp.gate_proj", "mlp.crayon_gate"),
    Linear("feed_forward.w3", "mlp.up_proj", "mlp.crayon_up"),
    Linear("feed_forward.w2", "mlp.down_proj", None),
)
NORMS = {
    "attention_norm.weight": "input_layernorm.weight",
    "ffn_norm.weight": "post_attention_layernorm.weight",
}
EMBEDDING = "model.tok_embeddings.weight"
OWN_EMBEDDING = "model.language_model.embed_tokens.weight"
OUTER = {
    "model.norm.weight": "model.language_model.norm.weight",
    "output.weight": "lm_head.weight",
    **{
        f"vision_proj.{index}.{part}": f"model.multi_modal_projector.{linear}.{part}"
        for index, linear in ((0, "linear_1"), (2, "linear_2"))
        for part in ("weight", "bias")
    },
}
PROMPT = {
    "seg_prompt_embed.weight": "model.crayon_prompt.class_embedding.weight",
    "seg_num_embed.weight": "model.crayon_prompt.number_embedding.weight",
    **{
        f"vision_proj_for_seg.{index}.{part}": f"model.crayon_prompt.mlp.{index}.{part}"
        for index in (0, 2)
        for part in ("weight", "bias")
    },
}


def unpack_wqkv(packed: Tensor, heads: int, kv_heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """Take InternLM2's packed rows apart: per key head its query heads, the key, the value.

    Args:
        packed: ``[(H + 2 G) D, ...]``, any dtype.
        heads: H.
        kv_heads: G.

    Returns:
        The rows of q ``[H D, ...]``, k ``[G D, ...]`` and v ``[G D, ...]``.

    Example:
        >>> import torch
        >>> [x.tolist() for x in unpack_wqkv(torch.arange(8), heads=4, kv_heads=2)]
        [[0, 1, 4, 5], [2, 6], [3, 7]]
    """
    share = heads // kv_heads
    blocks = packed.reshape(kv_heads, share + 2, -1, *packed.shape[1:])
    q, k, v = blocks[:, :share], blocks[:, share : share + 1], blocks[:, share + 1 :]
    flat = [x.reshape(-1, *packed.shape[1:]).contiguous() for x in (q, k, v)]
    return flat[0], flat[1], flat[2]


def pack_wqkv(q: Tensor, k: Tensor, v: Tensor, heads: int, kv_heads: int) -> Tensor:
    """Pack rows as InternLM2 has them, the inverse of :func:`unpack_wqkv`.

    Args:
        q: ``[H D, ...]``.
        k: ``[G D, ...]``.
        v: ``[G D, ...]``.
        heads: H.
        kv_heads: G.

    Returns:
        ``[(H + 2 G) D, ...]``.

    Example:
        >>> import torch
        >>> pack_wqkv(torch.tensor([0, 1, 4, 5]), torch.tensor([2, 6]), torch.tensor([3, 7]), 4, 2)
        tensor([0, 1, 2, 3, 4, 5, 6, 7])
    """
    rest, dim = q.shape[1:], q.shape[0] // heads
    blocks = [x.reshape(kv_heads, -1, dim, *rest) for x in (q, k, v)]
    return torch.cat(blocks, dim=1).reshape(-1, *rest)


def resize_position_embedding(table: Tensor, grid: int) -> Tensor:
    """Resize CLIP's position table to another grid, as the official code does.

    Patches are interpolated bicubically (``align_corners=False``) and rounded to float16, as in the
    released model; the class token's row is kept.

    Args:
        table: ``[1 + g g, hidden]``.
        grid: The new grid's side.

    Returns:
        ``[1 + grid grid, hidden]``, table's dtype.

    Raises:
        ValueError: if the table is not that of a square grid.

    Example:
        >>> import torch
        >>> resize_position_embedding(torch.randn(1 + 24 * 24, 8), 35).shape
        torch.Size([1226, 8])
    """
    side = square_side(table.shape[0])
    patches = table[1:].reshape(side, side, -1).permute(2, 0, 1)[None].float()
    resized = torch.nn.functional.interpolate(
        patches, size=(grid, grid), mode="bicubic", align_corners=False
    )
    flat = resized[0].flatten(1).T.half().to(table.dtype)
    return torch.cat([table[:1], flat])


def square_side(rows: int, name: str = "table") -> int:
    """Return the side of the square grid that a position table is for.

    Args:
        rows: Of the table, the class token's included.
        name: Of the table, for messages.

    Raises:
        ValueError: if it is not that of a square grid.
    """
    side = math.isqrt(max(rows - 1, 0))
    if side * side != rows - 1:
        raise ValueError(f"{name}: expected 1 + g * g rows, got {rows}")
    return side
