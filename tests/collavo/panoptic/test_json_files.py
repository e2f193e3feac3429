"""JSON that other tools wrote: encodings, spelled numbers, classes of their own, broken files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from collavo.panoptic import CocoPanopticDataset, PanopticMap, Skipped
from collavo.panoptic.coco_index import CocoIndex
from collavo.panoptic.json_files import flag, integer, read_json, shown

ENCODINGS = ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32"]


def edit(folder: Path, change: Any) -> Path:
    path = folder / "panoptic.json"
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))
    return path


def open_folder(folder: Path, **kwargs: Any) -> CocoPanopticDataset:
    return CocoPanopticDataset(
        folder / "images", folder / "panoptic", folder / "panoptic.json", **kwargs
    )


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_every_unicode_encoding(coco_folder: Path, encoding: str) -> None:
    """PowerShell writes UTF-16, and many editors put a byte order mark before UTF-8."""
    path = coco_folder / "panoptic.json"
    path.write_bytes(path.read_text().encode(encoding))
    assert [one.image_id for one in open_folder(coco_folder)] == [1, 2, 3]
    other = coco_folder / "other.json"
    other.write_text('["caf\u00e9"]', encoding=encoding)
    assert read_json(other) == ["caf\u00e9"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('["caf\u00e9"]'.encode("latin-1"), "expected JSON in UTF-8, UTF-16 or UTF-32, .*save it"),
        (b'{"id": 1}\n{"id": 2}\n', "not a JSON file .*of JSON lines, one object a line, make one"),
        (b"", "not a JSON file"),
        (b"[" * 100_000, "not a JSON file"),
        (b"[" + b"1" * 5000 + b"]", "not a JSON file"),
    ],
)
def test_what_is_no_json_is_named(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "a.json"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=rf"a\.json: {message}"):
        read_json(path)


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (12, 12), (12.0, 12), (1e3, 1000), ("12", 12), (" 012 ", 12), ("+3", 3), ("-1", -1),
        (np.int64(5), 5), (np.float32(5), 5), (1.5, None), (float("nan"), None), ("1.0", None),
        (float("inf"), None), (True, None), (None, None), ("", None), ("1" * 30, None), ("x", None),
        ("\u0661", None), ([1], None), (np.bool_(True), None),
    ],
)  # fmt: skip
def test_numbers_in_every_spelling(value: object, expected: int | None) -> None:
    assert integer(value) == expected and type(integer(value)) in (int, type(None))


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (0, False), (1, True), (True, True), ("0", False), ("False", False), ("true", True),
        (1.0, True), (2, None), ("yes", None), (None, None), ([], None),
    ],
)  # fmt: skip
def test_flags_in_every_spelling(value: object, expected: bool | None) -> None:
    """The text "0" is true to Python, and a crowd it was."""
    assert flag(value) is expected


@pytest.mark.parametrize("spell", [str, float, lambda v: f"{v:012d}"])
def test_ids_in_every_spelling(coco_folder: Path, spell: Any) -> None:
    """An image's id and its annotation's need not be spelled alike."""

    def change(content: Any) -> None:
        content["images"][1]["id"] = spell(2)
        content["annotations"][2]["image_id"] = spell(3)
        for info in content["annotations"][0]["segments_info"]:
            info.update(id=spell(info["id"]), category_id=spell(info["category_id"]))
        content["categories"][0]["id"] = spell(1)

    plain = [one.panoptic for one in open_folder(coco_folder)]
    edit(coco_folder, change)
    data = open_folder(coco_folder)
    assert [one.image_id for one in data] == [1, 2, 3]
    for one, other in zip(data, plain, strict=True):
        assert one.panoptic.segment_ids.tolist() == other.segment_ids.tolist()
        assert one.panoptic.segment_classes.tolist() == other.segment_classes.tolist()


def test_crowds_in_every_spelling(coco_folder: Path) -> None:
    def change(content: Any) -> None:
        values = ["0", "1", True, 0.0]
        for info, value in zip(content["annotations"][0]["segments_info"], values, strict=False):
            info["iscrowd"] = value
        content["annotations"][1]["segments_info"][0]["iscrowd"] = "perhaps"

    edit(coco_folder, change)
    data = open_folder(coco_folder, keep_crowd=False, skip_faults=True)
    assert data[0].panoptic.num_segments == 3
    reason = "annotation of image 2: segments_info[0]: expected 'iscrowd' as 0 or 1, got 'perhaps'"
    assert data.skipped == [Skipped("002.png", reason)]


@pytest.mark.parametrize("name", ["drone", None, 7, ["person"], ""])
def test_an_own_class_counts_only_where_a_segment_has_it(coco_folder: Path, name: Any) -> None:
    """People add classes for other work to the list that COCO's segments come with."""
    edit(coco_folder, lambda c: c["categories"].append({"id": 999, "name": name}))
    assert len(open_folder(coco_folder)) == 3
    edit(coco_folder, lambda c: c["annotations"][1]["segments_info"][0].update(category_id=999))
    message = (
        rf"image 2: segment 900 has category_id 999: expected a COCO panoptic class, got {name!r}"
    )
    message = message.replace("[", r"\[")
    with pytest.raises(ValueError, match=message):
        open_folder(coco_folder)
    assert [one.image_id for one in open_folder(coco_folder, skip_faults=True)] == [1, 3]


def test_a_limit_forgets_the_faults_of_other_images_whatever_their_spelling(
    coco_folder: Path,
) -> None:
    def change(content: Any) -> None:
        content["images"][0]["id"] = "1"
        content["annotations"].insert(1, {**content["annotations"][0], "image_id": 1.0})
        content["annotations"].append({**content["annotations"][-1], "image_id": "3"})

    path = edit(coco_folder, change)
    index = CocoIndex.read(path, skip_faults=True, limit=1)
    assert [one.image_id for one in index.records] == [1]
    assert index.skipped == [Skipped("annotations[1]", "image_id 1 is annotated twice")]


def test_a_segmenter_may_count_in_floats_and_texts() -> None:
    ids = np.array([[7, 7]], np.int32)
    found = PanopticMap.from_result(
        {"segmentation": ids, "segments_info": [{"id": np.float64(7), "label_id": "17"}]}
    )
    assert found.segment_ids.tolist() == [7] and found.segment_classes.tolist() == [17]


def test_values_in_messages_are_short_and_printable() -> None:
    """Half of a surrogate pair cannot be printed, and a message of a megabyte is none."""
    assert shown("\ud83d") == "'\\ud83d'"
    assert shown(["\ud83d"]).isascii()
    assert len(shown("x" * 10**6)) < 200
    deep: Any = []
    for _ in range(100_000):
        deep = [deep]
    assert shown(deep) == "a deep list"
