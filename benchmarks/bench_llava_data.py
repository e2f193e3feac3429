"""What a training step's data cost before any tensor reaches the model: text, and an image.

Both run on one thread in a worker: conversations to token ids and labels, a JPEG to pixels.
"""

from __future__ import annotations

from benchmarks.measure import Measure
from benchmarks.registry import Row


def bench_llava_data(measure: Measure, row: Row) -> None:
    measure(row)
