"""Processors around those of other models: their own inputs, and rows where their tokens look."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import avg_pool2d
from transformers.models.idefics3.modeling_idefics3 import Idefics3Connector
from transformers.models.internvl.modeling_internvl import InternVLModel
from transformers.models.llava_next.modeling_llava_next import LlavaNextModel
from transformers.models.llava_onevision.modeling_llava_onevision import LlavaOnevisionModel

from collavo import CollavoProcessor
from collavo.panoptic import PanopticMap
from collavo.processing import make_image_processor
from tests.collavo.processing import tiny_llavas
from tests.collavo.processing.tiny_llavas import BUILDERS

# Height and width of pictures: wide, tall, square and odd, narrow, smaller than a tile.
SIZES = [(40, 70), (75, 33), (51, 51), (23, 95), (11, 17)]
QUESTION = "Is there a horse"
NOWHERE = float("nan")


def picture(height: int, width: int, seed: int = 0) -> Image.Image:
    colours = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(colours)


def scene(height: int, width: int) -> PanopticMap:
    """A horse from a fifth to three quarters of the width, in the lower two thirds."""
    ids = torch.zeros(height, width, dtype=torch.int32)
    ids[height // 3 :, width // 5 : 3 * width // 4] = 7
    return PanopticMap.from_segments(ids, [7], [17])


def painted(mask: Any) -> Image.Image:
    return Image.fromarray(np.repeat(np.asarray(mask)[..., None], 3, -1).astype(np.uint8) * 255)


def patches(pixels: Tensor, side: int) -> Tensor:
    """Brightness of patches, ``[pictures, rows, columns]``."""
    return avg_pool2d(pixels.mean(-3), side)


def packed(model: Any, processor: Any, inputs: Any, **options: Any) -> Tensor:
    """What a model's own code makes of features that are the brightness of patches, ``[P]``."""
    images = processor.image_processor
    pixels = inputs["pixel_values"][0]
    side = getattr(processor, "patch_size", 4)
    vision = SimpleNamespace(image_size=pixels.shape[-1], patch_size=side)
    config = SimpleNamespace(vision_config=vision, image_grid_pinpoints=images.image_grid_pinpoints)
    features, _ = model.pack_image_features(
        SimpleNamespace(config=config),
        [patches(pixels, side).flatten(1)[..., None]],
        inputs["image_sizes"],
        image_newline=torch.tensor([NOWHERE]),
        **options,
    )
    return features[0][:, 0]


def brightness(processor: Any, inputs: Any) -> Tensor:
    """What each image token sees, ``[P]``, by the code of the family's model; nan where nothing."""
    pixels = inputs.get("pixel_values", inputs.get("pixel_values_images"))
    kind = type(processor).__name__.removesuffix("Processor")
    if kind in ("LlavaNext", "LlavaNextVideo"):
        return packed(LlavaNextModel, processor, inputs, vision_feature_select_strategy="default")
    if kind == "LlavaOnevision":
        ratio = processor.vision_aspect_ratio
        return packed(LlavaOnevisionModel, processor, inputs, vision_aspect_ratio=ratio)
    if kind == "InternVL":
        tokens = patches(pixels, 4)[..., None]
        return InternVLModel.pixel_shuffle(None, tokens, 0.5).mean(-1).flatten()
    if kind in ("Idefics3", "SmolVLM"):
        tokens = patches(pixels[0], 4).flatten(1)[..., None]
        return Idefics3Connector.pixel_shuffle(None, tokens, 2).mean(-1).flatten()
    merged = getattr(processor, "spatial_merge_size", 2 if kind == "Ovis2" else 1)
    seen = patches(pixels, 4 * merged).flatten()
    full = getattr(processor, "vision_feature_select_strategy", "") == "full"
    return torch.cat([torch.tensor([NOWHERE]), seen]) if full else seen


def check_rows(own: Any, size: tuple[int, int]) -> None:
    """The horse is painted white, and the family's own code says which tokens become bright.

    A token on its edge may go either way, since resampling blurs an edge.
    """
    processor = CollavoProcessor.from_llava(own)
    known = scene(*size)
    prompt = processor.prompt(QUESTION)
    index = processor(picture(*size), prompt, known, return_tensors="pt")["crayon_index"][0]

    def seen(mask: Any) -> Tensor:
        return brightness(own, own(images=[painted(mask)], text=[prompt], return_tensors="pt"))

    horse, anything = seen(known.segmentation == 7), seen(torch.ones(size))
    assert len(index) == len(horse)
    nowhere = anything.isnan() | (anything < 0.02)
    part = horse / anything
    sure = ~nowhere & (anything > 0.2) & ((part - 0.5).abs() > 0.25)
    assert (index[nowhere] == -1).all()
    assert (index[anything > 0.2] >= 0).all()
    assert torch.equal(index[sure], (part[sure] > 0.5).int())
    assert sure.sum() > 0.4 * (~nowhere).sum()
    assert (index[sure] == 1).any() and (index[sure] == 0).any()


@pytest.mark.parametrize("size", SIZES, ids=lambda size: f"{size[1]}x{size[0]}")
@pytest.mark.parametrize("name", BUILDERS)
def test_rows_lie_where_the_tokens_look(name: str, size: tuple[int, int]) -> None:
    check_rows(BUILDERS[name](), size)


