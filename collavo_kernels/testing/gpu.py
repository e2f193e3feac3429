"""What tests on a GPU share: code that must not wait for it, graphs, and honest errors."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor

Result = TypeVar("Result")


@contextmanager
def no_synchronisation() -> Iterator[None]:
    """Raise where torch waits for the GPU."""
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def rougher(one: Tensor, other: Tensor, exact: Tensor) -> Tensor:
    """Return which of two results of plain PyTorch errs more, on the CPU.

    A GPU sums in another order than a CPU: neither's error alone says what is honest on the other.
    """
    errors = [float((x.detach().cpu().double() - exact).abs().max()) for x in (one, other)]
    return (one if errors[0] >= errors[1] else other).detach().cpu()


def replayed(run: Callable[[], Result]) -> Result:
    """Return what ``run`` returns, computed by a CUDA graph that was captured from it.

    Args:
        run: Called three times to compile and allocate, then once under capture.
    """
    stream: Any = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = run()
    graph.replay()
    torch.cuda.synchronize()
    return result
