"""Processors around those of other models: inputs, labels, folders, and what is refused."""

from __future__ import annotations

import inspect
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoProcessor, CLIPImageProcessorPil, Idefics2Processor

from collavo import CollavoProcessor
from collavo.panoptic import PanopticMap
from collavo.processing import OverlongError
from collavo_kernels import panoptic_lookup
from tests.collavo.processing import tiny_llavas
from tests.collavo.processing.tiny_llavas import BUILDERS, llava, llava_next

QUESTION = "Is there a horse"
IMAGE = {"type": "image"}


def picture(height: int, width: int) -> Image.Image:
    colours = np.random.default_rng(height).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(colours)


PICTURES = [picture(40, 70), picture(60, 33), picture(25, 25)]


def says(text: str) -> dict[str, str]:
    return {"type": "text", "text": text}


TURNS: list[list[dict[str, Any]]] = [
    [
        {"role": "user", "content": [IMAGE, says(QUESTION)]},
        {"role": "assistant", "content": "yes"},
        {"role": "user", "content": "What is this"},
        {"role": "assistant", "content": [says("Sure it is")]},
    ],
    [
        {"role": "user", "content": [IMAGE, IMAGE, says("What is in this")]},
        {"role": "assistant", "content": "no"},
    ],
    [{"role": "user", "content": "What is this"}, {"role": "assistant", "content": "picture"}],
]


def assert_has_all_of(batch: Any, own: Any) -> None:
    for key, value in own.items():
        if isinstance(value, torch.Tensor):
            assert torch.equal(batch[key], value), key
        else:
            pairs = zip(batch[key], value, strict=True)
            assert all(np.array_equal(one, other) for one, other in pairs), key


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", BUILDERS)
def test_pixels_and_ids_are_the_models_own(name: str, side: str) -> None:
    own = BUILDERS[name]()
    own.tokenizer.padding_side = side
    processor = CollavoProcessor.from_llava(own)
    texts = [processor.prompt(QUESTION, num_images=2), processor.prompt("What is this")]
    nested = [PICTURES[:2], PICTURES[2:]]
    options = {"padding": True, "return_tensors": "pt"}
    batch = processor(nested, texts, **options)
    # GOT-OCR2 means pages by a list, and SmolVLM the pictures of one prompt by no list.
    given = PICTURES if name == "got_ocr2" else nested
    assert_has_all_of(batch, own(images=given, text=list(texts), **options))
    assert batch["crayon_index"].dtype == torch.int32
    tokens = (batch["input_ids"] == processor.image_token_id).sum(1)
    assert int(tokens.max()) == batch["crayon_index"].shape[1]


def test_lists_and_arrays_are_the_models_own() -> None:
    own = llava_next()
    processor = CollavoProcessor.from_llava(own)
    texts = [processor.prompt(QUESTION), processor.prompt(QUESTION, num_images=0)]
    for kind in ("np", None):
        options = {"padding": True, "return_tensors": kind}
        batch = processor(PICTURES[:1], texts, **options)
        assert_has_all_of(batch, own(images=PICTURES[:1], text=list(texts), **options))
        assert isinstance(batch["crayon_class"], np.ndarray if kind else list)
    words = processor.prompt(QUESTION, num_images=0)
    assert sorted(processor(text=words)) == ["attention_mask", "input_ids"]


@pytest.mark.parametrize("name", BUILDERS)
def test_training_inputs_are_those_of_the_whole_conversation(name: str) -> None:
    """Labels are the answers with their stop tokens, though no template here marks them."""
    own = BUILDERS[name]()
    if "kwargs" not in inspect.signature(own.__call__).parameters:
        pytest.skip(f"of this release {name} cannot leave special tokens out")
    processor = CollavoProcessor.from_llava(own)
    images = [PICTURES[:1], PICTURES[1:], []]
    batch = processor.training_batch(TURNS, images)
    # What a string says is lost by these templates, which read parts; nothing is lost here.
    parts = [
        [{**m, "content": [says(m["content"])]} if isinstance(m["content"], str) else m for m in c]
        for c in TURNS
    ]
    texts = [
        own.tokenizer.apply_chat_template(one, chat_template=own.chat_template, tokenize=False)
        for one in parts
    ]
    given = PICTURES if name == "got_ocr2" else images
    assert_has_all_of(batch, own(images=given, text=texts, padding=True, return_tensors="pt"))
    said = [own.tokenizer.decode(line[line >= 0]) for line in batch["labels"]]
    assert said == [" yes</s> Sure it is</s>", " no</s>", " picture</s>"]
    without = processor.training_batch(TURNS, images, pixels=False)
    assert "pixel_values" not in without and torch.equal(without["labels"], batch["labels"])


