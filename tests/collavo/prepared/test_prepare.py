"""``prepare_folder``: what is written, in which bytes, after what was broken off or is broken."""

from __future__ import annotations

import json
import subprocess
import sys
import weakref
from pathlib import Path

import pytest
import torch
from bad_files import BAD_MAPS, break_map
from PIL import Image

from collavo.panoptic import (
    CocoPanopticDataset,
    PreparedDataset,
    PrepareSettings,
    Skipped,
    build_instructions,
    detections_from_map,
    parse_instruction,
    prepare_folder,
    write_panoptic_png,
)
from collavo.panoptic.coco_index import CocoFolder, CocoIndex
from collavo.prepared import shards
from collavo.prepared import write as prepare
from collavo_kernels import panoptic_lookup

SMALL = PrepareSettings(grid=(3, 4), images_per_shard=2)
FIELDS = (
    "row_index", "row_class", "row_number", "row_image", "row_segment_id", "row_box", "row_area",
)  # fmt: skip


def parts(folder):
    return CocoFolder(folder / "images", folder / "panoptic", folder / "panoptic.json")


def edit(folder, change):
    path = folder / "panoptic.json"
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def contents(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def test_shards_hold_what_the_pngs_say(coco_folder, coco_dataset, tmp_path):
    """Crayons are the lookup's, bit for bit; instructions are all that can be built of them."""
    report = prepare_folder(parts(coco_folder), tmp_path / "out", SMALL)
    assert (report.images, report.shards, report.resumed, report.skipped) == (3, 2, 0, ())
    data = PreparedDataset(tmp_path / "out", coco_folder / "images")
    assert len(data) == 3 and data.settings == SMALL
    for index, sample in enumerate(coco_dataset):
        panoptic = sample.panoptic
        expected = panoptic_lookup(
            [panoptic.segmentation], [panoptic.segment_ids], [panoptic.segment_classes], grid=(3, 4)
        )
        prepared = data[index]
        for name in FIELDS:
            one, other = getattr(prepared.crayon, name), getattr(expected, name)
            assert one.dtype == other.dtype and torch.equal(one, other), name
        assert (prepared.image_id, prepared.path) == (sample.image_id, sample.path)
        assert prepared.size == panoptic.size
        assert list(
            prepared.image().get_flattened_data()
            if hasattr(Image.Image, "get_flattened_data")
            else prepared.image().getdata()
        ) == list(
            sample.image.get_flattened_data()
            if hasattr(Image.Image, "get_flattened_data")
            else sample.image.getdata()
        )
        assert list(prepared.instructions) == build_instructions(detections_from_map(panoptic))
        for one in prepared.instructions:
            assert parse_instruction(one.question, one.answer).template == one.template
    assert report.instructions == sum(len(one.instructions) for one in data)


def test_bytes_depend_on_inputs_and_settings_alone(coco_folder, tmp_path, monkeypatch):
    """Neither the threads, nor how maps are grouped for a lookup, nor where the folders lie."""
    break_map(coco_folder / "panoptic" / "002.png", "truncated")
    prepare_folder(parts(coco_folder), tmp_path / "one", SMALL)
    monkeypatch.setattr(prepare, "_CHUNK", 1)
    prepare_folder(parts(coco_folder), tmp_path / "three", SMALL, workers=3)
    moved = coco_folder.rename(tmp_path / "elsewhere")
    monkeypatch.chdir(moved)
    prepare_folder(parts(Path()), tmp_path / "moved", SMALL, workers=2)
    one = contents(tmp_path / "one")
    assert sorted(one) == [
        "prepared.json", "prepared.lock", "shard-00000.jsonl", "shard-00000.safetensors",
        "shard-00001.jsonl", "shard-00001.safetensors", "skipped.jsonl",
    ]  # fmt: skip
    assert contents(tmp_path / "three") == one and contents(tmp_path / "moved") == one


def test_killed_runs_go_on_with_nothing_lost_or_doubled(coco_folder, tmp_path):
    """SIGKILL before and after every rename there is; one skipped map must not be forgotten."""
    break_map(coco_folder / "panoptic" / "001.png", "RGBA")
    whole = tmp_path / "whole"
    settings = PrepareSettings(grid=(3, 4), images_per_shard=1)
    prepare_folder(parts(coco_folder), whole, settings)
    script = Path(__file__).with_name("broken_off_runs.py")
    command = [sys.executable, str(script), str(coco_folder), str(tmp_path / "out")]
    (tmp_path / "out").mkdir()
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)
    # The settings' file twice, two files for each of three shards, the report.
    assert int(done.stdout) == 2 * 9
    for run in sorted((tmp_path / "out").iterdir()):
        found = contents(run)
        assert {name for name in found if name.endswith(".tmp")} == set()
        assert found == contents(whole), run.name


