"""A whole model: prefill, decoding and a training step, beside stock LLaVA with PEFT."""

from __future__ import annotations

from benchmarks.measure import Measure
from benchmarks.registry import Row


def bench_end_to_end(measure: Measure, row: Row) -> None:
    measure(row)
