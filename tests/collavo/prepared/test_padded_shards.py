"""Shards for processors that pad: the crayons are those that the processor would look up."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from PIL import Image

from collavo.panoptic import (
    PanopticMap,
    PreparedDataset,
    PrepareSettings,
    prepare_folder,
)
from collavo.panoptic.coco_index import CocoFolder
from collavo.processing.blocks import look_up
from collavo.processing.region import even_grid, frame, make_image_processor, padded_grid
from tests.collavo.drawn_coco import draw_scene, write_coco
from tests.collavo.tiny import tiny_processor

PROMPT = "USER: <image>\nIs there a horse ASSISTANT:"
GRID = (5, 5)
SIZES = [(12, 16), (20, 18), (13, 31), (40, 11), (16, 16)]


@pytest.fixture(scope="module")
def coco(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_coco(tmp_path_factory.mktemp("coco"), [draw_scene(*size) for size in SIZES])


def prepared(coco: Path, output: Path, mode: str) -> PreparedDataset:
    parts = CocoFolder(coco / "images", coco / "panoptic", coco / "panoptic.json")
    prepare_folder(parts, output, PrepareSettings(grid=GRID, images_per_shard=2, image_mode=mode))
    return PreparedDataset(output, coco / "images")


@pytest.mark.parametrize("reduce", ["majority", "nearest"])
def test_the_square_does_not_depend_on_the_pixels_that_it_is_resized_to(reduce: str) -> None:
    # The shards know the grid alone; a rounding of positions would move the border of a cell.
    images = make_image_processor(336, mode="pad")
    for height in range(5, 60, 7):
        for width in range(4, 70, 5):
            ids, classes = draw_scene(max(height, 12), max(width, 16))
            known = PanopticMap.from_segments(
                ids[:height, :width].contiguous(), list(classes), list(classes.values())
            )
            layouts = [(even_grid(frame(images, height, width), GRID),)]
            layouts.append((padded_grid(height, width, GRID),))
            pairs = [(known, layout) for layout in layouts]
            one, other = look_up(pairs, num_classes=133, max_number=20, reduce=reduce)
            assert torch.equal(one.row_index, other.row_index), (height, width)
            assert torch.equal(one.row_box, other.row_box), (height, width)


def test_shards_give_the_inputs_that_the_maps_give(coco: Path, tmp_path: Path) -> None:
    data = prepared(coco, tmp_path / "out", "pad")
    processor = tiny_processor(grid=GRID, mode="pad", image_size=20)
    data.check_processor(processor)
    entries = json.loads((coco / "panoptic.json").read_text())["annotations"]
    for index, (size, entry) in enumerate(zip(SIZES, entries, strict=True)):
        ids, classes = draw_scene(*size)
        known = PanopticMap.from_segments(ids, list(classes), list(classes.values()))
        image = Image.open(coco / "images" / entry["file_name"])
        inputs = [
            processor(image, PROMPT, one, return_tensors="pt")
            for one in (known, data.crayon(index))
        ]
        assert inputs[0].keys() == inputs[1].keys()
        for name, value in inputs[0].items():
            assert torch.equal(value, inputs[1][name]), (name, size)
    # A picture that is no square has cells of padding; rows are counted by the image; 0 is unknown.
    assert bool((data.crayon(2).row_index == -1).any())
    assert int(data.crayon(4).row_index.min()) == 1


def test_shards_of_another_mode_are_refused(coco: Path, tmp_path: Path) -> None:
    squashed = prepared(coco, tmp_path / "squash", "squash")
    padded = prepared(coco, tmp_path / "pad", "pad")
    pads, squashes = (tiny_processor(grid=GRID, mode=mode) for mode in ("pad", "squash"))
    with pytest.raises(ValueError, match="prepared with image_mode 'squash', the processor has"):
        squashed.check_processor(pads)
    with pytest.raises(ValueError, match="prepared with image_mode 'pad', the processor has"):
        padded.check_processor(squashes)
    # Without that check the cells of padding tell the one from the other.
    with Image.open(coco / "images" / "003.png") as image:
        with pytest.raises(ValueError, match=r"expected -1 in the cells of padding.*--image-mode"):
            pads(image, PROMPT, squashed.crayon(2))
        with pytest.raises(ValueError, match="row_index to be at least 0, got -1"):
            squashes(image, PROMPT, padded.crayon(2))


def test_folders_of_before_say_nothing_of_a_mode(coco: Path, tmp_path: Path) -> None:
    # They go on, and are read, as squashed ones.
    prepared(coco, tmp_path / "out", "squash")
    settings = json.loads(next((tmp_path / "out").glob("*.json")).read_text())["settings"]
    assert "image_mode" not in settings
    assert PrepareSettings.from_json(settings).image_mode == "squash"
    with pytest.raises(ValueError, match="image_mode: expected squash or pad, got 'crop'"):
        PrepareSettings(image_mode="crop")
