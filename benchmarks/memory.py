"""The largest cache of a device, copies that rotate past it, and the peak memory of a call."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

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


def peak_megabytes(fn: Callable[[], object], device: torch.device) -> float:
    """Return what a call allocates from torch at its peak, beyond what it found, in 1e6 bytes.

    It calls ``fn`` once. On a CPU it replays the profiler's allocations; memory that a library
    takes from the system behind torch's back is not seen.
    """
    if device.type != "cuda":
        return _peak_of_profile(fn) / 1e6
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    fn()
    torch.cuda.synchronize(device)
    return (torch.cuda.max_memory_allocated(device) - before) / 1e6


def _peak_of_profile(fn: Callable[[], object]) -> int:
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        result = fn()
    del result
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(path))
        events = json.loads(path.read_text())["traceEvents"]
    allocations = [event for event in events if event.get("name") == "[memory]"]
    held = peak = 0
    for event in sorted(allocations, key=lambda event: float(event["ts"])):
        if event["args"]["Device Type"] == 0:
            held += int(event["args"]["Bytes"])
            peak = max(peak, held)
    return peak
