"""Tiles of the Triton kernels for each kind of GPU, head dim and element size.

No choice spills registers or overfills shared memory, with every switch of a kernel on and with
none, with Triton 3.6 and 3.7; tests compile all of them. Hopper's for head dims of 65 to 128 were
the fastest of eight each on an H200, at 1325 tokens: two small programs that take turns hide more
of the softmax than one large one. The others were chosen for products as large as there is room.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton

from collavo_kernels._gpu import processors

SMALLEST_BLOCK, LARGEST_BLOCK = 16, 128  # of queries or keys


class Tiles(NamedTuple):
    """Tiles of a kernel that goes over queries and keys: both blocks, warps, pipeline stages."""

    queries: int
    keys: int
    warps: int
    stages: int

    @property
    def blocks(self) -> dict[str, int]:
        """The kernel's constants."""
        return {"QUERIES": self.queries, "KEYS": self.keys}

    @property
    def options(self) -> dict[str, int]:
        """The launch's options."""
        return {"num_warps": self.warps, "num_stages": self.stages}


class Plan(NamedTuple):
    """Tiles of the three kernels that attend: forward, gradients of key and value, of the query."""

    attend: Tiles
    key_gradients: Tiles
    query_gradients: Tiles


# By head dim, padded: 80 and 96 take 128's registers. Two-byte elements.
PLANS = {
    # Fits the 99 KiB of shared memory of compute capability 8.6, 8.9 and 12 as well.
    "ampere": {
        64: Plan(Tiles(128, 64, 4, 3), Tiles(32, 128, 8, 2), Tiles(128, 64, 8, 2)),
        128: Plan(Tiles(128, 64, 8, 2), Tiles(64, 64, 8, 2), Tiles(128, 32, 8, 2)),
        256: Plan(Tiles(64, 32, 8, 2), Tiles(32, 32, 8, 2), Tiles(64, 16, 8, 2)),
    },
    "hopper": {
        64: Plan(Tiles(128, 128, 8, 3), Tiles(64, 128, 8, 3), Tiles(128, 128, 8, 2)),
        128: Plan(Tiles(64, 64, 4, 3), Tiles(32, 64, 4, 3), Tiles(64, 32, 4, 3)),
        256: Plan(Tiles(64, 32, 8, 3), Tiles(32, 32, 8, 2), Tiles(64, 32, 8, 2)),
    },
    "blackwell": {
        64: Plan(Tiles(128, 64, 8, 3), Tiles(64, 128, 8, 2), Tiles(128, 64, 4, 2)),
        128: Plan(Tiles(128, 64, 8, 3), Tiles(64, 64, 8, 2), Tiles(128, 64, 8, 3)),
        256: Plan(Tiles(64, 64, 8, 2), Tiles(32, 32, 8, 2), Tiles(64, 64, 8, 2)),
    },
    "portable": {
        64: Plan(Tiles(128, 64, 4, 2), Tiles(32, 128, 4, 2), Tiles(64, 64, 4, 2)),
        128: Plan(Tiles(128, 64, 4, 2), Tiles(32, 64, 4, 1), Tiles(64, 32, 4, 2)),
        256: Plan(Tiles(64, 32, 4, 1), Tiles(16, 32, 8, 1), Tiles(32, 32, 4, 1)),
    },
}
# Products of float32 run on the ordinary units in full precision.
_FLOAT32 = {
    64: Plan(Tiles(32, 32, 4, 1), Tiles(16, 32, 8, 1), Tiles(32, 32, 4, 1)),
    128: Plan(Tiles(32, 32, 8, 1), Tiles(16, 32, 8, 1), Tiles(32, 16, 8, 1)),
    256: Plan(Tiles(16, 16, 8, 1), Tiles(16, 16, 8, 1), Tiles(16, 16, 4, 1)),
}
_FLOAT32_PORTABLE = {
    **_FLOAT32,
    256: Plan(Tiles(16, 16, 4, 1), Tiles(16, 16, 4, 1), Tiles(16, 16, 4, 1)),
}


def plan_for(head_dim: int, element_bytes: int, kind: str) -> Plan:
    """Return the tiles for a head dim, the bytes of an element, and a kind of GPU."""
    plans = PLANS[kind]
    if element_bytes == 4:
        plans = _FLOAT32_PORTABLE if kind == "portable" else _FLOAT32
    return plans[max(64, 2 * half_of(head_dim))]


def half_of(head_dim: int) -> int:
    """Return half a head dim, padded to what a matrix product takes."""
    return max(8, int(triton.next_power_of_2(head_dim // 2)))


def padded(head_dim: int) -> dict[str, int]:
    """Return the constants by which every kernel knows the head dim."""
    return {"D": head_dim, "HALF": half_of(head_dim)}


def preparation(head_dim: int) -> dict[str, int]:
    """Return constants of ``prepare_kernel``: tokens of a program, and heads that it prepares."""
    return {"TOKENS": 1024 // max(32, half_of(head_dim)), "HEADS": 4}


def shares_of(members: int, programs: int, device: torch.device) -> int:
    """Share out the query heads that read a key/value head, where programs are too few for a GPU.

    The longest program of a causal call does twice the average's work, so two for each
    multiprocessor are wanted; each share costs a float32 copy of dk and dv.

    Args:
        members: Query heads of a key/value head.
        programs: What there is without shares.
        device: Whose multiprocessors count.

    Returns:
        A divisor of ``members``.
    """
    wanted = 2 * processors(device)
    enough = (n for n in range(1, members) if members % n == 0 and programs * n >= wanted)
    return next(enough, members)
