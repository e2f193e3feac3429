"""What orders of training are measured on: conversations of which 60 % have an image.

Lengths are drawn as those of LLaVA-1.5's mixture spread: an image's 576 tokens and some 180 of text
beside it, some 400 where there is no image, up to 2048 in all.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from benchmarks.ops.llava_training_cases import Case
from benchmarks.registry import Row

OP, MODE = "llava_order", "instruct"
NAMES = ("ours:grouped", "ours:random")
MOST = 2048
# Samples of a micro-batch, and micro-batches of a step.
SAMPLES, MICRO_BATCHES = 4, 2


@dataclass(frozen=True)
class Mix:
    """Samples with and without an image, and the model that they train."""

    images: int
    texts: int
    model: Case

    def __str__(self) -> str:
        whole = self.images + self.texts
        return f"h{self.model.hidden}-l{self.model.layers}-n{whole}-image{self.images}"

    def lengths(self) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
        """Return the tokens of each sample, those with an image first."""
        rng = np.random.default_rng(0)
        image = self.model.grid**2 + np.exp(rng.normal(5.2, 0.6, self.images))
        text = np.exp(rng.normal(6.0, 0.8, self.texts))
        return np.concatenate([image, text]).clip(16, MOST).astype(np.int64)


SMALL = Mix(29, 19, Case(512, 1408, 2, 24, 0, SAMPLES, 64, head_dim=64))
WIDE = Mix(154, 102, Case(4096, 11008, 4, 24, 0, SAMPLES, 1024))
MIXES = {str(mix): mix for mix in (SMALL, WIDE)}


def rows(kind: str) -> Iterator[Row]:
    """Yield both orders; layers of a 7B on a GPU alone."""
    mix = SMALL if kind == "cpu" else WIDE
    for provider in NAMES:
        chosen = {"quick": provider == NAMES[0], "quick_gpu": True}
        yield Row(OP, MODE, str(mix), provider, dtype="bfloat16", **chosen)
