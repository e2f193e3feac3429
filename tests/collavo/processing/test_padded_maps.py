"""Panoptic maps and boxes of padded pictures, and image processors that nothing can follow."""

from __future__ import annotations

import inspect
from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from transformers import AutoProcessor, CLIPImageProcessorPil, LlavaImageProcessorPil

from collavo import CollavoProcessor
from collavo.panoptic import PanopticMap
from collavo.processing import from_padded, make_image_processor, to_padded
from collavo.processing.region import frame
from collavo_kernels import panoptic_lookup
from tests.collavo.processing import tiny_llavas
from tests.collavo.tiny import tiny_processor

PROMPT = "USER: <image>\nIs there a horse ASSISTANT:"
GRID = (5, 5)


def drawn_map(height: int, width: int) -> PanopticMap:
    """Four segments and unknown pixels, in patches of odd sizes."""
    rng = np.random.default_rng(height * 1000 + width)
    coarse = rng.integers(0, 5, (-(-height // 3), -(-width // 4)), dtype=np.int32)
    ids = np.kron(coarse, np.ones((3, 4), dtype=np.int32))[:height, :width]
    return PanopticMap.from_segments(torch.from_numpy(ids.copy()), [1, 2, 3, 4], [0, 17, 17, 118])


def shares(known: PanopticMap, row: int, column: int) -> dict[int, float]:
    """How much of a cell of the padded square each id of the picture covers, in pixels."""
    height, width = known.size
    side = max(height, width)
    padded = np.full((side, side), -1)
    top, left = (side - height) // 2, (side - width) // 2
    padded[top : top + height, left : left + width] = known.segmentation.numpy()
    first, last = (np.array([row, column]) + end for end in (0, 1))
    cell = side / GRID[0]
    found: Counter[int] = Counter()
    for y in range(side):
        tall = min(y + 1, last[0] * cell) - max(y, first[0] * cell)
        for x in range(side):
            wide = min(x + 1, last[1] * cell) - max(x, first[1] * cell)
            if tall > 1e-9 and wide > 1e-9 and padded[y, x] >= 0:
                found[int(padded[y, x])] += tall * wide
    return found


@pytest.mark.parametrize(
    ("height", "width"), [(5, 5), (7, 20), (20, 7), (13, 14), (1, 9), (25, 11), (40, 65)]
)  # of the last a row of cells ends where the picture starts, but for rounding
def test_cells_of_a_padded_map(height: int, width: int) -> None:
    """A cell has the segment with most of its picture; a cell of padding has none."""
    known = drawn_map(height, width)
    picture = Image.new("RGB", (width, height))
    batch = tiny_processor(GRID, 20, mode="pad")(
        text=PROMPT, images=picture, panoptic=known, return_tensors="pt"
    )
    index = batch["crayon_index"].view(GRID).tolist()
    # A cell is read at lines in even distances: areas that differ by less than a line may tie.
    cell = max(height, width) / GRID[0]
    doubt = 2 * cell * max(1, cell / 4)
    for row, column in np.ndindex(*GRID):
        found = shares(known, row, column)
        got = index[row][column]
        if not found:
            assert got == -1, (row, column)
        else:  # unknown pixels are row 0, and the four ids are rows 1 to 4
            assert found[got] >= max(found.values()) - doubt, (row, column)
            assert found[got] > 0


def test_a_padded_map_by_hand() -> None:
    """Two halves of a picture twice as wide as high: a row of padding on each side."""
    ids = torch.tensor([[1, 1, 2, 2]] * 2, dtype=torch.int32).repeat_interleave(2, 0)[:2]
    known = PanopticMap.from_segments(ids, [1, 2], [17, 0])
    batch = tiny_processor(mode="pad")(
        text=PROMPT, images=Image.new("RGB", (40, 20)), panoptic=known, return_tensors="pt"
    )
    none = [-1] * 4
    assert batch["crayon_index"].view(4, 4).tolist() == [none, [1, 1, 2, 2], [1, 1, 2, 2], none]


@pytest.mark.parametrize(("height", "width"), [(7, 20), (20, 7), (13, 14), (9, 9)])
@pytest.mark.parametrize("wrapped", [False, True])
def test_boxes_are_the_images_or_the_squares(height: int, width: int, wrapped: bool) -> None:
    """Neither takes the padding for a part of what it borders on."""
    known = drawn_map(height, width)
    picture = Image.new("RGB", (width, height))
    lookup = panoptic_lookup(
        [known.segmentation], [known.segment_ids], [known.segment_classes], grid=(1, 1)
    )
    for name in ("image", "padded"):
        processor: CollavoProcessor
        if wrapped:
            own = tiny_llavas.llava_padded()
            processor = CollavoProcessor.from_llava(own, object_text=True, box_frame=name)
        else:
            processor = tiny_processor(mode="pad", box_frame=name)
        crayon = processor._crayons([picture], [known], [1])[0]
        assert torch.equal(crayon.row_box, lookup.row_box)
        assert torch.equal(crayon.row_area, lookup.row_area)
        batch = processor(text=PROMPT, images=picture, panoptic=known)
        text = processor.batch_decode(batch["input_ids"])[0]
        boxes = [tuple(box) for box in lookup.row_box[1:].tolist()]
        if name == "padded":
            boxes = [to_padded(box, height, width) for box in boxes]
        for box in boxes:
            assert "[{:.2f}, {:.2f}, {:.2f}, {:.2f}]".format(*box) in text.replace(" ]", "]")


def test_the_frame_of_boxes_is_saved(tmp_path: Any) -> None:
    own = CollavoProcessor.from_llava(tiny_llavas.llava_padded(), box_frame="padded")
    for processor in (tiny_processor(mode="pad", box_frame="padded"), own):
        processor.save_pretrained(tmp_path)
        assert AutoProcessor.from_pretrained(tmp_path).box_frame == "padded"
    tiny_processor(mode="pad").save_pretrained(tmp_path)
    loaded = CollavoProcessor.from_pretrained(tmp_path)
    assert loaded.box_frame == "image"
    assert type(loaded.image_processor) is type(make_image_processor(mode="pad"))


def test_frames_that_cannot_be() -> None:
    with pytest.raises(ValueError, match="box_frame: expected one of image, padded, got 'crop'"):
        tiny_processor(box_frame="crop")
    with pytest.raises(ValueError, match="box_frame: expected 'image', since the image processor"):
        tiny_processor(mode="crop", box_frame="padded")
    tiny_processor(mode="squash", box_frame="padded")  # sees all of the image


sides = st.integers(1, 500)
places = st.floats(0, 1)


@given(st.tuples(places, places, places, places), sides, sides)
def test_boxes_there_and_back(box: tuple[float, ...], height: int, width: int) -> None:
    """In pixels of the square, with the square's borders as integers; and back within rounding."""
    x1, y1, x2, y2 = to_padded(box, height, width)
    side = max(height, width)
    left, top = (side - width) // 2, (side - height) // 2
    expected = [left + box[0] * width, top + box[1] * height]
    expected += [left + box[2] * width, top + box[3] * height]
    assert np.allclose(np.array([x1, y1, x2, y2]) * side, expected, atol=1e-9)
    assert np.allclose(from_padded((x1, y1, x2, y2), height, width), box, atol=1e-9 * 500)


def test_boxes_of_padding_end_at_the_image() -> None:
    assert from_padded((0, 0, 1, 1), 3, 10) == (0, 0, 1, 1)
    with pytest.raises(ValueError, match="expected positive sizes, got 0 and 3"):
        to_padded((0, 0, 1, 1), 0, 3)
    with pytest.raises(ValueError, match="box: expected x1, y1, x2, y2, got"):
        from_padded((0, 0, 1), 3, 3)


def test_a_crayon_of_the_whole_picture_is_none_of_its_square() -> None:
    known = drawn_map(8, 24)
    crayon = panoptic_lookup(
        [known.segmentation], [known.segment_ids], [known.segment_classes], grid=(4, 4)
    )
    processor = tiny_processor(mode="pad")
    with pytest.raises(ValueError, match=r"expected -1 in the cells of padding.*24x8"):
        processor(text=PROMPT, images=Image.new("RGB", (24, 8)), panoptic=crayon)
    processor(text=PROMPT, images=Image.new("RGB", (24, 24)), panoptic=crayon)  # nothing to pad


CLASSES = sorted(
    name
    for name in dir(transformers)
    if name.endswith("ImageProcessorPil")
    and not getattr(transformers, name).__dict__.get("is_dummy")
)
SETTINGS: list[dict[str, Any]] = [
    {},
    {"size": {"height": 24, "width": 30}, "do_center_crop": False},
    {"size": {"height": 40, "width": 30}, "crop_size": {"height": 24, "width": 26}},
    {"size": {"shortest_edge": 30}, "crop_size": {"height": 24, "width": 26}},
    {"size": {"longest_edge": 30}, "do_center_crop": False},
    {"size": {"shortest_edge": 30, "longest_edge": 33}, "crop_size": {"height": 24, "width": 26}},
    {
        "size": {"height": 24, "width": 24},
        "do_center_crop": False,
        "pad_size": {"height": 30, "width": 30},
    },
]


def places_of(pixels: np.ndarray[Any, Any], height: int, width: int) -> Any:
    """Where each pixel came from, as drawn into two channels, and whether from the picture."""
    return pixels[0] * width, pixels[1] * height, pixels[2] > 0.99


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("name", CLASSES)
def test_every_image_processor_is_followed_or_refused(name: str, padded: bool) -> None:
    """Pictures that show their own places say where they really are."""
    kind = getattr(transformers, name)
    for settings in SETTINGS:
        plain = {"image_mean": [0.0] * 3, "image_std": [1.0] * 3, "rescale_factor": 1 / 255}
        try:
            processor = kind(**settings, **plain, do_pad=padded, resample=Image.Resampling.BILINEAR)
        except (TypeError, ValueError, AttributeError, KeyError):
            continue  # it knows these settings itself not to go together
        for height, width in ((40, 66), (61, 33)):
            try:
                placed = frame(processor, height, width)
            except ValueError:
                continue
            y, x = np.mgrid[:height, :width]
            channels = [(x + 0.5) / width * 255, (y + 0.5) / height * 255, np.full(x.shape, 255)]
            picture = Image.fromarray(np.stack(channels, 2).round().astype(np.uint8))
            made = processor(images=[picture], return_tensors="np")["pixel_values"][0]
            assert made.shape[-2:] == (placed.height, placed.width)
            across = (np.arange(placed.width) + 0.5 - placed.left) / placed.wide * width
            down = (np.arange(placed.height) + 0.5 - placed.top) / placed.tall * height
            saw_x, saw_y, inside = places_of(made, height, width)
            expected = np.outer(
                (down > 4) & (down < height - 4), (across > 4) & (across < width - 4)
            )
            beside = ~np.outer(
                (down > -4) & (down < height + 4), (across > -4) & (across < width + 4)
            )
            assert inside[expected].all()
            assert not inside[beside].any()
            assert np.abs(saw_x - across[None])[expected].max() < 1.5
            assert np.abs(saw_y - down[:, None])[expected].max() < 1.5


def test_the_last_test_saw_some_of_each() -> None:
    """Known classes are followed, and those with ways of their own are refused by name."""
    assert len(CLASSES) > 50
    for kind in (
        CLIPImageProcessorPil,
        LlavaImageProcessorPil,
        transformers.SiglipImageProcessorPil,
    ):
        frame(kind(size={"height": 24, "width": 24}, do_center_crop=False), 40, 66)
    for name in (
        "LevitImageProcessorPil",
        "PerceiverImageProcessorPil",
        "ConvNextImageProcessorPil",
    ):
        with pytest.raises(ValueError, match=f"or pads as LLaVA's, got {name}, whose "):
            frame(getattr(transformers, name)(), 40, 66)


def test_a_class_with_a_step_of_its_own_is_refused() -> None:
    """Siblings of a known class may do anything."""

    class Mirrored(CLIPImageProcessorPil):
        def resize(self, image: Any, *args: Any, **kwargs: Any) -> Any:
            return super().resize(image[..., ::-1], *args, **kwargs)

    square = {"height": 20, "width": 20}
    own = Mirrored(size=square, do_center_crop=False)
    with pytest.raises(ValueError, match="got Mirrored, whose resize is Mirrored's own"):
        CollavoProcessor(own, tiny_processor().tokenizer, grid=(4, 4))
    assert inspect.getmodule(Mirrored) is not None