def test_a_later_run_makes_only_what_is_missing(coco_folder, tmp_path, monkeypatch):
    report = prepare_folder(parts(coco_folder), tmp_path / "out", SMALL)
    whole = contents(tmp_path / "out")
    (tmp_path / "out" / "shard-00001.safetensors").write_bytes(b"damaged")
    read = []
    real = prepare.read_panoptic_colours
    monkeypatch.setattr(
        prepare, "read_panoptic_colours", lambda path: (read.append(path.name), real(path))[1]
    )
    again = prepare_folder(parts(coco_folder), tmp_path / "out", SMALL)
    assert read == ["003.png"] and again.resumed == 1 and again.images == report.images
    assert contents(tmp_path / "out") == whole


def test_everything_wrong_is_skipped_and_named_and_the_rest_is_done(coco_folder, tmp_path):
    """A bad entry, a map of another kind, a missing image; the report survives a second run."""
    edit(coco_folder, lambda c: c["images"].append({"id": 9, "file_name": "009.png"}))
    break_map(coco_folder / "panoptic" / "001.png", "P")
    (coco_folder / "images" / "003.png").unlink()
    expected = (
        Skipped("009.png", "image 9 (009.png) has no annotation"),
        Skipped(
            "panoptic/001.png",
            "expected an 8-bit RGB PNG (id = R + 256 G + 65536 B), got 1-bit paletted",
        ),
        Skipped("images/003.png", "there is no such image"),
    )
    for resumed in (0, 2):
        report = prepare_folder(parts(coco_folder), tmp_path / "out", SMALL)
        assert report.skipped == expected and report.resumed == resumed and report.images == 1
    lines = (tmp_path / "out" / "skipped.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == [
        {"file": one.name, "reason": one.reason} for one in expected
    ]
    assert "3 skipped, listed in" in report.summary()
    assert "1 x there is no such image (images/003.png)" in report.summary()
    data = PreparedDataset(tmp_path / "out")
    assert [one.image_id for one in data] == [2] and data.index_of("002.png") == 0


@pytest.mark.parametrize("kind", BAD_MAPS)
def test_a_map_that_cannot_be_used_is_skipped(coco_folder, tmp_path, kind):
    torch.manual_seed(0)
    break_map(coco_folder / "panoptic" / "001.png", kind)
    report = prepare_folder(parts(coco_folder), tmp_path / "out", SMALL, workers=2)
    (skipped,) = report.skipped
    assert skipped.name == "panoptic/001.png"
    assert report.images == 2
    assert str(tmp_path) not in skipped.reason


def test_a_map_beyond_the_lookups_limit_is_skipped_with_its_image(coco_folder, tmp_path):
    """Its image fits it, so that the lookup itself would be the first to refuse."""
    break_map(coco_folder / "panoptic" / "001.png", "too wide")
    Image.new("RGB", (33000, 2)).save(coco_folder / "images" / "001.png")
    report = prepare_folder(parts(coco_folder), tmp_path / "out", SMALL)
    reason = "expected a map of at most 32767 pixels per side, got 33000x2"
    assert report.skipped == (Skipped("panoptic/001.png", reason),) and report.images == 2


