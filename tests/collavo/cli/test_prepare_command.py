"""``collavo prepare``: exit statuses, the summary, and options that contradict each other."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from collavo.cli import main
from collavo.panoptic import PreparedDataset, PrepareSettings
from collavo.prepared import write as prepare


@pytest.fixture
def words(coco_folder: Path, tmp_path: Path) -> list[str]:
    options = {
        "--images": coco_folder / "images",
        "--panoptic": coco_folder / "panoptic",
        "--annotations": coco_folder / "panoptic.json",
        "--output": tmp_path / "out",
    }
    return ["prepare", "--no-progress", *(str(word) for pair in options.items() for word in pair)]


def test_all_prepared_is_status_0(
    words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = "--grid 3 4 --reduce nearest --max-number 5 --templates boxes --workers 2"
    assert main([*words, *options.split(), "--num-images-per-shard", "2"]) == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    assert "3 images, 3 instructions, 2 shards (0 of an earlier run)" in captured.out
    assert PreparedDataset(tmp_path / "out").settings == PrepareSettings(
        grid=(3, 4), reduce="nearest", max_number=5, templates=("boxes",), images_per_shard=2
    )


def test_something_skipped_is_status_3_in_later_runs_too(
    words: list[str], coco_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (coco_folder / "panoptic" / "002.png").write_bytes(b"")
    for resumed in (0, 1):
        assert main(words) == 3
        out = capsys.readouterr().out
        assert f"2 images, 12 instructions, 1 shards ({resumed} of an earlier run)" in out
        assert "1 skipped, listed in" in out and "(panoptic/002.png)" in out
    assert len(PreparedDataset(tmp_path / "out")) == 2


def test_cocos_own_layout(coco_folder: Path, tmp_path: Path) -> None:
    root = tmp_path / "root"
    (root / "annotations").mkdir(parents=True)
    (coco_folder / "panoptic.json").rename(root / "annotations" / "panoptic_train2017.json")
    (coco_folder / "panoptic").rename(root / "annotations" / "panoptic_train2017")
    (coco_folder / "images").rename(root / "train2017")
    words = ["prepare", "--root", str(root), "--output", str(tmp_path / "out"), "--no-progress"]
    assert main([*words, "--split", "train2017"]) == 0
    assert len(PreparedDataset(tmp_path / "out", root / "train2017")) == 3
    assert main([*words, "--split", "val2017"]) == 2


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["--grid", "3", "4", "5"], "--grid: expected one or two sizes, got [3, 4, 5]"),
        (["--grid", "0"], "grid: expected a positive height and width"),
        (["--grid", "40000", "1"], "grid: expected at most 32767 cells per side"),
        (["--max-number", "9" * 20], "max_number: expected at most 2147483647"),
        (["--root", "."], "--images: expected without --root, got both"),
        (["--workers", "0"], "workers: expected at least 1, got 0"),
        (["--num-images-per-shard", "0"], "images_per_shard: expected at least 1, got 0"),
        (["--annotations", "none.json"], "none.json: there is no such file"),
    ],
)
def test_mistakes_are_status_2_and_nothing_is_written(
    words: list[str],
    changes: list[str],
    message: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main([*words, *changes]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_the_input_has_three_parts(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    start = words.index("--panoptic")
    assert main(words[:start] + words[start + 2 :]) == 2
    assert "--panoptic: expected with --images" in capsys.readouterr().err


def test_other_settings_need_overwrite(
    words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(words) == 0
    assert main([*words, "--grid", "4"]) == 2
    assert "another grid ([35, 35] there, [4, 4] now)" in capsys.readouterr().err
    assert main([*words, "--grid", "4", "--overwrite"]) == 0
    assert PreparedDataset(tmp_path / "out").settings.grid == (4, 4)


def test_progress_is_shown_unless_it_is_not_wanted(
    words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    words.remove("--no-progress")
    assert main(words) == 0
    assert "3/3" in capsys.readouterr().err


def test_ctrl_c_is_one_line_and_status_130(
    words: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupt(*args: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(prepare, "write_shard", interrupt)
    assert main(words) == 130
    err = capsys.readouterr().err
    assert err == "collavo prepare: interrupted; run it again to go on where it stopped\n"
    monkeypatch.undo()
    assert main(words) == 0


def test_names_that_no_encoding_has_are_printed(
    words: list[str], coco_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = coco_folder / "panoptic.json"
    content = json.loads(path.read_text())
    content["images"][0]["file_name"] = "\ud800.png"
    path.write_text(json.dumps(content))
    assert main(words) == 3
    assert "\\ud800.png" in capsys.readouterr().out
