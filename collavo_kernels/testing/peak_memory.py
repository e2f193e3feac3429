"""The most memory that a call holds at once."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile


def peak_megabytes(fn: Callable[[], object], device: torch.device) -> float:
    """Return what a call allocates from torch at its peak, beyond what it found, in 1e6 bytes.

    It calls ``fn`` once. On a CPU it replays the profiler's allocations; memory that a library
    takes from the system behind torch's back is not seen.

    Args:
        fn: The call; its result counts as long as it lives.
        device: Where it allocates.

    Example:
        >>> import torch
        >>> x = torch.ones(1000, 1000)
        >>> round(peak_megabytes(lambda: x + 1, torch.device("cpu")))
        4
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
        events = json.loads(path.read_text(encoding="utf-8"))["traceEvents"]
    allocations = [event for event in events if event.get("name") == "[memory]"]
    held = peak = 0
    for event in sorted(allocations, key=lambda event: float(event["ts"])):
        if event["args"]["Device Type"] == 0:
            held += int(event["args"]["Bytes"])
            peak = max(peak, held)
    return peak
