"""What kind of GPU a device is, for the choice of tiles."""

from __future__ import annotations

from functools import lru_cache

import torch


@lru_cache
def kind_of(device: torch.device) -> str:
    """Return a kind of GPU; "portable" is AMD, and the interpreter on a CPU.

    What is not of compute capability 9, 10 or 11 counts as "ampere": later small GPUs (12) have
    its shared memory, not that of the large ones before them.
    """
    if device.type != "cuda" or torch.version.hip is not None:
        return "portable"
    major, _ = torch.cuda.get_device_capability(device)
    return {9: "hopper", 10: "blackwell", 11: "blackwell"}.get(major, "ampere")


@lru_cache
def processors(device: torch.device) -> int:
    """Return how many multiprocessors a device has; a CPU passes for a small GPU."""
    if device.type != "cuda":
        return 4
    return int(torch.cuda.get_device_properties(device).multi_processor_count)
