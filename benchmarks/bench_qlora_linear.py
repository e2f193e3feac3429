"""qlora_linear beside bitsandbytes' base, PEFT on it, a dense layer, and what one writes by hand.

The work is the whole operator with two adapters. ``bitsandbytes``, ``dense`` and ``ours:int8`` do
the base alone, and are held against the work of that. Weights rotate past the last-level cache.
``fwd`` is inference, ``fwd-grad`` a forward with gradients on, ``fwd+bwd`` a training step.
"""

from __future__ import annotations

from benchmarks.measure import Measure
from benchmarks.registry import Row


def bench_qlora_linear(measure: Measure, row: Row) -> None:
    measure(row)
