"""Panoptic maps and their PNGs: what is read, what is refused, and with which words."""

from __future__ import annotations

import struct
import zlib

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from collavo.panoptic import (
    CLASS_NAMES,
    NUM_CLASSES,
    NUM_THINGS,
    PanopticMap,
    category_id_from_index,
    class_index,
    coco_categories,
    display_name,
    index_from_category_id,
    is_thing,
    read_panoptic_png,
    write_panoptic_png,
)


def test_classes():
    assert (NUM_CLASSES, NUM_THINGS) == (133, 80)
    assert len(set(CLASS_NAMES)) == len({display_name(i) for i in range(133)}) == 133
    for index in range(133):
        assert index_from_category_id(category_id_from_index(index)) == index
        assert class_index(CLASS_NAMES[index]) == class_index(display_name(index)) == index
        assert is_thing(index) == (index < 80)
    for function, bad in (
        (display_name, 133), (is_thing, -1), (category_id_from_index, 133),
        (index_from_category_id, 12), (class_index, "unicorn"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=str(bad)):
            function(bad)


@given(st.lists(st.integers(0, 2**24 - 1), min_size=1, max_size=24))
@settings(max_examples=40, deadline=None)
def test_png_round_trip(tmp_path_factory, ids):
    path = tmp_path_factory.getbasetemp() / "round_trip.png"
    segmentation = torch.tensor([ids], dtype=torch.int32)
    write_panoptic_png(path, segmentation)
    again = read_panoptic_png(path)
    assert again.dtype == torch.int32 and torch.equal(again, segmentation)


def test_png_is_cocos_encoding(tmp_path):
    colours = np.array([[[1, 2, 3], [255, 255, 255]]], dtype=np.uint8)
    Image.fromarray(colours).save(tmp_path / "a.png")
    assert read_panoptic_png(tmp_path / "a.png").tolist() == [[1 + 2 * 256 + 3 * 65536, 2**24 - 1]]


def test_write_refuses(tmp_path):
    path = tmp_path / "a.png"
    with pytest.raises(ValueError, match="at most 16777215, got 16777216"):
        write_panoptic_png(path, torch.tensor([[2**24]]))
    with pytest.raises(ValueError, match=r"segmentation: expected a map \[H, W\]"):
        write_panoptic_png(path, torch.zeros(2, 2, 2, dtype=torch.int32))
    assert not path.exists()  # nothing half-written
    write_panoptic_png(path, torch.tensor([[-1, 4]]))
    assert read_panoptic_png(path).tolist() == [[0, 4]]


def png_16_bit(path):
    """A 16-bit RGB PNG, which Pillow reads as 8 bits without a word."""

    def chunk(kind, data):
        check = struct.pack(">I", zlib.crc32(kind + data))
        return struct.pack(">I", len(data)) + kind + data + check

    header = struct.pack(">IIBBBBB", 1, 1, 16, 2, 0, 0, 0)
    body = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(7))) + chunk(b"IEND", b"")
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + body)


@pytest.mark.parametrize(
    ("mode", "found"),
    [("P", "1-bit paletted"), ("L", "8-bit grayscale"), ("RGBA", "8-bit RGBA"),
     ("I;16", "16-bit grayscale"), ("LA", "8-bit grayscale with alpha"), ("1", "1-bit grayscale")],
)  # fmt: skip
def test_other_kinds_of_png_are_refused(tmp_path, mode, found):
    path = tmp_path / "map.png"
    Image.new(mode, (4, 4)).save(path)
    with pytest.raises(ValueError, match=rf"map\.png: expected an 8-bit RGB PNG .*got {found}$"):
        read_panoptic_png(path)


def test_16_bit_rgb_is_refused(tmp_path):
    png_16_bit(tmp_path / "map.png")
    with pytest.raises(ValueError, match=r"map\.png: expected an 8-bit RGB PNG .*got 16-bit RGB"):
        read_panoptic_png(tmp_path / "map.png")