def test_images_are_decoded_where_that_is_asked_for(coco_folder, tmp_path):
    """A cut image still has its header: by default training is where it is found."""
    path = coco_folder / "images" / "002.png"
    path.write_bytes(path.read_bytes()[:200])
    assert not prepare_folder(parts(coco_folder), tmp_path / "quick", SMALL).skipped
    with pytest.raises(ValueError, match=r"images/002\.png: the image is unreadable or truncated"):
        PreparedDataset(tmp_path / "quick", coco_folder / "images")[1].image()
    thorough = PrepareSettings(grid=(3, 4), verify_images=True)
    (skipped,) = prepare_folder(parts(coco_folder), tmp_path / "thorough", thorough).skipped
    assert skipped.name == "images/002.png" and "unreadable or truncated" in skipped.reason


def test_images_without_objects_are_kept_without_instructions(coco_folder, tmp_path):
    """Their crayon is all unknown, which is no fault; there is only nothing to ask about."""
    write_panoptic_png(coco_folder / "panoptic" / "002.png", torch.zeros(20, 18, dtype=torch.int32))
    report = prepare_folder(parts(coco_folder), tmp_path / "out", SMALL)
    assert (report.images, report.without_objects, report.skipped) == (3, 1, ())
    assert "1 images show no object" in report.summary()
    data = PreparedDataset(tmp_path / "out")
    assert [data.num_segments(i) for i in range(3)] == [5, 0, 5]
    assert data[1].instructions == () and data[1].crayon.num_rows == 6


def test_thousands_of_segments(coco_folder, tmp_path):
    ids = torch.arange(1, 5001, dtype=torch.int32).reshape(50, 100)
    write_panoptic_png(coco_folder / "panoptic" / "001.png", ids)
    Image.new("RGB", (100, 50)).save(coco_folder / "images" / "001.png")
    infos = [{"id": i, "category_id": 1 + i % 2} for i in range(1, 5001)]
    edit(coco_folder, lambda c: c["annotations"][0].update(segments_info=infos))
    assert not prepare_folder(parts(coco_folder), tmp_path / "out", SMALL).skipped
    data = PreparedDataset(tmp_path / "out")
    assert data.num_segments(0) == 5000 and data[0].crayon.num_rows == 5001
    assert int(data[0].crayon.row_number.max()) == 20
    assert torch.equal(data[1].crayon.row_segment_id[1:], torch.tensor([12, 256, 300, 900, 70000]))


def test_other_settings_or_inputs_are_refused(coco_folder, tmp_path):
    out = tmp_path / "out"
    prepare_folder(parts(coco_folder), out, SMALL)
    whole = contents(out)
    other = PrepareSettings(grid=(4, 4), images_per_shard=2, max_number=5)
    message = (
        r"another grid \(\[3, 4\] there, \[4, 4\] now\), max_number \(20 there, 5 now\); name "
        "another folder, or --overwrite"
    )
    with pytest.raises(ValueError, match=message):
        prepare_folder(parts(coco_folder), out, other)
    assert contents(out) == whole
    edit(coco_folder, lambda c: c.update(info="another file"))
    with pytest.raises(ValueError, match="another annotations_sha256"):
        prepare_folder(parts(coco_folder), out, SMALL)
    report = prepare_folder(parts(coco_folder), out, other, overwrite=True)
    assert report.resumed == 0 and PreparedDataset(out).settings == other


def test_folders_of_others_are_left_alone(coco_folder, tmp_path):
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "a.jpg").write_bytes(b"mine")
    for overwrite in (False, True):
        with pytest.raises(ValueError, match=r"photos: expected a new or empty folder.*'a\.jpg'"):
            prepare_folder(parts(coco_folder), tmp_path / "photos", SMALL, overwrite=overwrite)
    assert contents(tmp_path / "photos") == {"a.jpg": b"mine"}
    with pytest.raises(FileExistsError):
        prepare_folder(parts(coco_folder), tmp_path / "photos" / "a.jpg", SMALL)


