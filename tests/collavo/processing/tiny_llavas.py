"""Processors of transformers' families, with small tiles and a small tokenizer, and no download."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
import transformers
from transformers.models.pixtral import image_processing_pil_pixtral
from transformers.models.smolvlm import processing_smolvlm
from transformers.processing_utils import ProcessorMixin

from tests.collavo.tiny import tiny_tokenizer

# Pixels are brightness, from 0 to 1, and padding is black.
BRIGHTNESS = {"image_mean": [0.0] * 3, "image_std": [1.0] * 3}
TURN = (
    "{{% for m in messages %}}{{{{ '<t>' + m['role'] + ':' }}}}"
    "{{% for c in m['content'] if c['type'] == 'image' %}}{{{{ '{image}\n' }}}}{{% endfor %}}"
    "{{% for c in m['content'] if c['type'] == 'text' %}}{{{{ ' ' + c['text'] }}}}{{% endfor %}}"
    "{{{{ '</s>\n' if m['role'] == 'assistant' else '' }}}}{{% endfor %}}"
    "{{% if add_generation_prompt %}}{{{{ '<t>assistant:' }}}}{{% endif %}}"
)


def tokenizer(*special: str, **named: str) -> Any:
    """The tiny tokenizer with more special tokens, some of which have an attribute's name."""
    plain = tiny_tokenizer([" user: assistant:"])
    names = {
        one: getattr(plain, one) for one in ("pad_token", "bos_token", "eos_token", "unk_token")
    }
    made = transformers.PreTrainedTokenizerFast(
        tokenizer_object=plain.backend_tokenizer,
        padding_side="left",
        clean_up_tokenization_spaces=False,
        extra_special_tokens=named,
        **names,
    )
    made.add_tokens(["<t>", *special], special_tokens=True)
    return made


def template(image: str = "<image>") -> str:
    return TURN.format(image=image)


def videos(name: str) -> Any:
    """A video processor, or where torchvision is missing something in its place: none is run."""
    if importlib.util.find_spec("torchvision") is None:
        return mock.Mock(spec=["to_dict"])
    return getattr(transformers, name)()


def images_of(name: str, **settings: Any) -> Any:
    """An image processor about brightness; some releases have some with torchvision only."""
    kind = getattr(transformers, name)
    if getattr(kind, "is_dummy", False):
        pytest.skip(f"transformers {transformers.__version__} has {name} with torchvision only")
    return kind(**settings, **BRIGHTNESS)


def build(kind: Any, **parts: Any) -> Any:
    # A class of transformers that takes videos cannot be made without torchvision.
    if isinstance(parts.get("video_processor"), mock.Mock):
        with mock.patch.object(ProcessorMixin, "check_argument_for_proper_class"):
            return kind(**parts)
    return kind(**parts)


def llava(strategy: str = "default", images: Any = None, **options: Any) -> Any:
    crop = {"size": {"shortest_edge": 24}, "crop_size": {"height": 24, "width": 24}}
    return build(
        transformers.LlavaProcessor,
        image_processor=images or images_of("CLIPImageProcessorPil", **crop),
        tokenizer=tokenizer(),
        patch_size=4,
        vision_feature_select_strategy=strategy,
        num_additional_image_tokens=1,
        chat_template=template(),
        **options,
    )


def llava_padded() -> Any:
    crop = {"size": {"shortest_edge": 26}, "crop_size": {"height": 26, "width": 26}}
    return llava(images=images_of("LlavaImageProcessorPil", do_pad=True, **crop))


def llava_squashed() -> Any:
    size = {"height": 24, "width": 32}
    return llava(images=images_of("SiglipImageProcessorPil", size=size), strategy="full")


PINPOINTS = [[48, 24], [24, 48], [48, 48], [72, 24], [24, 72]]


def llava_next(strategy: str = "default", patch_size: int = 4) -> Any:
    images = images_of("LlavaNextImageProcessorPil",
        size={"shortest_edge": 24}, crop_size={"height": 24, "width": 24},
        image_grid_pinpoints=PINPOINTS,
    )  # fmt: skip
    return build(
        transformers.LlavaNextProcessor,
        image_processor=images,
        tokenizer=tokenizer(),
        patch_size=patch_size,
        vision_feature_select_strategy=strategy,
        num_additional_image_tokens=1,
        chat_template=template(),
    )


def llava_next_video() -> Any:
    images = llava_next().image_processor
    return build(
        transformers.LlavaNextVideoProcessor,
        image_processor=images,
        video_processor=videos("LlavaNextVideoVideoProcessor"),
        tokenizer=tokenizer("<video>"),
        patch_size=4,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=template(),
    )


def llava_onevision(most: int = 9) -> Any:
    # 26 pixels in 4-pixel patches: the last two pixels of a tile belong to no token.
    images = images_of(
        "LlavaOnevisionImageProcessorPil",
        size={"height": 26, "width": 26},
        image_grid_pinpoints=[[26 * h, 26 * w] for h in range(1, 4) for w in range(1, 4)],
    )
    return build(
        transformers.LlavaOnevisionProcessor,
        image_processor=images,
        video_processor=videos("LlavaOnevisionVideoProcessor"),
        tokenizer=tokenizer("<video>"),
        num_image_tokens=36,
        vision_feature_select_strategy="full",
        vision_aspect_ratio=f"anyres_max_{most}",
        chat_template=template(),
    )


