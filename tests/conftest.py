"""What all tests share: the reference folder beside the checkout, seeds, and skips that say why."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
SHARED = ROOT.parent / "shared"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip tests that need a GPU where there is none."""
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs an NVIDIA GPU; torch sees none here")
    for item in items:
        # Not "in keywords": a checkout in a folder of that name would skip everything.
        if item.get_closest_marker("gpu"):
            item.add_marker(skip)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def golden() -> Any:
    """Load recorded tensors: ``golden("nf4") -> (tensors, facts)``; skips where they are absent."""
    from safetensors.torch import load_file

    def load(name: str) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
        path = SHARED / "golden" / f"{name}.safetensors"
        if not path.exists():
            pytest.skip("recorded tensors (golden/) are not beside this checkout")
        return load_file(path), json.loads(path.with_suffix(".json").read_text())

    return load


@pytest.fixture(scope="session")
def coco_sample() -> Path:
    """Folder of the real COCO panoptic sample; skips where it is absent."""
    path = SHARED / "data" / "coco_panoptic_sample"
    if not path.is_dir():
        pytest.skip("the COCO panoptic sample is not beside this checkout")
    return path
