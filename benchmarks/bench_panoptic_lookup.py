"""panoptic_lookup beside the released algorithm, NumPy and torch.

In the modes ``majority`` and ``nearest`` one call follows the other; with ``-cold`` at the end
other work comes between, and other maps, as in a program that makes one such call per batch.
"""

from __future__ import annotations

from benchmarks.measure import Measure
from benchmarks.registry import Row


def bench_panoptic_lookup(measure: Measure, row: Row) -> None:
    measure(row)
