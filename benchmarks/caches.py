"""The largest cache of a device, copies that rotate past it, and work that fills it.

A benchmark that repeats one call finds the interpreter's, torch's and the kernel's code in the
nearest caches. A program that calls an operator once per batch does not, and where a call takes a
fraction of a millisecond that is most of its time. ``OtherWork`` runs before each timed call,
outside of the time: a matrix product, then a read of twice the last-level cache. What the call
reads should rotate over copies as well (``copies_past_cache``). Such rows have a mode that ends
with ``-cold``. They are for CPUs: a GPU's calls follow each other in a graph, over copies.
"""

from __future__ import annotations

import os
from pathlib import Path

import torch

COLD = "-cold"
SIDE = 384
CPUS = Path("/sys/devices/system/cpu")
# Where the system does not say: larger than most.
UNKNOWN_CACHE = 64 << 20
_UNITS = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}


def last_level_cache(device: torch.device, cpus: Path = CPUS) -> int:
    """Return the bytes of the device's last-level cache, all instances that this process reaches.

    Example:
        >>> import torch
        >>> last_level_cache(torch.device("cpu")) > 0
        True
    """
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).L2_cache_size)
    instances: dict[str, int] = {}
    for cpu in sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else [0]:
        caches = [_cache(folder) for folder in cpus.glob(f"cpu{cpu}/cache/index*")]
        if caches:
            _, shared, size = max(caches)
            instances[shared] = size
    return sum(instances.values()) or UNKNOWN_CACHE


def _cache(folder: Path) -> tuple[int, str, int]:
    level, shared, size = (
        (folder / name).read_text().strip() for name in ("level", "shared_cpu_list", "size")
    )
    number = int(size[:-1]) * _UNITS[size[-1]] if size[-1] in _UNITS else int(size)
    return int(level), shared, number


def copies_past_cache(size: int, device: torch.device) -> int:
    """Return how many copies of ``size`` bytes rotate through twice the cache, at least two."""
    return max(2, -(-2 * last_level_cache(device) // max(size, 1)))


class OtherWork:
    """Leaves the caches full of something else.

    Example:
        >>> import torch
        >>> OtherWork()()
    """

    def __init__(self) -> None:
        """Make the buffer and the matrix."""
        size = 2 * last_level_cache(torch.device("cpu"))
        self.buffer = torch.ones(size // 4, dtype=torch.int32)
        self.matrix = torch.ones(SIDE, SIDE)

    def __call__(self) -> None:
        """Do the work; nothing is returned, so that a timer's ``setup`` can be this."""
        torch.mm(self.matrix, self.matrix)
        # Last, so that it is what the caches hold. The amax streams, a sum of int32 would widen.
        self.buffer.amax()
