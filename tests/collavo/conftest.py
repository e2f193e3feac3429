"""Small tokenizers, processors and COCO panoptic folders for the tests of the collavo package."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
from drawn_coco import Scene, draw_scene, write_coco

from collavo.panoptic import CocoPanopticDataset


@pytest.fixture(scope="session")
def tiny_tokenizer() -> Callable[..., Any]:
    """Build a word-level tokenizer: ``tiny_tokenizer(texts=(), padding_side="left")``."""
    return tiny.tiny_tokenizer


@pytest.fixture(scope="session")
def tiny_processor() -> Callable[..., Any]:
    """Build a processor: ``tiny_processor(grid=(4, 4), image_size=16, **its own arguments)``."""
    return tiny.tiny_processor


@pytest.fixture(scope="session")
def scene() -> Scene:
    """Segment ids ``[12, 16]`` and the class of every id."""
    return draw_scene()


@pytest.fixture
def coco_folder(tmp_path: Path) -> Path:
    """Folder of three drawn scenes of different sizes in COCO panoptic format."""
    return write_coco(tmp_path / "coco", [draw_scene(), draw_scene(20, 18), draw_scene(16, 30)])


@pytest.fixture
def coco_dataset(coco_folder: Path) -> CocoPanopticDataset:
    """The folder's data set."""
    return CocoPanopticDataset(
        coco_folder / "images", coco_folder / "panoptic", coco_folder / "panoptic.json"
    )
