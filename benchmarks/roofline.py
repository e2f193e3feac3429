"""The roof of this machine, measured in the same run as the numbers that are held against it."""

from __future__ import annotations

import mmap
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

READ_BYTES = {"cpu": 1 << 28, "cuda": 1 << 31}
MATRICES = {"cpu": (512, 1024, 2048), "cuda": (4096, 8192)}
PEAK_DTYPES = (torch.float32, torch.bfloat16)
_HUGE_PAGE = 1 << 21
_LIMIT = 2.0


@dataclass(frozen=True)
class Roof:
    """What the device can do at best, as plain PyTorch reaches it.

    Attributes:
        bandwidth: Bytes per second of reading (or copying) a buffer larger than any cache.
        peak: Floating-point operations per second of the best of a few square matmuls, by dtype
            name; a low-precision dtype has at least float32's, which can always compute it.
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
    end = time.perf_counter() + _LIMIT  # a dtype that the processor lacks can be very slow
    for _ in range(repeats + 1):
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        start = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        now = time.perf_counter()
        best = min(best, now - start)
        if now > end:
            break
    return best


def _buffer(size: int, device: torch.device) -> Tensor:
    """Return int8 ones; on a CPU on huge pages, where page walks do not slow a reader down."""
    if device.type != "cpu" or not hasattr(mmap, "MADV_HUGEPAGE"):
        return torch.ones(size, dtype=torch.int8, device=device)
    room = mmap.mmap(-1, size + _HUGE_PAGE)
    room.madvise(mmap.MADV_HUGEPAGE)
    whole = torch.frombuffer(room, dtype=torch.int8)
    start = -whole.data_ptr() % _HUGE_PAGE
    return whole[start : start + size].fill_(1)


def _measure_bandwidth(size: int, device: torch.device) -> float:
    source = _buffer(size, device)
    # Which of these streams best depends on torch's version and on the instruction set.
    views = [source.view(dtype) for dtype in (torch.int32, torch.int64, torch.float64)]
    readers = [view.amax for view in views] + [view.sum for view in views[1:]]
    reading = size / min(_best_seconds(reader, device) for reader in readers)
    target = torch.empty_like(views[0])
    copying = 2 * size / _best_seconds(lambda: target.copy_(views[0]), device)
    return max(reading, copying)


def _measure_peak(dtype: torch.dtype, device: torch.device, sizes: tuple[int, ...]) -> float:
    rates = []
    for n in sizes:
        a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
        repeats = 7 if n == sizes[-1] else 20  # the small ones take little and vary more
        seconds = _best_seconds(lambda a=a, b=b: a @ b, device, repeats)
        rates.append(2 * n**3 / seconds)
        if 8 * seconds > _LIMIT:
            break
    return max(rates)


def measure_roof(device: torch.device) -> Roof:
    """Measure read bandwidth and matmul peaks; a few seconds on a CPU."""
    kind = device.type if device.type in READ_BYTES else "cpu"
    bandwidth = _measure_bandwidth(READ_BYTES[kind], device)
    peak: dict[str, float] = {}
    for dtype in PEAK_DTYPES:
        measured = _measure_peak(dtype, device, MATRICES[kind])
        peak[str(dtype).removeprefix("torch.")] = max(measured, *peak.values(), 0.0)
    return Roof(bandwidth, peak, torch.get_num_threads())
