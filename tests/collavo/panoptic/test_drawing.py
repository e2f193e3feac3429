"""Pictures: every row has its colour, labels stay readable, odd maps do not break them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from collavo.cli import main
from collavo.panoptic import PanopticMap, parse_objects
from collavo.panoptic.drawing import draw_scene
from collavo.panoptic.labels import inner_points, place, touches
from collavo.panoptic.palette import row_colours


def panoptic_of(scene):
    ids, classes = scene
    return PanopticMap.from_segments(ids, list(classes), list(classes.values()))


def test_the_grid_panel_has_the_rows_colours(scene):
    """Cells of the drawn grid, read back from the picture, are the crayon's."""
    picture = draw_scene(Image.new("RGB", (16, 12)), panoptic_of(scene), grid=(3, 4), panel=240)
    pixels = np.asarray(picture)
    # Row, class: 0 unknown, 1 and 2 horse, 3 person, 4 sky, 5 grass.
    colours = row_colours([0, 18, 18, 1, 120, 126], [0, 1, 2, 1, 1, 1])
    top = 8 + 180 + 26 + 20 + 26  # head, first panel, its heading, margin, second heading
    expected = [[1, 1, 4, 4], [1, 3, 2, 2], [5, 5, 2, 2]]
    found = [
        [pixels[top + 60 * i + 8, 20 + 60 * j + 8].tolist() for j in range(4)] for i in range(3)
    ]
    for i in range(3):
        for j in range(4):
            assert found[i][j] in colours.tolist(), (i, j)
    rows = [[colours.tolist().index(cell) for cell in line] for line in found]
    assert rows[2][:2] == expected[2][:2] and rows[0][2] == 4 and rows[0][0] in (1, 4)


@pytest.mark.parametrize(
    "panoptic",
    [
        PanopticMap.empty(5, 9),
        PanopticMap.from_segments(torch.ones(1, 1, dtype=torch.int32), [1], [0]),
        PanopticMap.from_segments(torch.zeros(4, 4, dtype=torch.int32), [3], [-1]),
        PanopticMap.from_segments(torch.arange(1, 901).reshape(30, 30), range(1, 901), [0] * 900),
    ],
    ids=["no segment", "one pixel", "absent and unknown class", "900 segments"],
)
def test_odd_maps_are_drawn(panoptic):
    picture = draw_scene(Image.new("L", (30, 20)), panoptic, grid=(35, 35), panel=240)
    assert picture.mode == "RGB" and picture.width >= 480


def test_pictures_are_deterministic(scene):
    image, panoptic = Image.new("RGB", (16, 12)), panoptic_of(scene)
    first = draw_scene(image, panoptic, panel=240)
    assert first.tobytes() == draw_scene(image, panoptic, panel=240).tobytes()


def test_small_panels_are_refused(scene):
    with pytest.raises(ValueError, match="panel: expected at least 240 pixels, got 30"):
        draw_scene(Image.new("RGB", (16, 12)), panoptic_of(scene), panel=30)


def test_first_instances_and_classes_differ():
    """Fourteen classes, and six instances of one, have colours of their own; unknown is grey."""
    classes = row_colours([0, *range(1, 15)], [0, *[1] * 14])
    assert len({tuple(colour) for colour in classes.tolist()}) == 15
    assert len({tuple(c) for c in row_colours([5] * 18, range(1, 19)).tolist()}) == 18


def test_labels_stand_in_their_segment_and_apart():
    rows = np.zeros((40, 60), dtype=np.int32)
    rows[5:15, 5:25] = 1
    rows[20, 3] = 2
    points = inner_points(rows, 4)
    assert points[3] is None
    for row in (0, 1, 2):
        x, y = points[row]
        assert rows[int(y * 40), int(x * 60)] == row
    taken = []
    for _ in range(6):
        where = place((30.0, 20.0), (20.0, 8.0), (0.0, 0.0, 60.0, 40.0), taken)
        assert not any(touches(where, other) for other in taken)
        assert where[0] >= 0 and where[2] <= 60 and where[1] >= 0 and where[3] <= 40
        taken.append(where)


def show(folder, *extra, name="001"):
    return main(
        [
            "show", "--image", str(folder / "images" / f"{name}.png"),
            "--panoptic", str(folder / "panoptic" / f"{name}.png"),
            "--annotations", str(folder / "panoptic.json"), *extra,
        ]
    )  # fmt: skip


def test_show_writes_the_picture_and_prints_the_text(coco_folder, tmp_path, capsys):
    output = tmp_path / "picture.png"
    assert show(coco_folder, "--grid", "6", "8", "--output", str(output)) == 0
    assert Image.open(output).width > 1500
    text = capsys.readouterr().out.splitlines()[0]
    assert [one.name for one in parse_objects(text)] == ["horse", "horse", "person", "sky", "grass"]


@pytest.mark.parametrize(
    ("name", "extra", "message"),
    [
        ("004", (), "images/004.png: there is no such image"),
        ("001", ("--grid", "0"), "--grid: expected one or two sizes of at least 1"),
        ("001", ("--max-number", "-1"), "--max-number: expected at least 0"),
    ],
)
def test_show_names_mistakes(coco_folder, capsys, name, extra, message):
    assert show(coco_folder, *extra, name=name) == 2
    assert message in capsys.readouterr().err


def test_show_names_a_map_of_another_image(coco_folder, tmp_path, capsys):
    output = tmp_path / "picture.png"
    (coco_folder / "panoptic" / "003.png").replace(coco_folder / "panoptic" / "001.png")
    assert show(coco_folder, "--output", str(output)) == 2
    assert "the map is 30x16, its image" in capsys.readouterr().err
    (coco_folder / "panoptic" / "001.png").rename(coco_folder / "panoptic" / "007.png")
    (coco_folder / "images" / "001.png").rename(coco_folder / "images" / "007.png")
    assert show(coco_folder, "--output", str(output), name="007") == 2
    assert "expected an annotation with file_name '007.png'" in capsys.readouterr().err
    assert not output.exists()


def test_show_draws_the_real_sample(coco_sample, tmp_path):
    output = tmp_path / "picture.png"
    status = main(
        [
            "show", "--image", str(coco_sample / "images" / "000000142238.jpg"),
            "--panoptic", str(coco_sample / "panoptic" / "000000142238.png"),
            "--annotations", str(coco_sample / "panoptic.json"), "--output", str(output),
        ]
    )  # fmt: skip
    assert status == 0 and Image.open(output).size == (1580, 1140)
