"""What ``CrayonPrompt`` is measured on: the rows of 16 images of 35 x 35 tokens, by its width."""

from __future__ import annotations

from collections.abc import Iterator

from benchmarks.registry import Row

OP, MODE = "crayon_prompt", "fwd+bwd"
MAPS = "480x640/s15/b16"
QUICK, FULL = "d128", "d1024"
NAMES = ("ours", "per-token")


def rows(kind: str) -> Iterator[Row]:
    """Yield both ways of both widths."""
    for case in (QUICK, FULL):
        for provider in NAMES:
            yield Row(OP, MODE, case, provider, quick=case == QUICK)
