"""COCO panoptic folders: what is read, and what a broken one is told."""

from __future__ import annotations

import json
import pickle

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from collavo.panoptic import CocoPanopticDataset, detections_from_map, write_panoptic_png


def open_folder(folder, **kwargs):
    return CocoPanopticDataset(
        folder / "images", folder / "panoptic", folder / "panoptic.json", **kwargs
    )


def test_reads_what_was_written(coco_dataset, scene):
    ids, classes = scene
    assert len(coco_dataset) == 3
    sample = coco_dataset[0]
    assert sample.image_id == 1 and sample.path.name == "001.png"
    assert sample.image.mode == "RGB" and sample.image.size == (16, 12)
    assert torch.equal(sample.panoptic.ids(), ids)
    listed = zip(sample.panoptic.segment_ids, sample.panoptic.segment_classes, strict=True)
    assert {int(i): int(c) for i, c in listed} == classes
    assert [one.image.size for one in coco_dataset] == [(16, 12), (18, 20), (30, 16)]
    assert coco_dataset[-1].image_id == 3
    with pytest.raises(IndexError):
        coco_dataset[3]


def test_pickles_and_works_in_workers(coco_dataset):
    copy = pickle.loads(pickle.dumps(coco_dataset))
    assert torch.equal(copy[1].panoptic.ids(), coco_dataset[1].panoptic.ids())
    loader = DataLoader(coco_dataset, batch_size=None, num_workers=1)
    assert [sample.image_id for sample in loader] == [1, 2, 3]


def test_annotated_areas_and_boxes_are_found(coco_sample):
    """Areas and boxes are the annotation's own for every segment."""
    data = open_folder(coco_sample.folder)
    sample = data[0]
    assert sample.image.size == (640, 427) and sample.panoptic.size == (427, 640)
    infos = {info["id"]: info for info in coco_sample.segments()}
    assert sample.panoptic.segment_ids.tolist() == list(infos)
    for segment, info in infos.items():
        y, x = np.nonzero(sample.panoptic.ids().numpy() == segment)
        assert len(y) == info["area"]
        left, top, width, height = info["bbox"]
        assert (x.min(), y.min()) == (left, top)
        assert (x.max() + 1 - x.min(), y.max() + 1 - y.min()) == (width, height)
    found = detections_from_map(sample.panoptic)
    assert len(found) == len(infos)
    assert {one.name for one in found} == coco_sample.names
    people = [one.number for one in found if one.name == "person"]
    assert people == list(range(1, coco_sample.people + 1))


def test_crowds_can_be_left_out(coco_sample):
    """A crowd is no instance; without it, its pixels are unknown."""
    data = open_folder(coco_sample.folder, keep_crowd=False)
    others = [info["id"] for info in coco_sample.segments() if info["id"] != coco_sample.crowd]
    assert data.num_segments(0) == len(others) == len(coco_sample.segments()) - 1
    assert data[0].panoptic.segment_ids.tolist() == others


def test_json_without_categories_means_cocos_own(coco_folder):
    edit(coco_folder, lambda content: content.pop("categories"))
    assert open_folder(coco_folder)[0].panoptic.segment_classes.tolist() == [119, 125, 17, 17, 0]


def edit(folder, change):
    path = folder / "panoptic.json"
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


