"""The table of cases of every operator: forward, gradients, ``opcheck`` and compile."""

from __future__ import annotations

import importlib
from typing import Any

__all__ = ["samples"]


def samples(operator: str) -> list[tuple[str, Any]]:
    """Return a few of an operator's cases by name, as bundles of float32 inputs on the CPU.

    Args:
        operator: Its name; ``collavo_kernels/testing/cases/<operator>.py`` has ``samples()``.

    Raises:
        ValueError: if there is no such file, or it has fewer than three.
    """
    place = f"{__name__}.{operator}"
    try:
        found = list(importlib.import_module(place).samples())
    except (ModuleNotFoundError, AttributeError) as error:
        raise ValueError(f"{operator}: {place} should have samples(): {error}") from error
    if len(found) < 3:
        raise ValueError(f"{operator}: {place}.samples() should give three or more bundles by name")
    return found
