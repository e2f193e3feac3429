"""COCO's folder layout, and folders of which single entries or files are wrong."""

from __future__ import annotations

import json

import pytest
import torch
from bad_files import BAD_MAPS, break_map, raw_png

from collavo.panoptic import (
    CocoPanopticDataset,
    PanopticMap,
    Skipped,
    detections_from_map,
    find_coco_folder,
    read_panoptic_png,
    write_panoptic_png,
)


def edit(folder, change):
    path = folder / "panoptic.json"
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def open_folder(folder, **kwargs):
    return CocoPanopticDataset(
        folder / "images", folder / "panoptic", folder / "panoptic.json", **kwargs
    )


@pytest.mark.parametrize("maps", ["annotations/panoptic_val2017", "panoptic_val2017"])
@pytest.mark.parametrize("images", ["val2017", "images/val2017"])
def test_layouts_of_cocos_archives(coco_folder, tmp_path, maps, images):
    root = tmp_path / "root"
    (root / "annotations").mkdir(parents=True)
    (root / "images").mkdir()
    (coco_folder / "panoptic.json").rename(root / "annotations" / "panoptic_val2017.json")
    (coco_folder / "panoptic").rename(root / maps)
    (coco_folder / "images").rename(root / images)
    data = CocoPanopticDataset.from_folder(root)
    assert [one.image_id for one in data] == [1, 2, 3]
    assert data.panoptic == root / maps and data.images == root / images


def test_what_was_looked_for_is_named(coco_folder, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"root: there is no folder .*nowhere"):
        CocoPanopticDataset.from_folder(tmp_path / "nowhere")
    for part, message in (
        ("val2017", "images: expected .*root/val2017 or .*root/images/val2017, found nothing"),
        (
            "annotations/panoptic_val2017",
            "panoptic PNGs: expected .*annotations/panoptic_val2017 or .*root/panoptic_val2017",
        ),
        ("", r"annotations: expected .*annotations/panoptic_val2017\.json, found nothing"),
    ):
        root = tmp_path / "root"
        root.mkdir(exist_ok=True)
        with pytest.raises(FileNotFoundError, match=message):
            find_coco_folder(root, "val2017")
        (root / part).mkdir(parents=True, exist_ok=True)


@pytest.mark.parametrize("kind", BAD_MAPS)
def test_maps_that_cannot_be_used_are_named(coco_folder, kind):
    data = open_folder(coco_folder)
    break_map(coco_folder / "panoptic" / "001.png", kind)
    with pytest.raises((ValueError, OSError), match=rf"panoptic/001\.png: {BAD_MAPS[kind]}"):
        data[0]
    assert data[1].image_id == 2  # the others are as good as before


@pytest.mark.parametrize(("width", "height"), [(0, 4), (4, 0), (0, 0)])
def test_a_map_without_pixels(tmp_path, width, height):
    raw_png(tmp_path / "map.png", width, height)
    with pytest.raises(ValueError, match=rf"map\.png: .*pixels, got {width}x{height}"):
        read_panoptic_png(tmp_path / "map.png")


def first(content):
    return content["annotations"][0]