BROKEN = {
    "no images": (lambda c: c.pop("images"), "expected a list 'images', got NoneType"),
    "no annotations": (lambda c: c.pop("annotations"), "expected a list 'annotations'"),
    "no segments_info": (
        lambda c: c["annotations"][1].pop("segments_info"),
        "annotation of image 2: expected a list 'segments_info', got NoneType",
    ),
    "segments_info no list": (
        lambda c: c["annotations"][1].update(segments_info={}),
        "annotation of image 2: expected a list 'segments_info', got dict",
    ),
    "image without its map": (
        lambda c: c["annotations"].pop(1),
        r"image 2 \(002.png\) has no annotation",
    ),
    "map without its image": (
        lambda c: c["images"].pop(1),
        "image_id 2 is annotated and not in 'images'",
    ),
    "unknown category": (
        lambda c: c["annotations"][1]["segments_info"][0].update(category_id=12),
        "annotation of image 2: segment 900 has the unknown category_id 12",
    ),
    "category id as text": (
        lambda c: c["annotations"][1]["segments_info"][0].update(category_id="a"),
        r"annotation of image 2: segments_info\[0\]: expected an integer 'category_id', got 'a'",
    ),
    "duplicate segment": (
        lambda c: c["annotations"][1]["segments_info"].append({"id": 900, "category_id": 1}),
        "annotation of image 2: segment id 900 is listed twice",
    ),
    "duplicate annotation": (
        lambda c: c["annotations"].append(c["annotations"][0]),
        "image_id 1 is annotated twice",
    ),
    "duplicate image id": (
        lambda c: c["images"].append(c["images"][0]),
        r"image id 1 is listed twice",
    ),
    "duplicate map file": (
        lambda c: c["annotations"][1].update(file_name="001.png"),
        "map 001.png is listed twice",
    ),
    "no file_name": (
        lambda c: c["images"][1].pop("file_name"),
        r"images\[1\]: expected 'file_name' as str, got None",
    ),
    "no id": (lambda c: c["images"][1].pop("id"), r"images\[1\]: expected 'id' as int, got None"),
    "unknown name": (
        lambda c: c["categories"][0].update(name="unicorn"),
        "expected a COCO panoptic class, got 'unicorn'",
    ),
    "duplicate category": (
        lambda c: c["categories"].append(c["categories"][0]),
        r"categories\[133\]: id 1 is listed twice",
    ),
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_json_is_named(coco_folder, name):
    change, message = BROKEN[name]
    edit(coco_folder, change)
    with pytest.raises(ValueError, match=rf"panoptic\.json: .*{message}"):
        open_folder(coco_folder)


def test_no_json(coco_folder):
    path = coco_folder / "panoptic.json"
    path.write_text(path.read_text()[:100])
    with pytest.raises(ValueError, match=r"panoptic\.json: not a JSON file"):
        open_folder(coco_folder)
    path.write_text("[]")
    with pytest.raises(ValueError, match=r"panoptic\.json: expected a JSON object, got list"):
        open_folder(coco_folder)
    path.unlink()
    with pytest.raises(FileNotFoundError, match=r"panoptic\.json: there is no such file"):
        open_folder(coco_folder)


@pytest.mark.parametrize("kind", ["images", "panoptic"])
def test_missing_files_and_folders_are_named(coco_folder, kind):
    (coco_folder / kind / "002.png").unlink()
    with pytest.raises(FileNotFoundError, match=rf"{kind}/002\.png: listed in .*panoptic\.json"):
        open_folder(coco_folder)
    for path in (coco_folder / kind).iterdir():
        path.unlink()
    (coco_folder / kind).rmdir()
    with pytest.raises(FileNotFoundError, match=rf"{kind}: there is no folder"):
        open_folder(coco_folder)


def test_unreadable_pictures_are_named(coco_folder):
    data = open_folder(coco_folder)
    for kind, index in (("images", 0), ("panoptic", 1)):
        path = coco_folder / kind / f"00{index + 1}.png"
        path.write_bytes(path.read_bytes()[:80])
        with pytest.raises(ValueError, match=rf"{kind}/00{index + 1}\.png: .*truncated"):
            data[index]
    Image.new("P", (30, 16)).save(coco_folder / "panoptic" / "003.png")
    with pytest.raises(ValueError, match=r"panoptic/003\.png: expected an 8-bit RGB PNG"):
        data[2]


def test_sizes_that_differ_are_named(coco_folder):
    write_panoptic_png(coco_folder / "panoptic" / "002.png", torch.ones(20, 19, dtype=torch.int32))
    with pytest.raises(
        ValueError, match=r"002\.png: the map is 19x20, its image .*002\.png is 18x20"
    ):
        open_folder(coco_folder)[1]


def test_empty_map_is_a_sample_without_objects(coco_folder):
    """All pixels 0 and an empty list: nothing is wrong with it, and nothing is there."""
    write_panoptic_png(coco_folder / "panoptic" / "002.png", torch.zeros(20, 18, dtype=torch.int32))
    edit(coco_folder, lambda c: c["annotations"][1].update(segments_info=[]))
    sample = open_folder(coco_folder)[1]
    assert sample.panoptic.num_segments == 0 and detections_from_map(sample.panoptic) == []
