"""What all fuzzed functions share: awkward memory, a machine's settings, a note of each case.

A bare pytest runs a few examples, always the same ones. ``scripts/fuzz_native.sh`` runs many, on
native code built with sanitizers, with these environment variables:

- ``COLLAVO_FUZZ_EXAMPLES``: examples of every test, drawn anew.
- ``COLLAVO_FUZZ_NOTE``: file that holds the case under way, since a crash leaves nothing to shrink.
- ``COLLAVO_FUZZ_SANITIZED``: the native module must stop at a wrong access.
"""

from __future__ import annotations

import ctypes
import dataclasses
import json
import mmap
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, settings
from torch import Tensor

from collavo_kernels._native import ISA_CODES, native
from collavo_kernels.testing import offset_view

EXAMPLES = int(os.environ.get("COLLAVO_FUZZ_EXAMPLES") or "0")
NOTE = os.environ.get("COLLAVO_FUZZ_NOTE", "")
SANITIZED = bool(os.environ.get("COLLAVO_FUZZ_SANITIZED"))
ISAS = tuple(getattr(native(), "isas", tuple)())
DTYPES = ("float32", "bfloat16", "float16")
LAYOUTS = ("plain", "odd", "strided", "turned", "end", "start")
SENTINEL = 42.0

needs_native = pytest.mark.skipif(not ISAS, reason="no compiled module here")
fuzzing = settings(
    max_examples=EXAMPLES or 60,
    derandomize=not EXAMPLES,
    database=None,
    deadline=None,
    suppress_health_check=list(HealthCheck),
)
_ran: dict[str, int] = {}


def examples_run() -> dict[str, int]:
    """Return how often each kind of case ran in this process."""
    return dict(_ran)


def note(case: Any) -> None:
    """Count a case, and write it down before it runs, for ``test_again``."""
    kind = type(case).__name__
    _ran[kind] = _ran.get(kind, 0) + 1
    if NOTE:
        Path(NOTE).write_text(json.dumps({"kind": kind, **dataclasses.asdict(case)}) + "\n")


@contextmanager
def machine(isa: str, threads: int) -> Iterator[Any]:
    """Run native code with an instruction set and a number of threads; yields the module."""
    module = native()
    before = module.best_isa(), torch.get_num_threads()
    module.use_isa(ISA_CODES[isa])
    torch.set_num_threads(threads)
    try:
        yield module
    finally:
        module.use_isa(ISA_CODES[before[0]])
        torch.set_num_threads(before[1])


def guarded(tensor: Tensor, at_end: bool = True) -> Tensor:
    """Copy a tensor to the end, or the start, of memory with forbidden pages around it.

    The processor itself then stops an access outside the tensor on that side, also one by an
    instruction that sanitizers do not see.
    """
    size = tensor.numel() * tensor.element_size()
    if size == 0:
        return tensor.clone()
    page = mmap.PAGESIZE
    body = -(-size // page) * page
    whole = torch.frombuffer(mmap.mmap(-1, body + 2 * page), dtype=torch.uint8)
    for offset in (0, page + body):
        _forbid(whole.data_ptr() + offset, page)
    first = page + (body - size if at_end else 0)
    view = whole[first : first + size].view(tensor.dtype).view(tensor.shape)
    return view.copy_(tensor)


def _forbid(address: int, size: int) -> None:
    protect = ctypes.CDLL(None, use_errno=True).mprotect
    protect.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    if protect(address, size, 0) != 0:
        raise OSError(ctypes.get_errno(), "mprotect")


def lay_out(tensor: Tensor, layout: str) -> Tensor:
    """Return the same values in memory of another kind, one of ``LAYOUTS``."""
    if layout in ("end", "start"):
        return guarded(tensor, layout == "end")
    if layout == "strided":
        return offset_view(tensor)
    if layout == "turned":
        return tensor.transpose(0, -1).clone().contiguous().transpose(0, -1)
    if layout == "odd":
        room = torch.zeros(tensor.numel() + 3, dtype=tensor.dtype)
        return room[1 : 1 + tensor.numel()].view(tensor.shape).copy_(tensor)
    return tensor.clone()


def same_bits(one: Tensor, other: Tensor) -> bool:
    """Compare values bit by bit, any NaN being equal to any other."""
    return torch.equal(one.isnan(), other.isnan()) and torch.equal(
        one.nan_to_num(0.0), other.nan_to_num(0.0)
    )


def expect_close(
    name: str, found: Tensor, exact: Tensor, squares: Tensor, terms: int, band: Tensor | None = None
) -> None:
    """Compare a sum of products with the exact one, where that is a number of its dtype's range.

    A term's rounding errors are independent of those of the others, so they add up like the roots
    of squares: ``squares`` is the same sum over squared terms. Eight deviations of a few roundings
    to the dtype of at most half an epsilon each; and float32 sums of ``terms`` terms.

    Args:
        name: For the message.
        found: The result to check.
        exact: The same shape, float64.
        squares: The same shape, float64.
        terms: Terms of the longest sum.
        band: What is allowed beyond that, the same shape, float64.
    """
    limits, single = torch.finfo(found.dtype), torch.finfo(torch.float32)
    size = squares.sqrt()
    steps = 8 * limits.eps + terms * single.eps
    budget = steps * size + limits.eps * exact.abs()
    budget += 4 * limits.tiny * limits.eps + terms * single.tiny
    if band is not None:
        budget += band
    known = exact.isfinite() & (size + exact.abs() < 1e-3 * limits.max)
    bad = known & ~((found.double() - exact).abs() <= budget)
    if bool(bad.any()):
        place = tuple(bad.nonzero()[0].tolist())
        raise AssertionError(
            f"{name}{list(place)}: expected {float(exact[place])} within {float(budget[place])}, "
            f"got {float(found[place])}; {int(bad.sum())} of {found.numel()} are off"
        )
