"""LLaVA's pixels to the last bit and its sizes, as recorded; shortcuts that change no bit."""

from __future__ import annotations

import json
import lzma
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from safetensors.torch import load
from torch import Tensor
from transformers import AutoImageProcessor

from collavo import CollavoProcessor
from collavo.processing import make_image_processor
from collavo.processing.geometry import square
from collavo.processing.pixels import CropImageProcessor, PadImageProcessor, from_pillow
from tests.collavo.processing.tiny_llavas import llava_next

GOLDEN = Path(__file__).parents[2] / "data" / "golden" / "llava"
SIZES = ["20x33", "28x28", "30x40", "33x20", "40x30", "61x17", "7x5", "90x28"]
FILTERS = list(Image.Resampling)


@cache
def recorded() -> dict[str, Tensor]:
    return load(lzma.decompress((GOLDEN / "pixels.safetensors.xz").read_bytes()))


@cache
def geometry() -> dict[str, Any]:
    values: dict[str, Any] = json.loads((GOLDEN / "geometry.json").read_text(encoding="utf-8"))
    return values


def drawn(size: str) -> Image.Image:
    """The picture that the pixels were recorded of."""
    width, height = (int(side) for side in size.split("x"))
    y, x, c = np.mgrid[:height, :width, :3]
    return Image.fromarray(((7 * x + 13 * y + 29 * c + 5 * ((x * y) % 11)) % 256).astype(np.uint8))


def noise(height: int, width: int) -> Image.Image:
    colours = np.random.default_rng(height).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(colours)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(("name", "mode"), [("square", "crop"), ("pad", "pad")])
def test_pixels_are_those_of_llava(name: str, mode: str, size: str) -> None:
    made = make_image_processor(28, mode=mode)(images=drawn(size), return_tensors="pt")
    assert torch.equal(made["pixel_values"][0], recorded()[f"{name}.{size}"])


@pytest.mark.parametrize("size", SIZES)
def test_pixels_of_tiles_are_those_of_llava(size: str) -> None:
    """The wrapped processor's own, which the crayon's follows."""
    own = llava_next()
    square = {"height": 28, "width": 28}
    own.image_processor = transformers.LlavaNextImageProcessorPil(
        size={"shortest_edge": 28},
        crop_size=square,
        image_grid_pinpoints=[[56, 28], [28, 56], [56, 56], [28, 84], [84, 28]],
    )
    processor = CollavoProcessor.from_llava(own)
    made = processor(drawn(size), "<image>", return_tensors="pt")
    assert torch.equal(made["pixel_values"][0], recorded()[f"anyres.{size}"])


def test_a_padded_square_is_llavas() -> None:
    recorded = geometry()["pad_to_square"]
    processor = make_image_processor(5, mode="pad")
    assert [int(255 * part) for part in processor.image_mean] == recorded["colour"]
    for case in recorded["cases"]:
        width, height = case["size_wh"]
        top, left, side = square(height, width)
        assert ([side, side], [left, top]) == (case["square_wh"], case["left_top"])


@pytest.mark.parametrize("case", geometry()["anyres"], ids=lambda one: str(one["size_wh"]))
def test_tiles_and_their_tokens_are_llavas(case: dict[str, Any]) -> None:
    own = llava_next(patch_size=14)
    side, cells = geometry()["patch"], geometry()["cells_per_tile"]
    points = [list(reversed(size)) for size in geometry()["pinpoints_wh"]]
    own.image_processor = transformers.LlavaNextImageProcessorPil(
        size={"shortest_edge": side},
        crop_size={"height": side, "width": side},
        image_grid_pinpoints=points,
    )
    width, height = case["size_wh"]
    base, tiles = CollavoProcessor.from_llava(own)._layout(height, width)
    assert base.places == cells**2
    assert list(tiles.grid) == case["unpadded_grid_hw"]
    assert base.places + tiles.places == case["image_tokens"]
    left, top, right, bottom = case["content_box_ltrb"]
    assert (tiles.columns.start, tiles.columns.length) == (left, right - left)
    assert (tiles.rows.start, tiles.rows.length) == (top, bottom - top)


