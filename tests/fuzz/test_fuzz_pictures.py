"""Random picture files and trees of folders, the same ones each time; minutes of them by hand."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.fuzz import fuzz_picture_maps, fuzz_pictures

# Pillow's, about files that are damaged on purpose.
pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.mark.parametrize("first", range(0, 160, 20))
def test_pictures(tmp_path: Path, first: int) -> None:
    for seed in range(first, first + 20):
        fuzz_pictures.run_case(seed, tmp_path)


@pytest.mark.parametrize("first", range(0, 60, 20))
def test_maps_of_pictures(first: int) -> None:
    for seed in range(first, first + 20):
        fuzz_picture_maps.run_case(seed)


def test_a_longer_name_of_another_file_does_not_hide_behind_a_shorter_one() -> None:
    """Found by chance: coco/coco/12.png is neither val/coco/12.png, which is there, nor 12.png."""
    fuzz_picture_maps.run_case(5155)
