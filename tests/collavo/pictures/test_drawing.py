"""Pictures: every row has its colour, labels stay readable, odd maps do not break them."""

from __future__ import annotations

import re
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from collavo.cli import main
from collavo.panoptic import (
    PanopticMap,
    detections_from_map,
    draw_scene,
    format_box,
    parse_objects,
    save_scene,
)
from collavo.pictures.drawing import VIEWS
from collavo.pictures.labels import inner_points, place, touches
from collavo.pictures.palette import row_colours
from collavo_kernels import panoptic_lookup

SVG = "{http://www.w3.org/2000/svg}"


def panoptic_of(scene):
    ids, classes = scene
    return PanopticMap.from_segments(ids, list(classes), list(classes.values()))


def svg_of(path, *arguments, **options):
    save_scene(path, *arguments, **options)
    return ElementTree.fromstring(path.read_bytes())


def texts(svg):
    return [element.text for element in svg.iter(f"{SVG}text")]


def test_the_grid_panel_has_the_rows_colours(scene):
    """Cells of the drawn grid, read back from the picture, are the crayon's."""
    panoptic = panoptic_of(scene)
    picture = draw_scene(
        Image.new("RGB", (16, 12)), panoptic, grid=(3, 4), panel=240, panels=["grid"]
    )
    pixels = np.asarray(picture)
    crayon = panoptic_lookup(
        [panoptic.segmentation], [panoptic.segment_ids], [panoptic.segment_classes], grid=(3, 4)
    )
    colours = row_colours(crayon.row_class.tolist(), crayon.row_number.tolist()).tolist()
    # Cells are 60 x 60; the grid begins below a margin of 10 and a heading of 26.
    found = [
        [colours.index(pixels[36 + 60 * i + 8, 20 + 60 * j + 8].tolist()) for j in range(4)]
        for i in range(3)
    ]
    assert found == crayon.row_index.reshape(3, 4).tolist()


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
def test_odd_maps_are_drawn(panoptic, tmp_path):
    image = Image.new("L", (30, 20))
    picture = draw_scene(image, panoptic, grid=(35, 35), panel=240)
    assert picture.mode == "RGB" and picture.width >= 480
    svg = svg_of(tmp_path / "odd.svg", image, panoptic, grid=(35, 35), panel=240)
    assert (int(svg.get("width")), int(svg.get("height"))) == picture.size


@pytest.mark.parametrize(
    "size", [(3, 900), (900, 3), (1, 1), (90, 30)], ids=["thin", "flat", "one pixel", "low"]
)
@pytest.mark.parametrize("panels", [VIEWS, *([name] for name in VIEWS)])
def test_images_of_any_shape_give_panels_of_any_choice(scene, tmp_path, size, panels):
    image, panoptic = Image.new("RGB", size), panoptic_of(scene)
    options = {"grid": (35, 35), "panel": 240, "panels": panels, "title": "a long title " * 30}
    picture = draw_scene(image, panoptic, **options)
    svg = svg_of(tmp_path / "one.svg", image, panoptic, **options)
    assert (int(svg.get("width")), int(svg.get("height"))) == picture.size
    headings = {"overlay": "Segments", "boxes": "Boxes", "grid": "Crayon", "legend": "Rows of"}
    for name, heading in headings.items():
        assert any(text.startswith(heading) for text in texts(svg)) == (name in panels)


def test_pictures_are_deterministic(scene, tmp_path):
    image, panoptic = Image.new("RGB", (16, 12)), panoptic_of(scene)
    first = draw_scene(image, panoptic, panel=240)
    assert first.tobytes() == draw_scene(image, panoptic, panel=240).tobytes()
    for suffix in ("png", "svg"):
        one, two = tmp_path / f"one.{suffix}", tmp_path / f"two.{suffix}"
        save_scene(one, image, panoptic, panel=240)
        save_scene(two, image, panoptic, panel=240)
        assert one.read_bytes() == two.read_bytes()
    assert Image.open(tmp_path / "one.png").tobytes() == first.tobytes()


