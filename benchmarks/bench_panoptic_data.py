"""From COCO's PNGs to crayon rows and words: images per second of the whole data path.

Ours over ``decoding-alone`` is what everything else costs.
"""

from __future__ import annotations

from benchmarks.measure import Measure
from benchmarks.registry import Row


def bench_panoptic_data(measure: Measure, row: Row) -> None:
    measure(row)
