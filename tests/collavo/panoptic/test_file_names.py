"""File names of JSON files: within their folder, and which entry a path means."""

from __future__ import annotations

import json
from pathlib import PurePosixPath

import pytest
import torch

from collavo.cli import main
from collavo.panoptic import (
    CocoPanopticDataset,
    PreparedDataset,
    find_panoptic_map,
    write_panoptic_png,
)
from collavo.panoptic.file_names import FileNames, inner_name
from collavo.prepared.shards import shard_files
from collavo.train import ConversationDataset

OUTSIDE = [
    "../x.png", "a/../x.png", "val/..", "/etc/passwd", "//host/x.png", "C:\\x.png", "C:x.png",
    "..\\x.png", "\\x.png", "", ".", "./", "a\0.png",
]  # fmt: skip


@pytest.mark.parametrize("name", OUTSIDE)
def test_names_that_leave_their_folder(name):
    """On any system, by any system's rules; also a/.., since ``a`` may be a link."""
    with pytest.raises(ValueError, match=r"images\[3\]: expected the name of a file within its"):
        inner_name(name, "images[3]")


@pytest.mark.parametrize(
    ("name", "inner"),
    [("x.png", "x.png"), ("./a//x.png", "a/x.png"), ("a\\x.png", "a/x.png"), ("..x", "..x")],
)
def test_names_within_their_folder(name, inner):
    assert inner_name(name, "images[3]") == inner


@pytest.mark.parametrize("part", ["images", "annotations"])
@pytest.mark.parametrize("name", ["../001.png", "/tmp/001.png"])
def test_a_coco_json_never_leads_out(coco_folder, part, name):
    """The file is there, and would be read."""
    (coco_folder / "001.png").write_bytes((coco_folder / "images" / "001.png").read_bytes())
    path = coco_folder / "panoptic.json"
    content = json.loads(path.read_text())
    content[part][0]["file_name"] = name
    path.write_text(json.dumps(content))
    folders = coco_folder / "images", coco_folder / "panoptic", path
    with pytest.raises(ValueError, match=r"file_name: expected the name of a file within"):
        CocoPanopticDataset(*folders)
    assert len(CocoPanopticDataset(*folders, skip_faults=True)) == 2


def test_prepared_shards_never_lead_out(coco_folder, tmp_path):
    folders = [f"--{name}={coco_folder / name}" for name in ("images", "panoptic")]
    out = tmp_path / "out"
    words = [*folders, f"--annotations={coco_folder / 'panoptic.json'}", f"--output={out}"]
    assert main(["prepare", *words, "--no-progress"]) == 0
    lines, _ = shard_files(out, 0)
    lines.write_bytes(lines.read_bytes().replace(b'"001.png"', b'"../1.ng"'))
    data = PreparedDataset(out, coco_folder / "images")
    with pytest.raises(ValueError, match=r"shard-00000\.jsonl: file_name: expected the name of"):
        data[0]
    assert data[1].path == coco_folder / "images" / "002.png"


@pytest.mark.parametrize("name", ["../001.png", "/etc/x.png", "images/../../x.png"])
def test_conversations_never_lead_out(coco_folder, name):
    turns = [{"role": "user", "content": "?"}, {"role": "assistant", "content": "!"}]
    records = [{"image": name, "conversation": turns}, {"image": "001.png", "conversation": turns}]
    data = ConversationDataset(records, images=coco_folder / "images")
    with pytest.raises(ValueError, match=r"records\[0\]: image: expected the name of a file"):
        data[0]
    assert data[1]["image"][0].size == (16, 12)
    assert data.pictures() == [coco_folder / "images" / "001.png"]