def test_truncated_and_foreign_files_are_named(tmp_path):
    whole = tmp_path / "whole.png"
    noise = torch.randint(0, 2**24, (64, 64))
    write_panoptic_png(whole, noise)
    content = whole.read_bytes()
    for length in (0, 4, 20, 30, 60, len(content) // 2, len(content) - 40):
        cut = tmp_path / f"cut{length}.png"
        cut.write_bytes(content[:length])
        with pytest.raises(ValueError, match=rf"cut{length}\.png"):
            read_panoptic_png(cut)
    jpeg = tmp_path / "photo.png"
    Image.new("RGB", (8, 8)).save(jpeg, format="JPEG")
    with pytest.raises(ValueError, match=r"photo\.png: expected a PNG"):
        read_panoptic_png(jpeg)
    with pytest.raises(FileNotFoundError, match=r"none\.png: there is no such panoptic PNG"):
        read_panoptic_png(tmp_path / "none.png")


IDS = torch.tensor([[0, 7], [9, -1]], dtype=torch.int32)


@pytest.mark.parametrize(
    ("fields", "error", "message"),
    [
        (
            (IDS.long(), IDS[0], IDS[0]),
            TypeError,
            "segmentation: expected a tensor of int32 or uint8",
        ),
        ((IDS, [1], IDS[0]), TypeError, "segment_ids: expected a tensor of int32, got list"),
        ((IDS[0], IDS[0], IDS[0]), ValueError, r"segmentation: expected int32 \[H, W\] or uint8"),
        (
            (IDS[:0], IDS[0, :0], IDS[0, :0]),
            ValueError,
            "segmentation: expected at least one pixel",
        ),
    ],
)
def test_fields_are_checked(fields, error, message):
    with pytest.raises(error, match=message):
        PanopticMap(*fields)


@pytest.mark.parametrize(
    ("ids", "classes", "message"),
    [
        ([7, 9], [1], "segment_classes: expected 2 classes, got 1"),
        ([0], [1], "segment_ids: expected ids > 0, got 0"),
        ([7, 7], [1, 1], "segment_ids: id 7 is listed twice"),
        ([7], [133], "segment_classes: expected -1..132 for segment 7, got 133"),
        ([7], [-2], "segment_classes: expected -1..132 for segment 7, got -2"),
    ],
)
def test_lists_are_checked(ids, classes, message):
    with pytest.raises(ValueError, match=message):
        PanopticMap.from_segments(IDS, ids, classes)


def test_from_segments_takes_any_integer_map():
    panoptic = PanopticMap.from_segments(np.array([[1, 2]], dtype=np.uint16), (2,), (0,))
    assert panoptic.segmentation.dtype == torch.int32 and panoptic.size == (1, 2)
    with pytest.raises(TypeError, match=r"expected an integer map, got torch\.float32"):
        PanopticMap.from_segments(torch.zeros(2, 2), [], [])
    with pytest.raises(ValueError, match="expected ids that fit into int32"):
        PanopticMap.from_segments(torch.tensor([[2**40]]), [], [])


def test_ids_below_int32_are_no_segment():
    """Cut to 32 bits, -2**32 + 5 would be the segment 5."""
    ids = torch.tensor([[-(2**32) + 5, 5]])
    result = {"segmentation": ids, "segments_info": [{"id": 5, "label_id": 17}]}
    for panoptic in (
        PanopticMap.from_segments(ids, [5], [17]),
        PanopticMap.from_segmenter(lambda _: result, Image.new("RGB", (2, 1))),
    ):
        assert (panoptic.ids() == 5).tolist() == [[False, True]]
        assert int(panoptic.ids()[0, 0]) <= 0


@pytest.mark.filterwarnings("error")
def test_what_numpy_and_pillow_give_is_taken():
    """A segmenter's ids come from ``np.unique``, its map from a picture that cannot be written."""
    ids = np.asarray(Image.fromarray(np.array([[0, 3], [3, 3]], dtype=np.uint8)))
    infos = [{"id": one, "label_id": np.int64(17)} for one in np.unique(ids)[1:]]
    result = {"segmentation": ids, "segments_info": infos}
    panoptic = PanopticMap.from_segmenter(lambda _: result, Image.new("RGB", (2, 2)))
    assert panoptic.segment_ids.tolist() == [3] and panoptic.segment_classes.tolist() == [17]
    assert PanopticMap.from_segments(ids, [3], [17]).size == (2, 2)


def test_from_coco(tmp_path):
    write_panoptic_png(tmp_path / "a.png", IDS)
    infos = [{"id": 7, "category_id": 187}, {"id": 9, "category_id": 1}]
    panoptic = PanopticMap.from_coco(tmp_path / "a.png", infos)
    assert panoptic.segment_classes.tolist() == [119, 0]
    # A file with its own numbers: classes go by name.
    categories = [{"id": 187, "name": "person"}, {"id": 1, "name": "sky-other-merged"}]
    panoptic = PanopticMap.from_coco(tmp_path / "a.png", infos, categories)
    assert panoptic.segment_classes.tolist() == [0, 119]
    assert PanopticMap.from_coco(IDS, infos, coco_categories()).num_segments == 2


@pytest.mark.parametrize(
    ("infos", "message"),
    [
        ([{"category_id": 1}], r"segments_info\[0\]: expected an integer 'id', got None"),
        ([{"id": 7}], r"segments_info\[0\]: expected an integer 'category_id'"),
        ([{"id": 7, "category_id": 12}], "segment 7 has the unknown category_id 12"),
        ([{"id": 7, "category_id": 1}] * 2, "segment id 7 is listed twice"),
        ([{"id": 2**24, "category_id": 1}], r"expected a segment id in 1\.\.16777215"),
        (["x"], r"segments_info\[0\]"),
    ],
)
def test_segment_lists_of_coco_are_checked(infos, message):
    with pytest.raises(ValueError, match=message):
        PanopticMap.from_coco(IDS, infos)


def test_from_segmenter():
    image = Image.new("L", (2, 2))
    seen = []

    def segmenter(picture):
        seen.append(picture.mode)
        return {"segmentation": IDS, "segments_info": [{"id": 7, "label_id": 17}]}

    panoptic = PanopticMap.from_segmenter(segmenter, image)
    assert seen == ["RGB"] and panoptic.segment_classes.tolist() == [17]
    assert PanopticMap.from_segmenter(lambda _: panoptic, image) is panoptic
    with pytest.raises(TypeError, match="segmenter: expected a PanopticMap or a mapping"):
        PanopticMap.from_segmenter(lambda _: None, image)
    with pytest.raises(ValueError, match="its result has no 'segments_info'"):
        PanopticMap.from_segmenter(lambda _: {"segmentation": IDS}, image)


def test_a_map_may_stay_in_cocos_colours(tmp_path):
    """The lookup reads colours as they are, so that nobody makes 4 bytes of 3."""
    ids = torch.tensor([[0, 7], [70000, 256**3 - 1]], dtype=torch.int32)
    write_panoptic_png(tmp_path / "map.png", ids)
    scene = PanopticMap.from_coco(tmp_path / "map.png", [{"id": 70000, "category_id": 1}])
    assert scene.segmentation.dtype == torch.uint8 and scene.size == (2, 2)
    assert torch.equal(scene.ids(), ids)
    plain = PanopticMap.from_segments(ids, [70000], [0])
    assert plain.ids() is plain.segmentation
    with pytest.raises(ValueError, match=r"got torch.uint8 \[2, 2, 4\]"):
        PanopticMap.from_segments(torch.zeros(2, 2, 4, dtype=torch.uint8), [], [])