def test_overwriting_removes_what_a_run_has_written_and_no_more(coco_folder, tmp_path):
    """Files whose names are nearly a shard's, and folders, are somebody else's."""
    prepare_folder(parts(coco_folder), tmp_path / "out", SMALL)
    mine = {"shard-a.jsonl": b"1", "shard-00001.jsonl.old": b"2", "notes.tmp": b"3"}
    for name, content in mine.items():
        (tmp_path / "out" / name).write_bytes(content)
    (tmp_path / "out" / "shard-00099.jsonl").mkdir()
    left = tmp_path / "out" / f".collavo-{'0' * 16}.tmp"
    left.write_bytes(b"by a run that was killed")
    prepare_folder(parts(coco_folder), tmp_path / "out", SMALL, overwrite=True)
    assert not left.exists()
    (tmp_path / "out" / "shard-00099.jsonl").rmdir()
    found = contents(tmp_path / "out")
    assert {name: found[name] for name in mine} == mine


@pytest.mark.parametrize("manifest", [None, b"{}", b"of somebody else"])
def test_overwriting_leaves_a_folder_that_no_run_made(coco_folder, tmp_path, manifest):
    (tmp_path / "mine").mkdir()
    names = ["shard-00000.jsonl", "shard-a.jsonl", "notes.tmp", "skipped.jsonl"]
    files = {name: b"mine" for name in names} | ({"prepared.json": manifest} if manifest else {})
    for name, content in files.items():
        (tmp_path / "mine" / name).write_bytes(content)
    with pytest.raises(ValueError, match="mine"):
        prepare_folder(parts(coco_folder), tmp_path / "mine", SMALL, overwrite=True)
    assert contents(tmp_path / "mine") == files


def test_a_second_run_on_one_folder_is_refused(coco_folder, tmp_path):
    """Both would write, and rename, temporary files of the same names."""
    out = tmp_path / "out"
    out.mkdir()
    with (
        shards.lock_folder(out),
        pytest.raises(ValueError, match=r"out: another run of collavo prepare writes to it"),
    ):
        prepare_folder(parts(coco_folder), out, SMALL)
    assert prepare_folder(parts(coco_folder), out, SMALL).images == 3


def test_nothing_prepared_is_an_error_with_a_report(coco_folder, tmp_path):
    for path in (coco_folder / "panoptic").iterdir():
        path.write_bytes(b"")
    with pytest.raises(ValueError, match=r"not one image could be prepared; skipped\.jsonl"):
        prepare_folder(parts(coco_folder), tmp_path / "out", SMALL)
    assert len((tmp_path / "out" / "skipped.jsonl").read_text().splitlines()) == 3
    with pytest.raises(ValueError, match=r"prepared\.json: preparing was not finished"):
        PreparedDataset(tmp_path / "out")


def test_a_limit_takes_the_first(coco_folder, tmp_path):
    report = prepare_folder(
        parts(coco_folder), tmp_path / "out", PrepareSettings(grid=(3, 4), limit=2)
    )
    assert report.images == 2 and [one.image_id for one in PreparedDataset(tmp_path / "out")] == [
        1,
        2,
    ]


def test_faults_beyond_the_limit_are_none(coco_folder, tmp_path):
    """A bad image, a bad annotation and one without an image come later; one bad image is first."""

    def spoil(content):
        images, annotations = content["images"], content["annotations"]
        images.insert(0, {"id": 9, "file_name": "009.png"})
        annotations += [
            {**annotations[0]},
            {**annotations[2]},
            {},
            {**annotations[1], "image_id": 77},
        ]
        images.append({"id": 10, "file_name": "010.png"})

    edit(coco_folder, spoil)
    settings = PrepareSettings(grid=(3, 4), limit=2)
    report = prepare_folder(parts(coco_folder), tmp_path / "out", settings)
    assert report.images == 2
    assert [one.name for one in report.skipped] == ["annotations[3]", "009.png"]
    whole = prepare_folder(parts(coco_folder), tmp_path / "all", PrepareSettings(grid=(3, 4)))
    assert whole.images == 3 and len(whole.skipped) == 6


