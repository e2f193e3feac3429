"""What LLaVA's stages are measured on: layers of a 7B, an image of 576 tokens, 120 tokens of text.

``align`` trains the projector, ``instruct`` the projector and LoRA adapters of rank 128 on every
linear layer of the decoder: forward, backward and AdamW's step, weights in bfloat16 or 4 bits, what
is trained in float32, under bfloat16 autocast.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.registry import Row

OP = "llava_training"
ROWS = 16
RANK, ALPHA = 128, 256.0
MODES = ("align", "instruct")
QLORA, LORA = "transformers+peft+bitsandbytes", "transformers+peft"
CRAYON = "ours:crayon"
NAMES = {"align": ("ours", QLORA, LORA), "instruct": ("ours", CRAYON, QLORA, LORA)}


@dataclass(frozen=True)
class Case:
    """Sizes of a decoder, of the vision features that it is given, and of a batch."""

    hidden: int
    intermediate: int
    layers: int
    grid: int
    text: int
    batch: int
    vision: int
    head_dim: int = 128
    vocabulary: int = 512

    def __str__(self) -> str:
        return f"h{self.hidden}-l{self.layers}-b{self.batch}-image{self.grid**2}-text{self.text}"

    @property
    def tokens(self) -> int:
        """How many tokens a step has."""
        return self.batch * (self.grid**2 + self.text)


SMALL = Case(512, 1408, 2, 8, 32, 1, 128)
TWO = Case(4096, 11008, 2, 24, 120, 1, 1024)
SEVEN_B = Case(4096, 11008, 32, 24, 120, 4, 1024, vocabulary=32000)
CASES = {str(case): case for case in (SMALL, TWO, SEVEN_B)}


def rows(kind: str) -> Iterator[Row]:
    """Yield both stages, of 7B layers in minutes; all 32 of them on a GPU alone."""
    for case in (SMALL, TWO) if kind == "cpu" else (SMALL, TWO, SEVEN_B):
        for mode in MODES:
            for provider in NAMES[mode]:
                gpu = case == SEVEN_B
                chosen = {"quick": case == SMALL, "quick_gpu": gpu}
                yield Row(OP, mode, str(case), provider, dtype="bfloat16", **chosen)


def batch(case: Case, device: torch.device) -> dict[str, Tensor]:
    """Draw a batch: an image in front of the text, the second half of which is the answer."""
    cells = case.grid**2
    image = case.vocabulary - 1
    tokens = torch.randint(1, image, (case.batch, cells + case.text))
    tokens[:, :cells] = image
    labels = tokens.clone()
    labels[:, : cells + case.text // 2] = -100
    pixels = torch.randn(case.batch, 3, 4 * case.grid, 4 * case.grid)
    inputs = {
        "input_ids": tokens,
        "labels": labels,
        "attention_mask": torch.ones_like(tokens),
        "pixel_values": pixels.to(torch.bfloat16),
    }
    return {name: value.to(device) for name, value in inputs.items()}


def crayon(case: Case, device: torch.device) -> dict[str, Tensor]:
    """Draw the crayon's inputs: sixteen segments to an image."""
    shape = (case.batch, ROWS)
    inputs = {
        "crayon_index": torch.randint(0, ROWS, (case.batch, case.grid**2), dtype=torch.int32),
        "crayon_class": torch.randint(0, 134, shape, dtype=torch.int32),
        "crayon_number": torch.randint(0, 21, shape, dtype=torch.int32),
    }
    return {name: value.to(device) for name, value in inputs.items()}
