"""Maps of COCO panoptic samples for the pictures of another data set."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
from PIL import Image

from collavo.cli import main
from collavo.cli.train_crayon import datasets
from collavo.panoptic import CocoPanopticDataset, PreparedDataset
from collavo.train import PictureMaps


@pytest.fixture(params=["PNGs", "prepared"])
def samples(request, coco_folder: Path, tmp_path: Path) -> CocoPanopticDataset | PreparedDataset:
    """Three samples of 16x12, 18x20 and 30x16 pixels: 001.png to 003.png."""
    parts = coco_folder / "images", coco_folder / "panoptic", coco_folder / "panoptic.json"
    if request.param == "PNGs":
        return CocoPanopticDataset(*parts)
    names = ("images", "panoptic", "annotations")
    words = [f"--{name}={path}" for name, path in zip(names, parts, strict=True)]
    assert main(["prepare", *words, f"--output={tmp_path / 'shards'}", "--no-progress"]) == 0
    return PreparedDataset(tmp_path / "shards", parts[0])


def picture(path: Path, size: tuple[int, int] = (16, 12)) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size).save(path)
    return path


def test_a_name_of_one_picture_alone(samples, tmp_path):
    paths = [picture(tmp_path / "vl" / name) for name in ("a/001.png", "a/1.png", "b/2002.png")]
    maps = PictureMaps(samples, paths)
    assert maps(paths[0]) is not None and maps(paths[1]) is None is maps(paths[2])
    assert maps(tmp_path / "elsewhere" / "001.png") is None  # not of the data set
    assert maps.summary() == f"1 of 3 pictures found a map in {maps.source}"
    assert PictureMaps(samples, [*paths, *paths]).summary() == maps.summary()


def test_two_pictures_of_a_name_are_named(samples, tmp_path):
    paths = [picture(tmp_path / "vl" / name / "001.png") for name in ("coco", "textvqa")]
    with pytest.raises(ValueError, match=r"'001\.png' .* two pictures, .*coco/001.* .*textvqa/001"):
        PictureMaps(samples, paths)
    maps = PictureMaps(samples, paths, folder=tmp_path / "vl" / "coco")
    assert maps(paths[0]) is not None and maps(paths[1]) is None
    assert maps.summary().startswith("1 of 2 pictures")


def test_the_samples_own_picture_goes_before(samples, coco_folder, tmp_path):
    """Two pictures have the name, and one of them is the very file that the map was drawn on."""
    own, other = coco_folder / "images" / "001.png", picture(tmp_path / "textvqa" / "001.png")
    link = tmp_path / "linked"
    link.symlink_to(coco_folder / "images")
    for path in (own, link / "001.png"):
        maps = PictureMaps(samples, [other, path])
        assert maps(path) is not None and maps(other) is None


def test_a_picture_of_another_size_is_named(samples, tmp_path):
    path = picture(tmp_path / "textvqa" / "001.png", (64, 20))
    with pytest.raises(ValueError, match=r"001\.png.*: the map is 16x12, its image .*textvqa/001"):
        PictureMaps(samples, [path])
    args = SimpleNamespace(vl_data=[tmp_path / "vl.json"], vl_images=tmp_path, vl_coco_images=None)
    turns = [{"from": "human", "value": "?"}, {"from": "gpt", "value": "!"}]
    record = {"image": "textvqa/001.png", "conversations": turns}
    args.vl_data[0].write_text(json.dumps([record]))
    training = SimpleNamespace(stage="cit", vl_probability=0.5, stream_seed=0, process_index=1)
    datasets(
        args, training, samples, 20, [].append
    )  # of several processes the first opens the pictures
    training.process_index = 0
    with pytest.raises(ValueError, match=r"001\.png.*: the map is 16x12"):
        datasets(args, training, samples, 20, [].append)
    path.write_text("no picture")  # is named when it is read
    assert PictureMaps(samples, [path])(path) is not None


def test_a_folder_describes_what_lies_at_the_listed_place_in_it(samples, tmp_path):
    """Not what lies deeper: that is another file of the same name."""
    paths = [picture(tmp_path / name / "001.png") for name in ("coco", "coco/other")]
    maps = PictureMaps(samples, paths, folder=tmp_path / "coco")
    assert maps(paths[0]) is not None and maps(paths[1]) is None
    with pytest.raises(ValueError, match=r"--vl-coco-images\): expected a folder of the pictures"):
        PictureMaps(samples, paths, folder=tmp_path / "cocoa")


def test_names_with_folders(coco_folder, tmp_path):
    """A JSON that lists ``val/001.png``: found where a path ends so, never in another split."""
    path = coco_folder / "panoptic.json"
    content = json.loads(path.read_text())
    content["images"][0]["file_name"] = "val/001.png"
    path.write_text(json.dumps(content))
    (coco_folder / "images" / "val").mkdir()
    (coco_folder / "images" / "001.png").rename(coco_folder / "images" / "val" / "001.png")
    samples = CocoPanopticDataset(coco_folder / "images", coco_folder / "panoptic", path)
    paths = [picture(tmp_path / split / "001.png") for split in ("val", "train")]
    for folder in (None, tmp_path, tmp_path / "val"):
        maps = PictureMaps(samples, paths, folder=folder)
        assert maps(paths[0]) is not None and maps(paths[1]) is None


def test_the_command_names_the_folder_and_says_how_many_were_found(samples, tmp_path, capsys):
    """``--vl-coco-images`` is a folder of ``--vl-images``; the other split has no map."""
    records = []
    for split in ("coco/train2017", "coco/val2017"):
        picture(tmp_path / "vl" / split / "001.png")
        turns = [{"from": "human", "value": "?"}, {"from": "gpt", "value": "!"}]
        records.append({"image": f"{split}/001.png", "conversations": turns})
    (tmp_path / "vl.json").write_text(json.dumps(records))
    training = SimpleNamespace(stage="cit", vl_probability=0.5, stream_seed=0, process_index=0)
    args = SimpleNamespace(vl_data=[tmp_path / "vl.json"], vl_images=tmp_path / "vl")
    args.vl_coco_images = Path("coco/train2017")
    _, data = datasets(args, training, samples, 20, [].append)
    assert [record["panoptic"][0] is not None for record in data] == [True, False]
    assert "1 of 2 pictures found a map in " in capsys.readouterr().out
    args.vl_coco_images = None
    with pytest.raises(ValueError, match=r"--vl-coco-images\)"):
        datasets(args, training, samples, 20, [].append)
    args.vl_coco_images, training.vl_probability = Path("coco"), 1.0
    with pytest.raises(ValueError, match="--vl-coco-images: expected with --coco-images"):
        datasets(args, training, None, 20, [].append)
