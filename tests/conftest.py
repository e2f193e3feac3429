"""What all tests share: recorded tensors, a COCO sample, seeds, and skips that say why."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

GOLDEN = Path(__file__).resolve().parent / "data" / "golden"
NO_PHOTOGRAPH = (
    "COCO image 142238 is CC BY-NC and therefore not in this repository; "
    "--coco-sample FOLDER hands it in (tests/data/README.md)"
)


def pytest_addoption(parser: pytest.Parser) -> None:
    """Declare --coco-sample."""
    parser.addoption(
        "--coco-sample",
        type=Path,
        metavar="FOLDER",
        help="folder of COCO image 142238 and its panoptic map (tests/data/README.md)",
    )


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


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """Models of a few thousand parameters: waking a second thread costs more than it brings."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def golden() -> Any:
    """Load recorded tensors: ``golden("nf4") -> (tensors, facts)``."""
    from safetensors.torch import load_file

    def load(name: str) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
        path = GOLDEN / f"{name}.safetensors"
        return load_file(path), json.loads(path.with_suffix(".json").read_text())

    return load


@pytest.fixture(scope="session", params=["drawn", "photograph"])
def coco_sample(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A ``CocoSample``: the drawn one, and the photograph where --coco-sample names its folder."""
    import coco_sample  # not at the top: the fuzzer takes this file and not that one

    if request.param == "drawn":
        return coco_sample.draw(tmp_path_factory.mktemp("drawn"))
    folder = request.config.getoption("--coco-sample")
    if folder is None:
        pytest.skip(NO_PHOTOGRAPH)
    sample = coco_sample.photograph(folder.resolve())
    missing = [str(p) for p in (sample.image, sample.png, sample.annotations) if not p.is_file()]
    if missing:
        pytest.fail(f"--coco-sample: expected {', '.join(missing)}")
    return sample
