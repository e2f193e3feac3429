"""CrayonPrompt per row of the table, beside one vector per token; forward and backward."""

from __future__ import annotations

from benchmarks.measure import Measure
from benchmarks.registry import Row


def bench_crayon_prompt(measure: Measure, row: Row) -> None:
    measure(row)
