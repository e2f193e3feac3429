"""The roof of this machine, measured in the same run as the numbers that are held against it."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch

READ_BYTES = {"cpu": 1 << 28, "cuda": 1 << 31}
MATRIX = {"cpu": 1536, "cuda": 8192}
PEAK_DTYPES = (torch.float32, torch.bfloat16)


@dataclass(frozen=True)
class Roof:
    """What the device can do at best, as plain PyTorch reaches it.

    Attributes:
        bandwidth: Bytes per second of reading (or copying) a buffer larger than any cache.
        peak: Floating-point operations per second of a large square matmul, by dtype name.
        threads: Threads that PyTorch used.
    """

    bandwidth: float
    peak: dict[str, float] = field(default_factory=dict)
    threads: int = 1

    def seconds(self, bytes_moved: float, flops: float, dtype: str) -> float:
        """Least time for this much work: ``max(bytes / bandwidth, flops / peak(dtype))``.

        float16 is held against bfloat16's peak; other dtypes against float32's.
        """
        key = {"float16": "bfloat16"}.get(dtype, dtype)
        peak = self.peak.get(key) or self.peak.get("float32") or 0.0
        compute = flops / peak if peak else 0.0
        return max(bytes_moved / self.bandwidth if self.bandwidth else 0.0, compute)

    def __str__(self) -> str:
        peaks = ", ".join(f"{name} {value / 1e9:,.0f} GFLOP/s" for name, value in self.peak.items())
        return f"read {self.bandwidth / 1e9:,.1f} GB/s; matmul {peaks}; {self.threads} threads"


def _best_seconds(work: Callable[[], object], device: torch.device, repeats: int = 7) -> float:
    best = float("inf")
    for _ in range(repeats + 1):
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        start = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best = min(best, time.perf_counter() - start)
    return best


def _measure_bandwidth(size: int, device: torch.device) -> float:
    source = torch.ones(size // 4, dtype=torch.int32, device=device)
    reading = size / _best_seconds(source.amax, device)
    target = torch.empty_like(source)
    copying = 2 * size / _best_seconds(lambda: target.copy_(source), device)
    return max(reading, copying)


def measure_roof(device: torch.device) -> Roof:
    """Measure read bandwidth and matmul peaks; a few seconds on a CPU."""
    kind = device.type if device.type in READ_BYTES else "cpu"
    bandwidth = _measure_bandwidth(READ_BYTES[kind], device)
    peak: dict[str, float] = {}
    n = MATRIX[kind]
    for dtype in PEAK_DTYPES:
        matrix = torch.randn(n, n, device=device).to(dtype)
        seconds = _best_seconds(lambda m=matrix: m @ m, device)
        peak[str(dtype).removeprefix("torch.")] = 2 * n**3 / seconds
    return Roof(bandwidth, peak, torch.get_num_threads())
