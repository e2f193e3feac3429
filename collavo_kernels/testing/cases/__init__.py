"""The table of cases of every operator: forward, gradients, ``opcheck``, compile and benchmarks."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from collavo_kernels.testing.cases import crayon_attention, panoptic_lookup, qlora_linear

_FEW = {
    "crayon_attention": ("plain", "no_tables", "padding_window", "no_rows"),
    "qlora_linear": ("few", "few_in_panels", "prefill", "dense", "no_adapters"),
    "panoptic_lookup": ("mixed-sizes", "no-segments", "cells-overlap"),
}


def samples(operator: str) -> Iterator[tuple[str, Any]]:
    """Yield a few of an operator's cases by name, as bundles of float32 inputs on the CPU.

    Args:
        operator: Its name.

    Raises:
        KeyError: if there are no cases for an operator of this name.
    """
    for name in _FEW[operator]:
        yield name, _sample(operator, name)
    if operator == "qlora_linear":
        dense = _sample(operator, "dense")
        # A reference that keeps x's strides would return a gradient of another layout.
        yield "dense_transposed", dense._replace(x=dense.x.t().contiguous().t())


def _sample(operator: str, name: str) -> Any:
    if operator == "crayon_attention":
        case = next(each for each in crayon_attention.CASES if each.name == name)
        return case.make(torch.float32)
    if operator == "qlora_linear":
        every = (*qlora_linear.CASES, *qlora_linear.PANEL_CASES)
        return qlora_linear.make_call(next(each for each in every if each.name == name)).inputs()
    return panoptic_lookup.CASES[name].inputs("majority")