def test_objects_are_named_where_asked() -> None:
    known = PanopticMap.from_segments(torch.ones(25, 25, dtype=torch.int32), [1], [17])
    for own, before in ((llava(), "<image>\n "), (tiny_llavas.got_ocr2(), "<imgpad></img>\n ")):
        processor = CollavoProcessor.from_llava(own)
        prompt = processor.prompt(QUESTION)
        plain, named = (
            own.tokenizer.decode(
                processor(PICTURES[2], prompt, known, object_text=wanted)["input_ids"][0]
            )
            for wanted in (None, True)
        )
        assert "includes" not in plain
        assert f"{before}The image includes (#1 horse) [0.00, 0.00, 1.00, 1.00]" in named


@pytest.mark.parametrize("name", ["llava", "llava_next", "ovis2", "janus", "idefics3"])
def test_save_and_load(name: str, tmp_path: Path) -> None:
    own = BUILDERS[name]()
    if name == "janus" and "num_image_tokens" not in inspect.signature(type(own)).parameters:
        pytest.skip("this release does not save how many tokens an image has")
    processor = CollavoProcessor.from_llava(own, object_text=True, max_number=3, reduce="nearest")
    processor.save_pretrained(tmp_path)
    prompt = processor.prompt(QUESTION)
    for loaded in (
        CollavoProcessor.from_pretrained(tmp_path),
        AutoProcessor.from_pretrained(tmp_path),
    ):
        assert (loaded.object_text, loaded.max_number, loaded.reduce) == (True, 3, "nearest")
        assert (loaded.grid, loaded.chat_template) == (processor.grid, processor.chat_template)
        one, other = (
            each(PICTURES[:1], prompt, return_tensors="pt") for each in (processor, loaded)
        )
        assert_has_all_of(other, one)
    assert CollavoProcessor.from_pretrained(tmp_path, max_number=5).max_number == 5
    stock = type(own).from_pretrained(tmp_path)  # the folder is one of the model's own class, too
    options = {"images": PICTURES[:1], "text": [prompt], "return_tensors": "pt"}
    assert_has_all_of(stock(**options), own(**options))


def test_a_chat_template_set_later_is_saved(tmp_path: Path) -> None:
    processor = CollavoProcessor.from_llava(llava())
    processor.chat_template = "{{ messages[0]['content'] }}"
    processor.save_pretrained(tmp_path)
    assert CollavoProcessor.from_pretrained(tmp_path).chat_template == processor.chat_template


def test_a_folder_of_another_models_processor_is_named(tmp_path: Path) -> None:
    """It would be read as one with a grid of 35x35, and squash images."""
    llava().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"got LlavaProcessor; CollavoProcessor\.from_llava"):
        CollavoProcessor.from_pretrained(tmp_path)


def with_(own: Any, **settings: Any) -> Any:
    for name, value in settings.items():
        setattr(own, name, value)
    return own


def sized(own: Any, **settings: Any) -> Any:
    with_(own.image_processor, **settings)
    return own


def pinned(pinpoints: list[list[int]]) -> Any:
    own = llava_next()
    own.image_processor.image_grid_pinpoints = pinpoints
    return own