def video_llava() -> Any:
    crop = {"size": {"shortest_edge": 24}, "crop_size": {"height": 24, "width": 24}}
    return build(
        transformers.VideoLlavaProcessor,
        image_processor=images_of("VideoLlavaImageProcessor", **crop),
        video_processor=videos("VideoLlavaVideoProcessor"),
        tokenizer=tokenizer("<video>"),
        patch_size=4,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=template(),
    )


def _pixtral_with_pillow() -> Any:
    """The class from its own file; transformers does not show it where torchvision is missing."""
    package = "transformers.models.pixtral"
    name = f"{package}.processing_pixtral_with_pillow"
    if name not in sys.modules:
        origin = importlib.util.find_spec(f"{package}.processing_pixtral").origin
        found = importlib.util.spec_from_file_location(name, origin)
        module = importlib.util.module_from_spec(found)
        sys.modules[name] = module  # where its own decorators look for it
        pillow = {f"{package}.image_processing_pixtral": image_processing_pil_pixtral}
        with mock.patch.dict(sys.modules, pillow):
            found.loader.exec_module(module)
    return sys.modules[name].PixtralProcessor


def pixtral(spatial_merge_size: int = 2) -> Any:
    if importlib.util.find_spec("torchvision") is None:
        kind = _pixtral_with_pillow()
    else:
        kind = transformers.PixtralProcessor
    images = images_of(
        "PixtralImageProcessorPil",
        size={"longest_edge": 64},
        patch_size={"height": 4, "width": 4},
    )
    return build(
        kind,
        image_processor=images,
        tokenizer=tokenizer("[IMG]", "[IMG_BREAK]", "[IMG_END]"),
        patch_size=4,
        spatial_merge_size=spatial_merge_size,
        chat_template=template("[IMG]"),
    )


def internvl() -> Any:
    names = {
        "start_image_token": "<img>", "end_image_token": "</img>",
        "context_image_token": "<IMG_CONTEXT>", "video_token": "<video>",
    }  # fmt: skip
    images = images_of("GotOcr2ImageProcessorPil", size={"height": 24, "width": 24}, max_patches=6)
    return build(
        transformers.InternVLProcessor,
        image_processor=images,
        video_processor=videos("InternVLVideoProcessor"),
        tokenizer=tokenizer(**names),
        image_seq_length=9,
        chat_template=template("<IMG_CONTEXT>"),
    )


def got_ocr2() -> Any:
    if not hasattr(transformers.GotOcr2Processor, "num_image_tokens"):
        pytest.skip(f"transformers {transformers.__version__} expands no placeholder of GOT-OCR2")
    images = images_of("GotOcr2ImageProcessorPil", size={"height": 64, "width": 64})
    return build(
        transformers.GotOcr2Processor,
        image_processor=images,
        tokenizer=tokenizer("<img>", "</img>", "<imgpad>"),
        chat_template=template("<img><imgpad></img>"),
    )


def ovis2(covering: bool = True) -> Any:
    images = images_of("Ovis2ImageProcessorPil",
        size={"height": 24, "width": 24}, crop_to_patches=True, max_patches=6,
        use_covering_area_grid=covering,
    )  # fmt: skip
    names = ("START", "ATOM", "GRID", "COL", "ROW", "END")
    return build(
        transformers.Ovis2Processor,
        image_processor=images,
        tokenizer=tokenizer(*(f"<IMG_{name}>" for name in names)),
        image_seq_length=9,
        chat_template=template(),
    )


def janus() -> Any:
    names = {"image_token": "<pic>", "boi_token": "<boi>", "eoi_token": "<eoi>"}
    images = images_of("JanusImageProcessorPil", size={"height": 24, "width": 24})
    made = build(
        transformers.JanusProcessor,
        image_processor=images,
        tokenizer=tokenizer(**names),
        chat_template=template("<pic>"),
    )
    made.num_image_tokens = 36  # older releases do not take it
    return made


def _marks() -> list[str]:
    rows = [f"<row_{i + 1}_col_{j + 1}>" for i in range(6) for j in range(6)]
    return ["<fake_token_around_image>", "<end_of_utterance>", "<global-img>", *rows]


def idefics3(split: bool = True) -> Any:
    images = images_of("Idefics3ImageProcessorPil",
        size={"longest_edge": 72}, max_image_size={"longest_edge": 24}, do_image_splitting=split,
    )  # fmt: skip
    return build(
        transformers.Idefics3Processor,
        image_processor=images,
        tokenizer=tokenizer(*_marks()),
        image_seq_len=9,
        chat_template=template(),
    )


def smolvlm() -> Any:
    images = images_of(
        "SmolVLMImageProcessorPil",
        size={"longest_edge": 72},
        max_image_size={"longest_edge": 24},
    )
    with mock.patch.object(processing_smolvlm, "num2words", print):  # for videos alone
        return build(
            transformers.SmolVLMProcessor,
            image_processor=images,
            video_processor=videos("SmolVLMVideoProcessor"),
            tokenizer=tokenizer("<video>", *_marks()),
            image_seq_len=9,
            chat_template=template(),
        )


BUILDERS: dict[str, Callable[[], Any]] = {
    one.__name__: one
    for one in (
        llava, llava_padded, llava_squashed, llava_next, llava_next_video, llava_onevision,
        video_llava, pixtral, internvl, got_ocr2, ovis2, janus, idefics3, smolvlm,
    )
}  # fmt: skip
