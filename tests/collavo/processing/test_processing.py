"""The processor: placeholders, padding, crayon inputs, object text, saving."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoProcessor

from collavo.configuration import CollavoConfig
from collavo.panoptic import PanopticMap
from collavo.processing import CollavoProcessor, make_image_processor
from collavo_kernels import panoptic_lookup

PROMPT = "USER: <image>\nIs there a horse ASSISTANT:"
WITHOUT = "USER: Is there a horse ASSISTANT:"


def picture(width=16, height=12):
    colours = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(colours)


@pytest.fixture
def panoptic(scene):
    ids, classes = scene
    return PanopticMap.from_segments(ids, list(classes), list(classes.values()))


def test_one_image_gives_every_input(tiny_processor, panoptic):
    processor = tiny_processor()
    batch = processor(text=PROMPT, images=picture(), panoptic=panoptic, return_tensors="pt")
    assert sorted(batch) == [
        "attention_mask", "crayon_class", "crayon_index", "crayon_number", "input_ids",
        "pixel_values",
    ]  # fmt: skip
    assert int((batch["input_ids"] == processor.image_token_id).sum()) == 16
    assert batch["pixel_values"].shape == (1, 3, 16, 16)
    # Rows by ascending id: unknown, horse 12, horse 256, person 300, sky 900, grass 70000.
    assert batch["crayon_class"].tolist() == [[0, 18, 18, 1, 120, 126]]
    assert batch["crayon_number"].tolist() == [[0, 1, 2, 1, 1, 1]]
    assert batch["crayon_index"].shape == (1, 16)
    assert {value.dtype for key, value in batch.items() if key.startswith("crayon")} == {
        torch.int32
    }


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_follows_the_tokenizer(tiny_processor, panoptic, side):
    processor = tiny_processor(padding_side=side)
    batch = processor(
        text=[PROMPT, WITHOUT, PROMPT],
        images=[picture(), picture()],
        panoptic=[panoptic, None],
        padding=True,
        return_tensors="pt",
    )
    mask = batch["attention_mask"]
    short = int(mask[1].sum())
    expected = [1] * short
    padding = [0] * (mask.shape[1] - short)
    assert mask[1].tolist() == (padding + expected if side == "left" else expected + padding)


def test_rows_of_samples_without_map_or_image(tiny_processor, panoptic):
    """A text-only sample has no row at all; an image without a map has its unknown row only."""
    batch = tiny_processor()(
        text=[WITHOUT, PROMPT, PROMPT],
        images=[picture(), picture()],
        panoptic=[None, panoptic],
        padding=True,
        return_tensors="pt",
    )
    assert batch["crayon_index"][0].eq(-1).all() and batch["crayon_class"][0].eq(-1).all()
    assert batch["crayon_index"][1].eq(0).all()
    assert batch["crayon_class"][1].tolist() == [0, -1, -1, -1, -1, -1]
    assert batch["crayon_class"][2].tolist() == [0, 18, 18, 1, 120, 126]
    assert int(batch["crayon_index"][2].max()) == 5
    assert batch["pixel_values"].shape[0] == 2


def test_no_image_means_no_image_work(tiny_processor):
    batch = tiny_processor()(text=[WITHOUT, WITHOUT], padding=True, return_tensors="pt")
    assert sorted(batch) == ["attention_mask", "input_ids"]


def test_two_images_in_one_prompt(tiny_processor, panoptic):
    """The second image's rows follow the first one's, local to the sample."""
    batch = tiny_processor()(
        text=["USER: <image> <image> Is there a horse ASSISTANT:"],
        images=[[picture(), picture()]],
        panoptic=[None, panoptic],
        return_tensors="pt",
    )
    assert batch["crayon_index"].shape == (1, 32)
    assert batch["crayon_index"][0, :16].eq(0).all()
    assert int(batch["crayon_index"][0, 16:].min()) >= 1
    assert batch["crayon_class"].tolist() == [[0, 0, 18, 18, 1, 120, 126]]


def test_object_text_switch(tiny_processor, panoptic):
    processor = tiny_processor(object_text=False)
    arguments = {"text": PROMPT, "images": picture(), "panoptic": panoptic}

    def decoded(**kwargs):
        return processor.batch_decode(processor(**arguments, **kwargs)["input_ids"])[0]

    objects = "The image includes (#1 horse) [0.06, 0.17, 0.31, 0.67], (#2 horse)"
    assert "includes" not in decoded()
    assert f"\n{objects}" in decoded(object_text=True)
    assert decoded(object_text=[True]) == decoded(object_text=True)


def test_object_text_without_segments(tiny_processor):
    processor = tiny_processor()
    batch = processor(text=PROMPT, images=picture())
    text = processor.batch_decode(batch["input_ids"])[0]
    assert "\nNone of detailed object information for image. Is there" in text


def test_boxes_of_a_cropped_image_are_the_crops_own(tiny_processor):
    """With a centre crop the map is cropped alike: cells and boxes mean what the model sees."""
    ids = torch.zeros(12, 20, dtype=torch.int32)
    ids[:, :10] = 5  # of the 12 visible columns (4..15) the first six
    ids[:, 16:] = 9  # cut away altogether
    panoptic = PanopticMap.from_segments(ids, [5, 9], [17, 0])
    processor = tiny_processor(mode="crop")
    batch = processor(text=PROMPT, images=picture(20, 12), panoptic=panoptic, return_tensors="pt")
    assert "(#1 horse) [0.00, 0.00, 0.50, 1.00]. " in processor.batch_decode(batch["input_ids"])[0]
    assert batch["crayon_index"].reshape(4, 4).tolist() == [[1, 1, 0, 0]] * 4
    assert batch["crayon_class"].tolist() == [[0, 18, 1]]


def test_save_and_load(tiny_processor, panoptic, tmp_path):
    processor = tiny_processor(grid=(2, 8), object_text=False, max_number=7, reduce="nearest")
    processor.save_pretrained(tmp_path)
    loaded = CollavoProcessor.from_pretrained(tmp_path)
    arguments = {"text": PROMPT, "images": picture(), "panoptic": panoptic, "return_tensors": "pt"}
    expected, actual = processor(**arguments), loaded(**arguments)
    assert sorted(actual) == sorted(expected)
    for key, value in expected.items():
        assert torch.equal(actual[key], value), key
    assert loaded.grid == (2, 8) and loaded.max_number == 7 and loaded.reduce == "nearest"
    assert loaded.chat_template == processor.chat_template
    assert loaded.prompt("Is there a horse") == processor.prompt("Is there a horse")


def test_auto_processor_beside_a_model_config(tiny_processor, tmp_path):
    """A model's folder also has a config.json; the Auto classes then see its model type."""
    processor = tiny_processor()
    CollavoConfig().save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    loaded = AutoProcessor.from_pretrained(tmp_path)
    assert isinstance(loaded, CollavoProcessor) and loaded.grid == (4, 4)
    assert loaded.tokenizer.get_vocab() == processor.tokenizer.get_vocab()


