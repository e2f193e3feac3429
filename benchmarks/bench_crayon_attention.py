"""crayon_attention beside what it replaces, and beside attention that has neither crayon nor RoPE.

``fwd-cold`` is the forward with other work between the calls. GB/s, GFLOP/s and roof are of the
operator's work: every input read and every output written once, the products of the causal half.
On a GPU the calls rotate over copies of the inputs that fill its cache twice.
"""

from __future__ import annotations

from benchmarks.measure import Measure
from benchmarks.registry import Row


def bench_crayon_attention(measure: Measure, row: Row) -> None:
    measure(row)