ENTRIES = {
    "image without map": (
        lambda c: c["annotations"].pop(0),
        Skipped("001.png", "image 1 (001.png) has no annotation"),
        [2, 3],
    ),
    "map without image": (
        lambda c: c["images"].pop(0),
        Skipped("001.png", "image_id 1 is annotated and not in 'images'"),
        [2, 3],
    ),
    "image without name": (
        lambda c: c["images"][0].pop("file_name"),
        Skipped("images[0]", "images[0]: expected 'file_name' as str, got None"),
        [2, 3],
    ),
    "no image at all": (
        lambda c: c["images"].insert(1, 7),
        Skipped("images[1]", "images[1]: expected 'id' as int, got None"),
        [1, 2, 3],
    ),
    "no segments": (
        lambda c: first(c).pop("segments_info"),
        Skipped(
            "001.png", "annotation of image 1: expected a list 'segments_info', got NoneType"
        ),
        [2, 3],
    ),
    "segment id 0": (
        lambda c: first(c)["segments_info"][0].update(id=0),
        Skipped("001.png", "annotation of image 1: expected a segment id in 1..16777215, got 0"),
        [2, 3],
    ),
    "segment id above 2^24": (
        lambda c: first(c)["segments_info"][0].update(id=2**24),
        Skipped(
            "001.png", "annotation of image 1: expected a segment id in 1..16777215, got 16777216"
        ),
        [2, 3],
    ),
    "segment twice": (
        lambda c: first(c)["segments_info"].append(first(c)["segments_info"][0]),
        Skipped("001.png", "annotation of image 1: segment id 900 is listed twice"),
        [2, 3],
    ),
    "unknown category": (
        lambda c: first(c)["segments_info"][0].update(category_id=12),
        Skipped("001.png", "annotation of image 1: segment 900 has the unknown category_id 12"),
        [2, 3],
    ),
    "annotation twice": (
        lambda c: c["annotations"].append(first(c)),
        Skipped("annotations[3]", "image_id 1 is annotated twice"),
        [1, 2, 3],
    ),
    "image twice": (
        lambda c: c["images"].append(c["images"][0]),
        Skipped("001.png", "image id 1 is listed twice"),
        [1, 2, 3],
    ),
    "file twice": (
        lambda c: c["images"][1].update(file_name="001.png"),
        Skipped("001.png", "image 001.png is listed twice"),
        [1, 3],
    ),
    "map twice": (
        lambda c: c["annotations"][1].update(file_name="001.png"),
        Skipped("002.png", "map 001.png is listed twice"),
        [1, 3],
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", ENTRIES)
def test_one_faulty_entry_is_skipped_and_named(coco_folder, name):
    """Strictly it is an error; with skip_faults the others are all there."""
    change, skipped, kept = ENTRIES[name]
    edit(coco_folder, change)
    with pytest.raises(ValueError, match=r"panoptic\.json: "):
        open_folder(coco_folder)
    data = open_folder(coco_folder, skip_faults=True)
    assert data.skipped == [skipped]
    assert [one.image_id for one in data] == kept
    for one in data:  # the flat lists have not shifted
        assert len(detections_from_map(one.panoptic)) == 5


def test_an_image_whose_id_is_no_number_leaves_its_map_over(coco_folder):
    """JSON's true would be 1 to Python, and image 1's map would be taken for it."""
    edit(coco_folder, lambda c: c["images"][1].update(id=True))
    data = open_folder(coco_folder, skip_faults=True)
    assert [one.image_id for one in data] == [1, 3]
    assert data.skipped == [
        Skipped("002.png", "images[1]: expected 'id' as int, got True"),
        Skipped("002.png", "image_id 2 is annotated and not in 'images'"),
    ]


@pytest.mark.parametrize("kind", ["images", "panoptic"])
def test_a_missing_file_is_skipped_and_named(coco_folder, kind):
    (coco_folder / kind / "002.png").unlink()
    data = open_folder(coco_folder, skip_faults=True)
    assert [one.image_id for one in data] == [1, 3]
    assert data.skipped == [Skipped(f"{kind}/002.png", "listed in panoptic.json and not there")]
    assert data.index_of("002.png") is None and data.index_of("003.png") == 1


@pytest.mark.parametrize("content", ["[]", "{", '{"images": 3}', "[" * 100_000])
def test_a_json_that_is_wrong_as_a_whole_is_an_error_all_the_same(coco_folder, content):
    (coco_folder / "panoptic.json").write_text(content)
    with pytest.raises(ValueError, match=r"panoptic\.json: "):
        open_folder(coco_folder, skip_faults=True)


def test_thousands_of_segments_in_one_map(coco_folder):
    """5,000 segments of one class: all are listed, and numbers end at the largest there is."""
    ids = torch.arange(1, 5001, dtype=torch.int32).repeat_interleave(2).reshape(100, 100) * 3000
    write_panoptic_png(coco_folder / "panoptic" / "001.png", ids)
    infos = [{"id": i * 3000, "category_id": 1} for i in range(1, 5001)]
    edit(coco_folder, lambda c: first(c).update(segments_info=infos))
    data = open_folder(coco_folder)
    assert data.num_segments(0) == 5000
    panoptic = data.panoptic_map(0)
    assert isinstance(panoptic, PanopticMap) and torch.equal(panoptic.ids(), ids)
    found = detections_from_map(panoptic)
    assert [one.number for one in found] == [*range(1, 21), *[0] * 4980]