def test_the_panels_come_in_the_order_asked_for(scene, tmp_path):
    image, panels = Image.new("RGB", (16, 12)), ["grid", "overlay"]
    svg = svg_of(tmp_path / "a.svg", image, panoptic_of(scene), panel=240, panels=panels)
    assert [text[:6] for text in texts(svg) if text[:6] in ("Crayon", "Segmen")] == [
        "Crayon",
        "Segmen",
    ]


@settings(derandomize=True, deadline=None, max_examples=25)
@given(st.data())
def test_labels_and_boxes_are_the_texts_own(tmp_path_factory, data):
    """Legend, boxes and overlay name just what the model's text names, with its numbers."""
    shape = data.draw(st.tuples(st.integers(1, 8), st.integers(1, 8)))
    cells = st.integers(0, 6)
    ids = data.draw(st.lists(cells, min_size=shape[0] * shape[1], max_size=shape[0] * shape[1]))
    classes = data.draw(st.lists(st.sampled_from([0, 17, 119, 37]), min_size=6, max_size=6))
    segmentation = torch.tensor(ids, dtype=torch.int32).reshape(shape)
    panoptic = PanopticMap.from_segments(segmentation, range(1, 7), classes)
    max_number = data.draw(st.integers(0, 3))
    wanted = detections_from_map(panoptic, max_number=max_number)
    labels = sorted(f"#{one.number} {one.name}" for one in wanted)
    image = Image.new("RGB", (600, 500))
    path = tmp_path_factory.mktemp("svg") / "scene.svg"
    for panel in ("legend", "boxes", "overlay"):
        found = texts(svg_of(path, image, panoptic, max_number=max_number, panels=[panel]))
        if panel == "legend":
            rows = [found[i - 1 : i + 2] for i in range(len(found)) if found[i].startswith("#")]
            there = [row for row in rows if row[2].startswith("[")]
            assert sorted(f"{row[1]} {row[2]}" for row in there) == sorted(
                f"#{one.number} {one.name} {format_box(one.box)}" for one in wanted
            )
        else:
            assert sorted(text for text in found if text.startswith("#")) == labels


def test_an_svg_needs_nothing_else_and_keeps_text_as_text(scene, tmp_path):
    """No script, no style sheet, no address but embedded pictures; letters XML cannot hold go."""
    title = '<b> & "quoted" \x01 \ud800 \n.jpg'
    image = Image.effect_noise((320, 240), 60).convert("RGB")
    svg = svg_of(tmp_path / "a.svg", image, panoptic_of(scene), title=title, grid=(24, 24))
    tags = {element.tag.removeprefix(SVG) for element in svg.iter()}
    assert tags <= {"svg", "title", "g", "rect", "path", "line", "text", "image"}
    for element in svg.iter():
        for name, value in element.attrib.items():
            if "href" in name:
                assert re.fullmatch(r"data:image/(png|jpeg);base64,[A-Za-z0-9+/=]+", value)
            assert "url(" not in value and not name.startswith("on")
    assert '<b> & "quoted" ? ? ?.jpg' in texts(svg)
    assert svg.find(f"{SVG}title").text == '<b> & "quoted" ? ? ?.jpg'
    source = (tmp_path / "a.svg").read_text(encoding="utf-8")
    assert source.count("http") == 1, "only the namespace"
    # Photo, overlay and its borders are pixels, and nothing else is.
    assert sum(element.tag == f"{SVG}image" for element in svg.iter()) == 3


def test_a_photo_makes_no_large_svg(tmp_path):
    """Noise is the worst that a camera can deliver."""
    noise = np.random.default_rng(0).integers(0, 256, (427, 640, 3), dtype=np.uint8)
    ids = torch.arange(60).reshape(6, 10).repeat_interleave(71, 0).repeat_interleave(64, 1) + 1
    panoptic = PanopticMap.from_segments(ids[:427], range(1, 61), [0] * 60)
    svg_of(tmp_path / "a.svg", Image.fromarray(noise), panoptic, grid=(35, 35))
    assert (tmp_path / "a.svg").stat().st_size < 1_500_000


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"panel": 30}, "panel: expected at least 240 pixels, got 30"),
        ({"panels": []}, r"panels: expected some of \['overlay', .*, each once, got \[\]"),
        ({"panels": ["grid", "grid"]}, "each once, got \\['grid', 'grid'\\]"),
        ({"panels": ["mesh"]}, "each once, got \\['mesh'\\]"),
        ({"panels": "grid"}, "each once, got 'grid'"),
        ({"grid": (0, 3)}, "grid"),
        ({"max_number": -1}, "max_number"),
    ],
)
def test_bad_arguments_are_named(scene, tmp_path, options, message):
    image, panoptic = Image.new("RGB", (16, 12)), panoptic_of(scene)
    with pytest.raises(ValueError, match=message):
        draw_scene(image, panoptic, **options)
    with pytest.raises(ValueError, match=message):
        save_scene(tmp_path / "a.svg", image, panoptic, **options)
    assert not (tmp_path / "a.svg").exists()


