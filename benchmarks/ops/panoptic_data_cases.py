"""What the data path is measured on: PNG files of the maps of ``panoptic_lookup``."""

from __future__ import annotations

from collections.abc import Iterator

from benchmarks.registry import Row

OP, MODE = "panoptic_data", "images"
QUICK, FULL = "480x640/s15/b16", "960x1280/s60/b16"
NAMES = ("pillow-alone", "decoding-alone", "ours", "released-algorithm")


def rows(kind: str) -> Iterator[Row]:
    """Yield the providers of both cases, the same on any device: the path is the CPU's."""
    for case in (QUICK, FULL):
        for provider in NAMES:
            yield Row(OP, MODE, case, provider, quick=case == QUICK)
