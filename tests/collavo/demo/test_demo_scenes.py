"""Drawn scenes: what they promise about classes and boxes, and that the disk keeps every pixel."""

import json
from collections import Counter

import numpy as np
import pytest
import torch
from PIL import Image

from collavo.demo.scenes import SIZE, SNAP, STUFF_NAMES, THING_NAMES, make_scene, shape_and_hue
from collavo.demo.storage import Scenes, write_scenes
from collavo.panoptic import class_index, detections_from_map, index_from_category_id, is_thing

SCENES = [make_scene(np.random.default_rng(seed)) for seed in range(40)]


def test_every_class_shares_its_shape_and_its_hue_with_one_other():
    # Neither alone may name an object, or the vision tower would have it easy.
    pairs = [shape_and_hue(name) for name in THING_NAMES]
    assert len(set(pairs)) == len(THING_NAMES)
    for part in (0, 1):
        assert set(Counter(pair[part] for pair in pairs).values()) == {2}


def test_names_are_coco_classes():
    assert all(is_thing(class_index(name)) for name in THING_NAMES)
    assert not any(is_thing(class_index(name)) for name in STUFF_NAMES)


@pytest.mark.parametrize("scene", SCENES[:10])
def test_segments_are_what_the_map_says(scene):
    present = {int(value) for value in np.unique(scene.segmentation)}
    assert present == {segment.segment_id for segment in scene.segments}
    for segment in scene.segments:
        rows, columns = np.nonzero(scene.segmentation == segment.segment_id)
        box = (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1)
        assert tuple(int(value) for value in box) == segment.box


def test_objects_lie_on_the_coordinate_lattice_and_are_two_to_four():
    for scene in SCENES:
        boxes = [segment.box for segment in scene.segments if segment.is_thing]
        assert 2 <= len(boxes) <= 4
        assert all(value % SNAP == 0 for box in boxes for value in box)


def test_a_scene_is_a_function_of_the_generator():
    first, second = (make_scene(np.random.default_rng(7)) for _ in range(2))
    assert np.array_equal(first.image, second.image)
    assert np.array_equal(first.segmentation, second.segmentation)


def test_the_folder_is_coco_panoptic_and_reads_back_exactly(tmp_path):
    write_scenes(tmp_path, SCENES[:6])
    content = json.loads((tmp_path / "panoptic.json").read_text(encoding="utf-8"))
    assert set(content) == {"images", "annotations", "categories"}
    for scene, annotation in zip(SCENES, content["annotations"], strict=False):
        png = np.asarray(Image.open(tmp_path / "panoptic" / annotation["file_name"])).astype(int)
        ids = png[..., 0] + 256 * png[..., 1] + 65536 * png[..., 2]
        assert np.array_equal(ids, scene.segmentation)
        for info, segment in zip(annotation["segments_info"], scene.segments, strict=True):
            x, y, width, height = info["bbox"]
            assert (x, y, x + width, y + height) == segment.box
            assert info["area"] == int((ids == info["id"]).sum())
            assert index_from_category_id(info["category_id"]) == class_index(segment.name)
    scenes = Scenes(tmp_path)
    for scene, sample in zip(SCENES[:6], scenes, strict=True):
        assert np.array_equal(np.asarray(sample.image), scene.image)
        assert torch.equal(sample.panoptic.ids(), torch.from_numpy(scene.segmentation))
        found = [(one.name, one.box) for one in detections_from_map(sample.panoptic)]
        assert [name for name, _ in found] == [segment.name for segment in scene.segments]
        for (_, box), segment in zip(found, scene.segments, strict=True):
            assert box == pytest.approx([value / SIZE for value in segment.box], abs=1e-6)
    assert scenes[0] is scenes[0]  # read once