def test_lists_and_arrays(tiny_processor, panoptic):
    processor = tiny_processor()
    arguments = {"text": [PROMPT], "images": [picture()], "panoptic": [panoptic]}
    tensors = processor(**arguments, return_tensors="pt")
    arrays = processor(**arguments, return_tensors="np")
    lists = processor(**arguments)
    for key, value in tensors.items():
        assert np.array_equal(arrays[key], value.numpy()), key
        assert np.array_equal(np.asarray(lists[key]), value.numpy()), key


def test_prompt_of_a_question(tiny_processor):
    processor = tiny_processor()
    text = processor.prompt("What is in this picture?")
    assert text.endswith(" image. <image> USER: <objects>What is in this picture? ASSISTANT:")
    turns = [
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "A?"}]},
        {"role": "assistant", "content": "B"},
        {"role": "user", "content": "C?"},
    ]
    assert processor.prompt(turns).endswith(
        "<image> USER: <objects>A? ASSISTANT: B</s> USER: C? ASSISTANT:"
    )
    assert processor.apply_chat_template(turns, add_generation_prompt=True) == processor.prompt(
        turns
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"text": WITHOUT}, "text: expected one '<image>' for each of 1 images, got 0"),
        ({"panoptic": [None, None]}, "panoptic: expected one map, or None, for each of 1 images"),
        ({"object_text": [True, False]}, "object_text: expected one value, or one for each of 1"),
        ({"text": None}, "text: expected a prompt"),
        ({"images": "/no/such.png"}, "/no/such.png: there is no such image"),
        ({"truncation": True, "max_length": 10}, "a truncation must not cut images"),
    ],
)
def test_disagreements_are_named(tiny_processor, change, message):
    arguments = {"text": PROMPT, "images": picture(), "panoptic": None, **change}
    with pytest.raises((ValueError, OSError), match=message):
        tiny_processor()(**arguments)