def test_bad_files_and_images_are_named(scene, tmp_path):
    image, panoptic = Image.new("RGB", (16, 12)), panoptic_of(scene)
    for name in ("a.jpg", "a", "png"):
        with pytest.raises(ValueError, match=r"expected a file name ending in .png or .svg, got"):
            save_scene(tmp_path / name, image, panoptic)
    with pytest.raises(FileNotFoundError, match=r"there is no folder .*nowhere"):
        save_scene(tmp_path / "nowhere" / "a.png", image, panoptic)
    with pytest.raises(ValueError, match="image: expected at least one pixel, got 0 x 5"):
        draw_scene(Image.new("RGB", (0, 5)), panoptic)
    save_scene(str(tmp_path / "A.PNG"), image, panoptic, panel=240)
    assert Image.open(tmp_path / "A.PNG").format == "PNG"


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
        assert where is not None
        assert not any(touches(where, other) for other in taken)
        assert where[0] >= 0 and where[2] <= 60 and where[1] >= 0 and where[3] <= 40
        taken.append(where)
    # No room: all is taken, the label is wider than the sheet, the free place is out of reach.
    assert place((30.0, 20.0), (20.0, 8.0), (0.0, 0.0, 60.0, 40.0), [(0, 0, 60, 40)]) is None
    assert place((30.0, 20.0), (61.0, 8.0), (0.0, 0.0, 60.0, 40.0), []) is None
    assert place((0.0, 0.0), (10.0, 4.0), (0.0, 0.0, 99.0, 4.0), [(0, 0, 30, 9)], 1) is None
    assert place((0.0, 0.0), (10.0, 4.0), (0.0, 0.0, 99.0, 4.0), [(0, 0, 30, 9)]) is not None


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


def test_show_writes_the_grid_alone_as_vectors(coco_folder, tmp_path, capsys):
    output = tmp_path / "grid.svg"
    options = ("--grid", "35", "--panels", "grid", "--panel-size", "1600")
    assert show(coco_folder, *options, "--output", str(output)) == 0
    svg = ElementTree.fromstring(output.read_bytes())
    assert int(svg.get("width")) == 1640 and svg.find(f".//{SVG}image") is None
    assert {"#1 horse", "#2 horse", "#1 person", "#1 sky", "#1 grass"} <= set(texts(svg))
    assert f"saved {output}" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("name", "extra", "message"),
    [
        ("004", (), "images/004.png: there is no such image"),
        ("001", ("--grid", "0"), "--grid: expected one or two sizes of at least 1"),
        ("001", ("--max-number", "-1"), "--max-number: expected at least 0"),
        ("001", ("--output", "a.gif"), "a.gif: expected a file name ending in .png or .svg"),
        ("001", ("--panels", "mesh"), "panels: expected some of ['overlay', 'boxes', 'grid',"),
        ("001", ("--panel-size", "10"), "panel: expected at least 240 pixels, got 10"),
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


def test_show_draws_a_whole_sample(coco_sample, tmp_path):
    output = tmp_path / "picture.png"
    status = main(
        [
            "show", "--image", str(coco_sample.image), "--panoptic", str(coco_sample.png),
            "--annotations", str(coco_sample.annotations), "--output", str(output),
        ]
    )  # fmt: skip
    width, height = Image.open(output).size
    assert status == 0 and height == 1140
    # The drawn sample's 29 rows take a second column of the legend, which sticks out.
    assert (width == 1580) if len(coco_sample.segments()) < 20 else (width > 1580)
