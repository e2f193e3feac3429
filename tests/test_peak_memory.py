"""The peak memory of a call, by which tests and benchmarks say what it holds."""

from __future__ import annotations

import pytest
import torch

from collavo_kernels.testing import peak_megabytes


def test_peak_memory_on_a_cpu_is_what_lives_at_once() -> None:
    """Two temporaries that live together count twice, one after the other once."""
    x = torch.ones(1 << 20)
    together = peak_megabytes(lambda: (x + 1) * (x + 2), torch.device("cpu"))
    in_turn = peak_megabytes(lambda: [(x + 1).sum(), (x + 2).sum()], torch.device("cpu"))
    assert together == pytest.approx(3 * x.nbytes / 1e6, rel=0.01)
    assert in_turn == pytest.approx(x.nbytes / 1e6, rel=0.01)
