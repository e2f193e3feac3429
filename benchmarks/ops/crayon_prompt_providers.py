"""Who computes the crayon's vectors: one per row of the table, or one per token."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks.ops.crayon_prompt_cases import MAPS
from benchmarks.ops.panoptic_lookup_cases import Batch
from benchmarks.registry import Call, Row
from collavo_kernels import CrayonMap, panoptic_lookup
from collavo_kernels.nn import CrayonPrompt


def per_row(module: CrayonPrompt, crayon: CrayonMap) -> Callable[[], Tensor]:
    return lambda: module(crayon)


def per_token(module: CrayonPrompt, crayon: CrayonMap) -> Callable[[], Tensor]:
    index = crayon.row_index.long()
    return lambda: module.project(crayon.row_class[index], crayon.row_number[index])


PROVIDERS: dict[str, Callable[[CrayonPrompt, CrayonMap], Callable[[], Tensor]]] = {
    "ours": per_row,
    "per-token": per_token,
}


def prepare(row: Row, device: torch.device) -> Call:
    """Return forward and backward of the row; the hidden size is four times the width."""
    batch, width = Batch(MAPS), int(row.case[1:])
    maps = batch.maps.to(device)
    crayon = panoptic_lookup(maps, batch.ids, batch.classes, grid=batch.grid)
    module = CrayonPrompt(embed_dim=width, hidden_size=4 * width, zero_init=False).to(device)
    forward = PROVIDERS[row.provider](module, crayon)

    def both() -> None:
        module.zero_grad(set_to_none=True)
        forward().sum().backward()

    return Call(
        both,
        # The work there is: forward, weight gradient and input gradient of both layers, per row.
        flops=2 * 3 * crayon.num_rows * (4 * width * width + 16 * width * width),
        config={
            "rows": crayon.num_rows,
            "tokens": crayon.row_index.numel(),
            "embed_dim": width,
            "hidden_size": 4 * width,
        },
    )
