"""The calls whose speed is claimed, for looking at what they launch: values are anything."""

from __future__ import annotations

import torch

from collavo_kernels import LoRAAdapter, NF4Weight, crayon_attention, panoptic_lookup, qlora_linear
from collavo_kernels.ops.qlora_linear.nf4.format import packed_bytes, scale_bytes

_LOW = torch.bfloat16


def attend(tokens: int, kv_heads: int, *, backend: str = "triton", device: str = "cpu") -> None:
    """Attend forward and backward as a 7B LLaMA trains on one image: 32 heads of 128.

    Args:
        tokens: S.
        kv_heads: Key/value heads.
        backend: Who serves.
        device: Where the tensors are.
    """
    q, k, v, *tables = leaves = [
        torch.zeros(*size, heads, 128, dtype=_LOW, device=device).requires_grad_()
        for size in ((1, tokens), (12,))
        for heads in (32, kv_heads, kv_heads)
    ]
    angles = torch.zeros(1, tokens, 128, dtype=_LOW, device=device)
    row_index = torch.zeros(1, tokens, dtype=torch.int32, device=device)
    out = crayon_attention(
        q,
        k,
        v,
        cos=angles,
        sin=angles,
        crayon_q=tables[0],
        crayon_k=tables[1],
        crayon_v=tables[2],
        row_index=row_index,
        backend=backend,
    ).out
    torch.autograd.grad(out, leaves, torch.empty_like(out))


def multiply(
    tokens: int,
    size: tuple[int, int] = (4096, 4096),
    *,
    backward: bool = True,
    backend: str = "triton",
    device: str = "cpu",
) -> None:
    """Multiply by a 4-bit layer with two adapters of rank 64.

    Args:
        tokens: M.
        size: N and K.
        backward: Whether the gradients of x and of one adapter follow.
        backend: Who serves.
        device: Where the tensors are.
    """
    n, k = size
    packed = torch.zeros(packed_bytes(size), 1, dtype=torch.uint8, device=device)
    scales = torch.zeros(scale_bytes(size, 64, True), dtype=torch.uint8, device=device)
    weight = NF4Weight(packed, scales, size, 64, True, _LOW)
    adapters = [
        LoRAAdapter(
            torch.zeros(64, k, dtype=_LOW, device=device).requires_grad_(),
            torch.zeros(n, 64, dtype=_LOW, device=device).requires_grad_(),
            0.5,
        )
        for _ in range(2)
    ]
    x = torch.zeros(tokens, k, dtype=_LOW, device=device).requires_grad_()
    out = qlora_linear(x, weight, adapters, backend=backend)
    if backward:
        torch.autograd.grad(out, [x, *adapters[0][:2]], torch.empty_like(out))


def look_up(maps: int, *, backend: str = "triton", device: str = "cpu") -> None:
    """Look up maps of 480 x 640 with 15 segments each on a grid of 35 x 35.

    Args:
        maps: How many.
        backend: Who serves.
        device: Where the maps are.
    """
    given = torch.arange(480 * 640, dtype=torch.int32).view(480, 640) // 64 % 16
    ids = [torch.arange(1, 16, dtype=torch.int32)] * maps
    panoptic_lookup(given.expand(maps, -1, -1).to(device), ids, ids, grid=(35, 35), backend=backend)
