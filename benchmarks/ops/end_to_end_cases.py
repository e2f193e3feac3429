"""What a whole model is measured on: its sizes, a batch, and what is done with it.

``prefill`` is the prompt without gradients, ``decode`` the next token from the cache that a prefill
has left, ``train`` forward, backward and AdamW's step.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.registry import Row

OP = "end_to_end"
VOCABULARY, IMAGE_TOKEN, ROWS = 512, 511, 12


@dataclass(frozen=True)
class Case:
    """Sizes of a model and a batch; an ``intermediate`` of 0 is 11/4 of ``hidden``."""

    hidden: int
    layers: int
    grid: int
    text: int
    batch: int
    rank: int
    head_dim: int = 64
    intermediate: int = 0

    def __str__(self) -> str:
        return f"h{self.hidden}-l{self.layers}-b{self.batch}-image{self.grid**2}-text{self.text}"


SMALL = Case(hidden=256, layers=2, grid=8, text=32, batch=2, rank=16)
# Two layers of LLaMA-7B, an image of CLIP's at 336 pixels and a short question.
LLAMA = Case(4096, 2, 24, 40, 1, 64, head_dim=128, intermediate=11008)
FULL = (Case(1024, 4, 24, 64, 2, 64), Case(2048, 4, 35, 64, 2, 64))
CASES = {str(case): case for case in (SMALL, LLAMA, *FULL)}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
NAMES = ("ours", "transformers+peft+bitsandbytes")
MODES = ("train", "prefill", "decode")


def rows(kind: str) -> Iterator[Row]:
    """Put together what shares a pair of models; nobody trains a 7B in float32 here."""
    for (name, case), dtype in itertools.product(CASES.items(), DTYPES):
        if case == LLAMA and dtype == "float32":
            continue
        for mode, provider in itertools.product(MODES, NAMES):
            chosen = {"quick": case not in FULL, "quick_gpu": case == LLAMA}
            yield Row(OP, mode, name, provider, dtype=dtype, **chosen)


def batch(case: Case, device: torch.device, dtype: torch.dtype) -> dict[str, Tensor]:
    """Draw a batch: an image in front of the text, a dozen segments."""
    cells = case.grid**2
    tokens = torch.randint(1, IMAGE_TOKEN, (case.batch, cells + case.text))
    tokens[:, :cells] = IMAGE_TOKEN
    labels = tokens.clone()
    labels[:, : cells + case.text // 2] = -100
    shape = (case.batch, ROWS)
    inputs = {
        "input_ids": tokens,
        "labels": labels,
        "pixel_values": torch.randn(case.batch, 3, 4 * case.grid, 4 * case.grid).to(dtype),
        "crayon_index": torch.randint(0, ROWS, (case.batch, cells), dtype=torch.int32),
        "crayon_class": torch.randint(0, 134, shape, dtype=torch.int32),
        "crayon_number": torch.randint(0, 21, shape, dtype=torch.int32),
    }
    return {name: value.to(device) for name, value in inputs.items()}