@pytest.mark.parametrize("size", [(20, 400), (400, 20)], ids=lambda size: f"{size[1]}x{size[0]}")
@pytest.mark.parametrize("name", ["llava_next", "llava_next_video", "llava_onevision"])
def test_no_line_of_tiles_is_left_of_a_panorama(name: str, size: tuple[int, int]) -> None:
    """The padding's lines are taken off, and they are all: the base is what there is."""
    check_rows(BUILDERS[name](), size)


@pytest.mark.parametrize("size", SIZES[:3], ids=lambda size: f"{size[1]}x{size[0]}")
@pytest.mark.parametrize(
    "own",
    [
        pytest.param(lambda: tiny_llavas.llava("full"), id="a class token in front"),
        pytest.param(lambda: tiny_llavas.llava_next(patch_size=5), id="patches leave a margin"),
        pytest.param(lambda: tiny_llavas.llava_onevision(1), id="a grid scaled down"),
        pytest.param(lambda: tiny_llavas.pixtral(1), id="no patches merged"),
        pytest.param(lambda: tiny_llavas.ovis2(covering=False), id="tiles by aspect ratio"),
        pytest.param(lambda: tiny_llavas.idefics3(split=False), id="no tiles"),
    ],
)
def test_settings_of_a_family(own: Any, size: tuple[int, int]) -> None:
    check_rows(own(), size)


def test_pictures_of_one_prompt_are_padded_squares() -> None:
    """LLaVA-OneVision cuts a prompt's only picture into tiles, and pads each of several."""
    own = tiny_llavas.llava_onevision()
    processor = CollavoProcessor.from_llava(own)
    sizes = [(40, 70), (75, 33)]
    known = [scene(*size) for size in sizes]
    prompt = processor.prompt(QUESTION, num_images=2)
    batch = processor([[picture(*size) for size in sizes]], prompt, known, return_tensors="pt")
    index = batch["crayon_index"][0].view(2, 37)
    assert (index[:, 36] == -1).all(), "a newline stands behind each picture"
    masks = [one.segmentation == 7 for one in known], [torch.ones(size) for size in sizes]
    horse, anything = (
        patches(
            own(images=[[painted(one) for one in pair]], text=[prompt], return_tensors="pt")[
                "pixel_values"
            ][:, 0],
            4,
        ).flatten(1)
        for pair in masks
    )
    assert ((index[:, :36] == -1) == (anything < 0.02)).all()
    sure = (anything > 0.2) & ((horse / anything - 0.5).abs() > 0.25)
    rows = torch.tensor([[0], [2]]) + (horse / anything > 0.5).int()  # each has two rows
    assert torch.equal(index[:, :36][sure], rows.int()[sure])
    assert sure.sum() > 0.5 * (anything > 0.2).sum()


def test_a_map_of_another_size_than_its_picture() -> None:
    """A map's pixels are parts of the picture, however many there are."""
    processor = CollavoProcessor.from_llava(tiny_llavas.llava_next())
    known = scene(40, 70)
    ids = known.segmentation.repeat_interleave(6, 0).repeat_interleave(6, 1)
    larger = PanopticMap.from_segments(ids, [7], [17])
    prompt = processor.prompt(QUESTION)
    one, other = (
        processor(picture(240, 420), prompt, each, return_tensors="pt")["crayon_index"]
        for each in (known, larger)
    )
    assert (one != other).float().mean() < 0.02, "only where a border cuts a token in half"
    colours = torch.zeros(240, 420, 3, dtype=torch.uint8)
    colours[..., 0] = ids
    coloured = PanopticMap.from_segments(colours, [7], [17])
    again = processor(picture(240, 420), prompt, coloured, return_tensors="pt")["crayon_index"]
    assert torch.equal(other, again)


def test_a_picture_has_its_rows_once() -> None:
    """However many tiles see a segment, it is one row; another picture's rows follow."""
    processor = CollavoProcessor.from_llava(tiny_llavas.internvl())
    prompt = processor.prompt(QUESTION, num_images=2)
    pictures = [picture(40, 70), picture(24, 24)]
    batch = processor(pictures, prompt, [scene(40, 70), None], return_tensors="pt")
    assert batch["crayon_class"].tolist() == [[0, 18, 0]]
    assert batch["crayon_number"].tolist() == [[0, 1, 0]]
    first, second = batch["crayon_index"][0].split([63, 9])
    assert set(first.tolist()) == {0, 1} and set(second.tolist()) == {2}


def test_llava_has_the_rows_of_the_grid_and_crop_given_by_hand() -> None:
    """One squashed or cropped view is what ``CollavoProcessor`` itself serves."""
    for own in (tiny_llavas.llava(), tiny_llavas.llava(images=make_image_processor(24))):
        by_hand = CollavoProcessor(
            own.image_processor, own.tokenizer, (6, 6), chat_template=own.chat_template,
            object_text=False,
        )  # fmt: skip
        processor = CollavoProcessor.from_llava(own)
        for size in SIZES:
            inputs = picture(*size), processor.prompt(QUESTION), scene(*size)
            one, other = (each(*inputs, return_tensors="pt") for each in (processor, by_hand))
            assert one.keys() == other.keys()
            assert all(torch.equal(one[key], other[key]) for key in one)
