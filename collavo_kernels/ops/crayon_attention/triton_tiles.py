"""Tiles of the Triton kernels for each kind of GPU, head dim and element size.

No choice spills registers or overfills shared memory; tests compile all of them.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import torch
import triton

LARGEST_BLOCK = 128  # of queries or keys


class Tiles(NamedTuple):
    """Tiles of a kernel that goes over queries and keys: both blocks, warps, pipeline stages."""

    queries: int
    keys: int
    warps: int
    stages: int

    @property
    def options(self) -> dict[str, int]:
        """The kernel's constants and launch options."""
        names = ("QUERIES", "KEYS", "num_warps", "num_stages")
        return dict(zip(names, self, strict=True))


class Plan(NamedTuple):
    """Tiles of the three kernels that attend: forward, gradients of key and value, of the query."""

    attend: Tiles
    key_gradients: Tiles
    query_gradients: Tiles


_FLOAT32 = Plan(Tiles(16, 32, 4, 1), Tiles(16, 16, 4, 1), Tiles(16, 16, 4, 1))
_HALF = Plan(Tiles(64, 32, 4, 2), Tiles(32, 64, 4, 2), Tiles(64, 32, 4, 2))
_PLANS = {
    kind: {64: _HALF, 128: _HALF, 256: _HALF}
    for kind in ("ampere", "hopper", "blackwell", "portable")
}


def plan_for(size: int, element_bytes: int, kind: str) -> Plan:
    """Return the tiles for a head dim, the bytes of an element, and a kind of GPU."""
    width = 2 * half_of(size)
    if element_bytes == 4:
        return _FLOAT32
    return _PLANS[kind][max(64, width)]


def half_of(size: int) -> int:
    """Return half a head dim, padded to what a matrix product takes."""
    return max(8, int(triton.next_power_of_2(size // 2)))


def preparation(size: int) -> dict[str, int]:
    """Return constants of ``prepare_kernel``: tokens of a program, and heads that it prepares."""
    return {"TOKENS": 2048 // max(64, half_of(size)), "HEADS": 4}


@lru_cache
def kind_of(device: torch.device) -> str:
    """Return a kind of GPU; "portable" is AMD, and the interpreter on a CPU."""
    if device.type != "cuda" or torch.version.hip is not None:
        return "portable"
    major, _ = torch.cuda.get_device_capability(device)
    return "ampere" if major < 9 else "hopper" if major == 9 else "blackwell"
