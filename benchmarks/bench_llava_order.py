"""An epoch over images and text in two orders: steps of one kind and alike lengths, and any."""

from __future__ import annotations

from benchmarks.measure import Measure
from benchmarks.registry import Row


def bench_llava_order(measure: Measure, row: Row) -> None:
    measure(row)
