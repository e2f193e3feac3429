"""Reading prepared data sets: lazily, in workers, and what is said about damaged ones."""

from __future__ import annotations

import json
import pickle

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch.utils.data import DataLoader

from collavo.panoptic import PreparedDataset, PrepareSettings, SampleStream, prepare_folder
from collavo.panoptic.coco_index import CocoFolder
from collavo.prepared import read as prepared
from collavo.prepared.shards import Shard


@pytest.fixture
def folder(coco_folder, tmp_path):
    """Three images in three shards."""
    coco = CocoFolder(
        coco_folder / "images", coco_folder / "panoptic", coco_folder / "panoptic.json"
    )
    prepare_folder(coco, tmp_path / "out", PrepareSettings(grid=(3, 4), images_per_shard=1))
    return tmp_path / "out"


def test_few_shards_are_open_at_a_time(folder, monkeypatch):
    monkeypatch.setattr(prepared, "_OPEN_SHARDS", 2)
    data = PreparedDataset(folder)
    assert len(data._open) == 0
    for index in (0, 1, 2, 0, 2):
        assert data[index].image_id == index + 1 and len(data._open) <= 2
    assert list(data._open) == [0, 2]


def test_pickles_and_works_in_workers(folder, coco_folder):
    data = PreparedDataset(folder, coco_folder / "images")
    data[0]  # a shard is open, and stays behind
    copy = pickle.loads(pickle.dumps(data))
    assert torch.equal(copy[1].crayon.row_index, data[1].crayon.row_index)
    for context in ("fork", "spawn"):
        loader = DataLoader(data, batch_size=None, num_workers=1, multiprocessing_context=context)
        found = [(one.image_id, one.image().size) for one in loader]
        assert found == [(1, (16, 12)), (2, (18, 20)), (3, (30, 16))]


def test_finds_and_counts_without_opening_images(folder):
    data = PreparedDataset(folder)
    assert [data.index_of(name) for name in ("003.png", "001.png", "none.png")] == [2, 0, None]
    assert [data.file_name(i) for i in range(3)] == ["001.png", "002.png", "003.png"]
    assert [data.num_segments(i) for i in range(3)] == [5, 5, 5]
    assert data[-1].image_id == 3 and data[-1].path.name == "003.png"
    assert torch.equal(data.crayon(1).row_class, data[1].crayon.row_class)
    with pytest.raises(IndexError):
        data[3]


def test_streams_go_past_damaged_samples(folder, coco_folder):
    """A stream takes prepared samples as it takes COCO's."""
    data = PreparedDataset(folder, coco_folder / "images")
    path = folder / "shard-00001.jsonl"
    path.write_bytes(b"?" + path.read_bytes()[1:])
    skipped = []
    assert [one.image_id for one in SampleStream(data, on_unreadable=skipped.append)] == [1, 3]
    (one,) = skipped
    assert one.name == "002.png" and "shard-00001.jsonl: damaged at byte 0" in one.reason


def test_an_image_of_another_size_is_named(folder, coco_folder):
    Image.new("RGB", (9, 9)).save(coco_folder / "images" / "002.png")
    sample = PreparedDataset(folder, coco_folder / "images")[1]
    with pytest.raises(ValueError, match=r"002\.png \(prepared\): the map is 18x20, its image"):
        sample.image()


def rewrite(path, **changes):
    content = json.loads(path.read_text())
    path.write_text(json.dumps({**content, **changes}))


def cut(path):
    path.write_bytes(path.read_bytes()[:-10])


@pytest.mark.parametrize(
    ("damage", "error", "message"),
    [
        (
            lambda f: (f / "shard-00001.safetensors").unlink(),
            FileNotFoundError,
            r"shard-00001\.safetensors: this shard is missing",
        ),
        (
            lambda f: (f / "shard-00002.jsonl").unlink(),
            FileNotFoundError,
            r"shard-00002\.jsonl: this shard is missing",
        ),
        (
            lambda f: cut(f / "shard-00001.safetensors"),
            ValueError,
            r"shard-00001\.safetensors: truncated, or no shard",
        ),
        (
            lambda f: cut(f / "shard-00000.jsonl"),
            ValueError,
            r"shard-00000\.jsonl: expected \d+ bytes, got",
        ),
        (
            lambda f: (f / "shard-00000.safetensors").write_bytes(b""),
            ValueError,
            r"shard-00000\.safetensors: truncated, or no shard",
        ),
        (
            lambda f: (f / "prepared.json").unlink(),
            FileNotFoundError,
            r"prepared\.json: there is no such file; expected what collavo prepare made",
        ),
        (
            lambda f: (f / "prepared.json").write_text("[]"),
            ValueError,
            r"prepared\.json: expected format 1 of collavo prepare",
        ),
        (
            lambda f: rewrite(f / "prepared.json", format=2),
            ValueError,
            r"prepared\.json: expected format 1 of collavo prepare, got format 2",
        ),
        (
            lambda f: rewrite(f / "prepared.json", complete=False),
            ValueError,
            r"prepared\.json: preparing was not finished; run the same collavo prepare again",
        ),
        (
            lambda f: rewrite(f / "prepared.json", settings={"colour": 1}),
            ValueError,
            r"prepared\.json: its settings are none of collavo prepare",
        ),
        (
            lambda f: rewrite(f / "prepared.json", counts={"shards": 2, "images": 3}),
            ValueError,
            r"prepared\.json: expected 3 images in the shards, got 2",
        ),
    ],
)
def test_damage_is_named(folder, damage, error, message):
    damage(folder)
    with pytest.raises(error, match=message):
        PreparedDataset(folder)


def test_a_damaged_line_is_named(folder):
    path = folder / "shard-00001.jsonl"
    path.write_bytes(b"?" + path.read_bytes()[1:])
    with pytest.raises(ValueError, match=r"shard-00001\.jsonl: damaged at byte 0"):
        PreparedDataset(folder)[1]


def test_tensors_without_lines_are_named(folder):
    """What stands where the lines' places should be may be empty and still be well-formed."""
    path = folder / "shard-00001.safetensors"
    tensors = {**load_file(path), "line_start": torch.zeros(0, dtype=torch.int64)}
    save_file(tensors, path)
    with pytest.raises(
        ValueError, match=r"shard-00001\.safetensors: no shard: its first_row has 2"
    ):
        PreparedDataset(folder)


def test_a_damaged_report_of_a_skipped_image_is_named(folder):
    path = folder / "shard-00001.jsonl"
    line = path.read_bytes()
    path.write_bytes(b'{"skipped"' + line[10:])
    with pytest.raises(
        ValueError, match=r"shard-00001\.jsonl: damaged at byte 0 .*; remove it and"
    ):
        Shard(folder, 1).skipped()


def test_no_folder_of_images(folder, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"images: there is no folder .*nowhere"):
        PreparedDataset(folder, tmp_path / "nowhere")


def test_crayons_of_another_processor_are_refused(folder):
    data = PreparedDataset(folder)
    data.check_crayon(grid=(3, 4), max_number=20, reduce="majority")
    for change in ({"grid": (4, 3)}, {"max_number": 5}, {"reduce": "nearest"}):
        fits = {"grid": (3, 4), "max_number": 20, "reduce": "majority"}
        with pytest.raises(ValueError, match=f"was prepared with {next(iter(change))} "):
            data.check_crayon(**{**fits, **change})
