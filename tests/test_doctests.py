"""Every example in a docstring runs and prints what it says."""

from __future__ import annotations

import doctest
import importlib
import pkgutil

import pytest
import torch

import collavo
import collavo_kernels

SKIPPED = {
    # Running these starts the program.
    "collavo_kernels.__main__",
}


def _modules() -> list[str]:
    names = []
    for package in (collavo_kernels, collavo):
        found = pkgutil.walk_packages(package.__path__, f"{package.__name__}.")
        names += [package.__name__, *(m.name for m in found)]
    compiled = ("collavo_kernels._C", "collavo_kernels._cuda")
    return sorted(n for n in names if n not in SKIPPED and n not in compiled)


@pytest.mark.parametrize("name", _modules())
def test_examples(name: str) -> None:
    pytest.importorskip("triton") if name.endswith("triton_kernels") else None
    torch.manual_seed(0)
    result = doctest.testmod(importlib.import_module(name))
    assert result.failed == 0