SHAPES = [(1, 1), (1, 9), (9, 1), (5, 4), (4, 5), (17, 61), (61, 17), (28, 28), (28, 90), (90, 28)]
SIDES = {"height": 28, "width": 28}
SETTINGS: dict[str, tuple[type[Any], dict[str, Any]]] = {
    "squashed": (CropImageProcessor, {"size": {"height": 20, "width": 28}, "do_center_crop": 0}),
    "cropped": (CropImageProcessor, {"size": {"shortest_edge": 31}, "crop_size": SIDES}),
    "padded": (PadImageProcessor, {"do_pad": True, "size": SIDES, "crop_size": SIDES}),
    "padded, then cropped": (
        PadImageProcessor,
        {"do_pad": True, "size": {"shortest_edge": 31}, "crop_size": SIDES},
    ),
}


def assert_as_stock(processor: Any, images: Any, **options: Any) -> None:
    stock = processor.stock.from_dict(processor.to_dict())
    assert type(stock) is processor.stock
    made = processor(images=images, **options)["pixel_values"]
    expected = stock(images=images, **options)["pixel_values"]
    assert type(made) is type(expected)
    for one, other in zip(made, expected, strict=True):
        assert one.dtype == other.dtype
        assert np.array_equal(one, other)


@pytest.mark.parametrize("resample", FILTERS)
@pytest.mark.parametrize("name", SETTINGS)
def test_shortcuts_change_no_bit(name: str, resample: Image.Resampling) -> None:
    """Every filter: rows of padding are left out of the pass along rows, for all of them."""
    kind, settings = SETTINGS[name]
    settings = settings | {"do_center_crop": bool(settings.get("do_center_crop", True))}
    for height, width in SHAPES:
        processor = kind(resample=resample, **settings)
        assert_as_stock(processor, noise(height, width), return_tensors="pt")


@pytest.mark.parametrize(
    "settings",
    [
        {"do_rescale": False},
        {"do_normalize": False},
        {"do_rescale": False, "do_normalize": False},
        {"rescale_factor": 1 / 127.5, "image_mean": [0.1, 0.9, 0.3]},
        {"crop_size": {"height": 40, "width": 40}},  # wider than what it is cut from
        {"do_resize": False, "do_center_crop": False, "do_pad": False},
        {"image_std": 0.5},
    ],
    ids=str,
)
def test_other_settings_change_no_bit(settings: dict[str, Any]) -> None:
    processor = PadImageProcessor(**{**SETTINGS["padded"][1], **settings})
    assert_as_stock(processor, [noise(12, 19)], return_tensors="pt")
    assert_as_stock(make_image_processor(28, mode="pad"), [noise(12, 19)], **settings)


def test_other_inputs_are_transformers_own() -> None:
    processor = make_image_processor(28, mode="pad")
    gray, colours = noise(9, 7).convert("L"), noise(9, 7)
    for images in (gray, [gray, colours], [colours, noise(6, 20)], np.asarray(colours)[None]):
        for kind in ("pt", "np", None):
            assert_as_stock(processor, images, return_tensors=kind)
    different = {"size": {"shortest_edge": 28}, "do_center_crop": False, "do_pad": False}
    assert_as_stock(processor, [noise(28, 30), noise(30, 28)], **different)


def test_a_saved_one_has_transformers_name(tmp_path: Path) -> None:
    for mode, name in (("pad", "LlavaImageProcessor"), ("crop", "CLIPImageProcessor")):
        made = make_image_processor(28, mode=mode)
        made.save_pretrained(tmp_path)
        values = json.loads((tmp_path / "preprocessor_config.json").read_text())
        assert values["image_processor_type"] == name
        loaded = AutoImageProcessor.from_pretrained(tmp_path, use_fast=False)
        assert type(loaded) is made.stock
        again = from_pillow(loaded)
        assert type(again) is type(made)
        assert again.to_dict() == made.to_dict()


def test_an_unknown_mode_is_named() -> None:
    with pytest.raises(ValueError, match="mode: expected squash, crop or pad, got 'stretch'"):
        make_image_processor(mode="stretch")
