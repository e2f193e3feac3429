"""Cold calls: what one takes after other work, rather than straight after itself.

A benchmark that repeats one call finds the interpreter's, torch's and the kernel's code in the
nearest caches. A program that calls an operator once per batch does not, and where a call takes a
fraction of a millisecond that is most of its time. ``OtherWork`` runs before each timed call,
outside of the time: a matrix product, then a read of twice the last-level cache. What the call
reads should rotate over copies as well (``memory.copies_past_cache``). Such rows have a mode that
ends with ``-cold``. They are for CPUs: a GPU's calls follow each other in a graph, over copies.
"""

from __future__ import annotations

import pytest
import torch

from benchmarks import memory

COLD = "-cold"
SIDE = 384


class OtherWork:
    """Leaves the caches full of something else.

    Example:
        >>> import torch
        >>> OtherWork()()
    """

    def __init__(self) -> None:
        """Make the buffer and the matrix."""
        size = 2 * memory.last_level_cache(torch.device("cpu"))
        self.buffer = torch.ones(size // 4, dtype=torch.int32)
        self.matrix = torch.ones(SIDE, SIDE)

    def __call__(self) -> None:
        """Do the work; nothing is returned, so that a timer's ``setup`` can be this."""
        torch.mm(self.matrix, self.matrix)
        # Last, so that it is what the caches hold. The amax streams, a sum of int32 would widen.
        self.buffer.amax()


def require_cpu(kind: str) -> None:
    """Skip a cold benchmark on a GPU, whose calls rotate over copies in every row."""
    if kind != "cpu":
        pytest.skip("cold rows are for a CPU")