@pytest.mark.parametrize(
    ("own", "message"),
    [
        (
            lambda: with_(llava(), patch_size=None),
            "LlavaProcessor: expected patch_size to be posit",
        ),
        (
            lambda: with_(llava(), num_additional_image_tokens=0),
            "a class token in front of them, g",
        ),
        (
            lambda: with_(llava(), num_additional_image_tokens=5),
            "got num_additional_image_tokens=5",
        ),
        (
            lambda: with_(tiny_llavas.internvl(), image_seq_length=8),
            "InternVLProcessor: expected image_seq_length to be a square, got 8",
        ),
        (
            lambda: with_(tiny_llavas.llava_onevision(), vision_feature_select_strategy="default"),
            "expected vision_feature_select_strategy='full', got 'default'",
        ),
        (
            lambda: llava(images=CLIPImageProcessorPil(do_resize=False)),
            "image_processor: expected do_resize=True, got False",
        ),
        (
            lambda: llava(images=CLIPImageProcessorPil(size={"shortest_edge": 24}, do_pad=True)),
            "image_processor: expected do_pad=False, got True",
        ),
        (
            lambda: sized(tiny_llavas.llava_squashed(), do_center_crop=True),
            "image_processor: expected crop_size with height and width, got {}",
        ),
        *(
            (lambda own=own: sized(own(), size={"shortest_edge": 20}), "size={'shortest_edge': 20}")
            for own in (tiny_llavas.pixtral, tiny_llavas.janus, tiny_llavas.smolvlm)
        ),
        (lambda: pinned([[30, 30]]), r"expected multiples of the tiles' side 24, got \[30, 30\]"),
    ],
)
def test_tokens_that_cannot_be_followed_are_refused(own: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        CollavoProcessor.from_llava(own())


def test_processors_of_no_known_family_are_named() -> None:
    for own in (CLIPImageProcessorPil(), SimpleNamespace()):
        with pytest.raises(TypeError, match=rf"expected one of Llava.*got {type(own).__name__}"):
            CollavoProcessor.from_llava(own)
    with pytest.raises(TypeError, match="Idefics2Processor is not served: its resampler's latents"):
        CollavoProcessor.from_llava(object.__new__(Idefics2Processor))


def test_options_of_the_images_are_refused() -> None:
    """The crayon follows the image processor's own settings, not those of a call."""
    processor = CollavoProcessor.from_llava(llava())
    with pytest.raises(ValueError, match="do_center_crop: expected options of the tokenizer"):
        processor(PICTURES[:1], processor.prompt(QUESTION), do_center_crop=False)


def test_a_crayon_in_the_place_of_a_map() -> None:
    """What has been looked up on a grid serves where that grid is all that the tokens look at."""
    known = PanopticMap.from_segments(torch.arange(1, 37).view(6, 6) % 4 + 1, [1, 2], [17, 18])
    crayon = panoptic_lookup(
        [known.segmentation], [known.segment_ids], [known.segment_classes], grid=(6, 6)
    )
    processor = CollavoProcessor.from_llava(llava())
    prompt = processor.prompt(QUESTION)
    one, other = (
        processor(PICTURES[2], prompt, each, return_tensors="pt") for each in (known, crayon)
    )
    assert_has_all_of(other, one)
    tiled = CollavoProcessor.from_llava(llava_next())
    with pytest.raises(ValueError, match=r"panoptic\[0\]: expected a PanopticMap.*into tiles"):
        tiled(PICTURES[2], prompt, crayon)


def test_a_limit_that_no_answer_fits_is_named() -> None:
    """The first answer ends behind 36 image tokens, which are never cut."""
    processor = CollavoProcessor.from_llava(llava())
    with pytest.raises(OverlongError, match=r"conversations\[0\]: nothing of its answer is left"):
        processor.training_batch(TURNS[:1], [PICTURES[:1]], max_length=20)


def test_tokens_that_are_not_those_expected_are_named() -> None:
    """Another release could make other tokens of an image: no crayon is laid over them."""
    own = llava()
    processor = CollavoProcessor.from_llava(own)
    layout = processor._layout(24, 24)
    processor._layout = lambda *_: layout
    own.vision_feature_select_strategy = "full"
    with pytest.raises(ValueError, match=r"text\[0\]: expected 36 image tokens .*got 37"):
        processor(PICTURES[:1], processor.prompt(QUESTION))


def test_a_prompt_needs_a_chat_template() -> None:
    processor = CollavoProcessor.from_llava(with_(llava(), chat_template=None))
    with pytest.raises(ValueError, match="chat_template: expected one, got none"):
        processor.prompt(QUESTION)