def test_one_template_alone(coco_folder, tmp_path):
    settings = PrepareSettings(grid=(3, 4), templates=("names",))
    prepare_folder(parts(coco_folder), tmp_path / "out", settings)
    (instruction,) = PreparedDataset(tmp_path / "out")[0].instructions
    assert instruction.template == "names"


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"grid": (0, 4)}, r"grid: expected a positive height and width, got \(0, 4\)"),
        ({"reduce": "mean"}, "reduce: expected majority or nearest, got 'mean'"),
        ({"templates": ("colours",)}, "templates: expected some of names, boxes, class"),
        ({"max_number": -1}, "max_number: expected at least 0, got -1"),
        ({"images_per_shard": 0}, "images_per_shard: expected at least 1, got 0"),
        ({"limit": 0}, "limit: expected at least 1, got 0"),
        ({"grid": (40000, 1)}, r"grid: expected at most 32767 cells per side, got \(40000, 1\)"),
        ({"max_number": 2**31}, "max_number: expected at most 2147483647, got 2147483648"),
    ],
)
def test_settings_out_of_range(setting, message):
    with pytest.raises(ValueError, match=message):
        PrepareSettings(**setting)


def test_missing_inputs_are_named_before_anything_is_written(coco_folder, tmp_path):
    out = tmp_path / "out"
    with pytest.raises(ValueError, match="workers: expected at least 1, got 0"):
        prepare_folder(parts(coco_folder), out, workers=0)
    with pytest.raises(FileNotFoundError, match=r"images: there is no folder .*nowhere"):
        prepare_folder(parts(coco_folder)._replace(images=tmp_path / "nowhere"), out)
    with pytest.raises(FileNotFoundError, match=r"none\.json: there is no such file"):
        prepare_folder(parts(coco_folder)._replace(annotations=tmp_path / "none.json"), out)
    assert not out.exists()


def test_every_objects_text_comes_back_from_the_shard(coco_sample, tmp_path):
    """A whole sample as COCO has them: large, crowded, a JPEG whose map is a PNG."""
    folder = parts(coco_sample.folder)
    assert not prepare_folder(folder, tmp_path / "out").skipped
    (sample,) = PreparedDataset(tmp_path / "out", folder.images)
    panoptic = CocoPanopticDataset(*folder).panoptic_map(0)
    assert list(sample.instructions) == build_instructions(detections_from_map(panoptic))
    assert sample.image().size == (640, 427)


def test_a_maps_pixels_are_counted_from_its_first_bytes(coco_folder):
    """Pillow walks all of a PNG's chunks, in the thread that hands the work out."""
    folder = parts(coco_folder)
    index = CocoIndex.read(folder.annotations)
    path = folder.panoptic / index.records[0].png
    path.write_bytes(path.read_bytes()[:26])
    assert prepare._Builder(folder, index, SMALL).pixels(index.records[0]) == 12 * 16


def test_pixels_in_flight_are_bounded(coco_folder, tmp_path, monkeypatch):
    """Sixty maps of 4000x4000 took 2 GB: what waits is counted in pixels, not in maps."""
    prepare_folder(parts(coco_folder), tmp_path / "one", SMALL)
    decoded, looked_up, alive = prepare._Builder.decode, prepare._Builder.look_up, []
    most = 0

    def decode(self, record):
        nonlocal most
        colours = decoded(self, record)
        alive.append(weakref.ref(colours))
        held = [one for one in (each() for each in alive) if one is not None]
        most = max(most, sum(one.numel() // 3 for one in held))
        return colours

    def look_up(self, chunk):
        assert len(chunk) == 1
        return looked_up(self, chunk)

    monkeypatch.setattr(prepare, "_PIXELS", 150)  # the maps have 192, 360 and 480
    monkeypatch.setattr(prepare._Builder, "decode", decode)
    monkeypatch.setattr(prepare._Builder, "look_up", look_up)
    settings = PrepareSettings(grid=(3, 4), images_per_shard=3)
    prepare_folder(parts(coco_folder), tmp_path / "many", settings, workers=3)
    assert len(alive) == 3 and most <= 360 + 480  # one in the lookup, one that waits
    monkeypatch.undo()
    again = prepare_folder(parts(coco_folder), tmp_path / "whole", settings)
    assert again.images == 3 and contents(tmp_path / "many") == contents(tmp_path / "whole")