def test_wrong_types_are_named(tiny_processor):
    with pytest.raises(TypeError, match=r"panoptic\[0\]: expected a PanopticMap, a CrayonMap or"):
        tiny_processor()(text=PROMPT, images=picture(), panoptic=["map.png"])
    with pytest.raises(TypeError, match="images: expected PIL images, paths, NumPy arrays"):
        tiny_processor()(text=PROMPT, images=3)


@pytest.fixture
def crayon(panoptic):
    """The picture's map, looked up for the tiny processor's grid."""
    return look_up(panoptic)


def look_up(panoptic, images=1, grid=(4, 4), **kwargs):
    lists = [panoptic.segment_ids] * images, [panoptic.segment_classes] * images
    return panoptic_lookup([panoptic.segmentation] * images, *lists, grid=grid, **kwargs)


def test_a_crayon_in_place_of_a_map(tiny_processor, panoptic, crayon):
    processor = tiny_processor()
    one, other = (
        processor(text=PROMPT, images=picture(), panoptic=each, return_tensors="pt")
        for each in (panoptic, crayon)
    )
    assert one.keys() == other.keys()
    assert all(torch.equal(one[key], other[key]) for key in one)


def test_no_lookup_is_made_of_a_crayon(tiny_processor, crayon, monkeypatch):
    monkeypatch.setattr("collavo.processing.blocks.panoptic_lookup", None)
    tiny_processor()(text=PROMPT, images=picture(), panoptic=crayon)


def moved(crayon, by, field="row_index"):
    """The crayon with one of its fields shifted, as that of another grid would have it."""
    return dataclasses.replace(crayon, **{field: getattr(crayon, field) + by})


@pytest.mark.parametrize(
    ("change", "options", "message"),
    [
        (lambda p: look_up(p, grid=(3, 4)), {}, "expected the processor's 16 grid cells, got a "),
        (lambda p: look_up(p, images=2), {}, "expected a CrayonMap of one image .*got 2 images"),
        (lambda p: look_up(p).pad(9), {}, "without dead rows, got 1 images and 9 rows"),
        (look_up, {"num_classes": 100}, "a row's class to be at most 100, .*got 126"),
        (look_up, {"max_number": 1}, "a row's number to be at most 1, .*got 2"),
        # Of a batch's rows these would be another image's.
        (lambda p: moved(look_up(p), 1), {}, "a cell's row_index to be at most 5, .*got 6"),
        (lambda p: moved(look_up(p), -9), {}, "a cell's row_index to be at least 0, got -"),
        (lambda p: moved(look_up(p), -9, "row_number"), {}, "a row's number to be at least 0"),
        (look_up, {"mode": "crop"}, "expected a PanopticMap, since the image processor crops"),
    ],
)
def test_crayons_that_do_not_fit(tiny_processor, panoptic, change, options, message):
    """A map is looked up as the processor wants it; what has been looked up already cannot be."""
    with pytest.raises(ValueError, match=rf"panoptic\[0\]: .*{message}"):
        tiny_processor(**options)(text=PROMPT, images=picture(), panoptic=change(panoptic))


def test_a_crop_that_keeps_the_whole_image_takes_a_crayon(tiny_processor, panoptic, crayon):
    """Nothing of a square image is cut off, so nothing of its crayon would have to be."""
    tiny_processor(mode="crop")(text=PROMPT, images=picture(16, 16), panoptic=crayon)


def test_tokenizer_without_the_image_token(tiny_tokenizer):
    tokenizer = tiny_tokenizer()
    with pytest.raises(ValueError, match="expected '<picture>' in its vocabulary"):
        CollavoProcessor(make_image_processor(16), tokenizer, image_token="<picture>")
    with pytest.raises(ValueError, match="grid: expected a positive height and width"):
        CollavoProcessor(make_image_processor(16), tokenizer, grid=(0, 4))


def test_images_in_one_list_per_prompt(tiny_processor):
    """Two lists of one image are not one list of two: a placeholder too many is a mistake."""
    processor = tiny_processor()
    both, none = "<image> <image> What", "What"
    flat = processor(text=[both, none], images=[picture(), picture()], padding=True)
    nested = processor(text=[both, none], images=[[picture(), picture()], []], padding=True)
    assert flat["crayon_index"] == nested["crayon_index"]
    with pytest.raises(ValueError, match=r"have images, \[1, 1\], got \[2, 0\]"):
        processor(text=[both, none], images=[[picture()], [picture()]], padding=True)