def test_the_longest_ending_wins():
    names = FileNames(["001.png", "val/001.png", "train/001.png", "a/train/001.png"], "all.json")
    for path, best, whole in (
        ("/data/val/001.png", 1, 1),
        ("/data/train/001.png", 2, 2),
        ("/a/train/001.png", 3, 3),
        ("/data/001.png", 0, 0),
        ("001.png", 0, 0),
        ("/data/val/002.png", None, None),
    ):
        assert names.best(PurePosixPath(path)) == best, path
        assert names.whole(PurePosixPath(path)) == whole, path
    assert names.whole(PurePosixPath("/data/val/001.png"), least=3) is None


def test_two_that_fit_alike_are_named():
    names = FileNames(["val/001.png", "train\\001.png"], "all.json")
    with pytest.raises(ValueError, match=r"all\.json: .*'val/001\.png' .*0.*'train/001\.png' .*1"):
        names.best(PurePosixPath("/data/001.png"))
    assert names.whole(PurePosixPath("/data/001.png")) is None


def splits(folder, *listed):
    """Write PNGs of two splits with equal names, and a JSON that lists some; cat, dog, bird."""
    for split in ("train", "val", "copy"):
        (folder / split).mkdir()
    for split in ("train", "val"):
        write_panoptic_png(folder / split / "001.png", torch.full((8, 8), 7, dtype=torch.int32))
    categories = {"train": 17, "val": 18}
    entries = [
        {"image_id": i, "file_name": name,
         "segments_info": [{"id": 7, "category_id": categories.get(name.partition("/")[0], 16)}]}
        for i, name in enumerate(listed)
    ]  # fmt: skip
    (folder / "all.json").write_text(json.dumps({"annotations": entries}))
    return folder / "all.json"


def classes(png, annotations):
    return find_panoptic_map(png, annotations).segment_classes.tolist()


def test_each_split_has_its_own_entry(tmp_path, monkeypatch):
    json_file = splits(tmp_path, "train/001.png", "val/001.png")
    assert classes(tmp_path / "train" / "001.png", json_file) == [15]
    assert classes(tmp_path / "val" / "001.png", json_file) == [16]
    monkeypatch.chdir(tmp_path / "val")
    assert classes("001.png", json_file) == [16]
    (tmp_path / "val" / "001.png").rename(tmp_path / "copy" / "001.png")
    with pytest.raises(ValueError, match=r"all\.json: .*copy/001\.png ends as much like"):
        classes(tmp_path / "copy" / "001.png", json_file)


def test_an_entry_of_a_file_that_is_there_is_no_other_files(tmp_path):
    """One that has moved is still found by its name, and by a JSON that lists no folders."""
    json_file = splits(tmp_path, "train/001.png")
    with pytest.raises(ValueError, match=r"found only 'train/001\.png', which is .*train/001"):
        classes(tmp_path / "val" / "001.png", json_file)
    (tmp_path / "train" / "001.png").rename(tmp_path / "copy" / "001.png")
    assert classes(tmp_path / "copy" / "001.png", json_file) == [15]
    (tmp_path / "all.json").write_text(json_file.read_text().replace("train/", ""))
    assert classes(tmp_path / "copy" / "001.png", json_file) == [15]


def test_the_map_of_another_image_is_refused(coco_folder, tmp_path, capsys):
    """Equal sizes do not make a map an image's own: the JSON says whose it is."""
    (coco_folder / "images" / "002.png").write_bytes(
        (coco_folder / "images" / "001.png").read_bytes()
    )
    words = ["show", "--panoptic", str(coco_folder / "panoptic" / "001.png")]
    words += ["--annotations", str(coco_folder / "panoptic.json")]
    words += ["--output", str(tmp_path / "out.png"), "--image"]
    assert main([*words, str(coco_folder / "images" / "002.png")]) == 2
    assert "002.png is its image 2, and the map" in capsys.readouterr().err
    (coco_folder / "images" / "002.png").rename(tmp_path / "a copy.png")
    assert main([*words, str(tmp_path / "a copy.png")]) == 0


def test_a_data_set_finds_images_by_paths(coco_dataset):
    assert [coco_dataset.index_of(n) for n in ("002.png", "x/002.png", "x/9.png")] == [1, 1, None]
