"""A step of each of LLaVA's stages, beside transformers with PEFT and bitsandbytes."""

from __future__ import annotations

from benchmarks.measure import Measure
from benchmarks.registry import Row


def bench_llava_training(measure: Measure, row: Row) -> None:
    measure(row)
