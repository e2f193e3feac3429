"""Tiny random vision-language models of transformers, and batches with images as each takes them.

A family's images differ: one picture, a base and crops with tokens that end a line, pictures of
several sizes in one tensor, a padded list for each sample, frames of a video.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import transformers as hf
from torch import Tensor
from transformers.models.got_ocr2.configuration_got_ocr2 import GotOcr2VisionConfig
from transformers.models.idefics3.configuration_idefics3 import Idefics3VisionConfig
from transformers.models.internvl.configuration_internvl import InternVLVisionConfig
from transformers.models.janus.configuration_janus import JanusVisionConfig, JanusVQVAEConfig
from transformers.models.ovis2.configuration_ovis2 import Ovis2VisionConfig
from transformers.models.smolvlm.configuration_smolvlm import SmolVLMVisionConfig

IMAGE, VIDEO, HIDDEN = 63, 62, 64
# What images come in, and how many tokens each image of each sample has.
Images = tuple[dict[str, Tensor], list[list[int]]]

_TEXT: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": HIDDEN,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
}
_TOWER: dict[str, Any] = {
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 8,
    "patch_size": 4,
}


def _draw(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


def _pictures(size: int, tokens: int) -> Callable[[list[int]], Images]:
    """One tensor of pictures, each of so many tokens."""

    def make(counts: list[int]) -> Images:
        pixels = _draw(sum(counts), 3, size, size)
        return {"pixel_values": pixels}, [[tokens] * count for count in counts]

    return make


def _padded(size: int, tokens: int) -> Callable[[list[int]], Images]:
    """A list of pictures for each sample, padded with zeros."""

    def make(counts: list[int]) -> Images:
        pixels = _draw(len(counts), max(counts), 3, size, size)
        for sample, count in enumerate(counts):
            pixels[sample, count:] = 0.0
        return {"pixel_values": pixels}, [[tokens] * count for count in counts]

    return make


# Height and width; patches; tokens of a base, and of crops whose lines end with one token more.
_SIZES = ((16, 16, 5, 4 + 4 * 5), (8, 16, 3, 4 + 2 * 5))


def _any_resolution(counts: list[int]) -> Images:
    """A base and crops, of two sizes: the patches of the smaller one are padded."""
    kinds = [_SIZES[i % 2] for i in range(sum(counts))]
    pixels = _draw(len(kinds), max(kind[2] for kind in kinds), 3, 8, 8)
    for i, kind in enumerate(kinds):
        pixels[i, kind[2] :] = 0.0
    tokens = [kind[3] for kind in kinds]
    sizes = torch.tensor([kind[:2] for kind in kinds])
    return {"pixel_values": pixels, "image_sizes": sizes}, _split(tokens, counts)


def _one_vision(counts: list[int]) -> Images:
    """As any resolution where a sample has one image; else each is one picture and a line's end."""
    inputs, tokens = _any_resolution(counts)
    inputs["batch_num_images"] = torch.tensor(counts)
    return inputs, [own if len(own) == 1 else [5] * len(own) for own in tokens]


def _pixtral(counts: list[int]) -> Images:
    """Pictures of two sizes in one tensor, merged two by two patches."""
    kinds = [((16, 16), 4), ((8, 16), 2)]
    chosen = [kinds[i % 2] for i in range(sum(counts))]
    pixels = _draw(len(chosen), 3, 16, 16)
    for i, ((height, width), _) in enumerate(chosen):
        pixels[i, :, height:], pixels[i, :, :, width:] = 0.0, 0.0
    sizes = torch.tensor([size for size, _ in chosen])
    tokens = [count for _, count in chosen]
    return {"pixel_values": pixels, "image_sizes": sizes}, _split(tokens, counts)


def _video_pictures(counts: list[int]) -> Images:
    inputs, tokens = _pictures(8, 4)(counts)
    return {"pixel_values_images": inputs["pixel_values"]}, tokens


def _videos(frames: int, tokens: int) -> Callable[[list[int]], Images]:
    def make(counts: list[int]) -> Images:
        pixels = _draw(sum(counts), frames, 3, 8, 8)
        return {"pixel_values_videos": pixels}, [[tokens] * count for count in counts]

    return make


def _split(tokens: list[int], counts: list[int]) -> list[list[int]]:
    rest = iter(tokens)
    return [[next(rest) for _ in range(count)] for count in counts]


def _llava_like(name: str, text: Any, tower: Any, **options: Any) -> Callable[[], Any]:
    def make() -> Any:
        options.setdefault("image_token_index", IMAGE)
        config = getattr(hf, f"{name}Config")(vision_config=tower, text_config=text, **options)
        return getattr(hf, f"{name}ForConditionalGeneration")(config)

    return make


_LLAMA, _MISTRAL = hf.LlamaConfig(**_TEXT), hf.MistralConfig(**_TEXT, sliding_window=None)
_QWEN2 = hf.Qwen2Config(**_TEXT)
_CLIP, _SIGLIP = hf.CLIPVisionConfig(**_TOWER), hf.SiglipVisionConfig(**_TOWER)
_PIXTRAL = hf.PixtralVisionConfig(**(_TOWER | {"image_size": 16}))
_IDEFICS = _TOWER | {"image_size": 16}
_PINPOINTS = [[16, 16], [8, 16]]
_VIDEO_TOKENS = {"video_token_index": VIDEO}
_INTERN = InternVLVisionConfig(**(_TOWER | {"image_size": [8, 8], "patch_size": [2, 2]}))
_GOT = GotOcr2VisionConfig(
    hidden_size=16,
    output_channels=8,
    num_hidden_layers=2,
    num_attention_heads=2,
    image_size=32,
    patch_size=4,
    window_size=2,
    global_attn_indexes=[1],
    mlp_dim=16,
)
_OVIS = Ovis2VisionConfig(**_TOWER, vocab_size=12)
_JANUS = JanusVisionConfig(
    hidden_size=16,
    num_hidden_layers=1,
    num_attention_heads=2,
    image_size=8,
    patch_size=4,
    projection_dim=HIDDEN,
    num_image_tokens=4,
    depth=1,
)
_VQ = JanusVQVAEConfig(
    embed_dim=8,
    num_embeddings=16,
    latent_channels=32,
    base_channels=32,
    channel_multiplier=[1, 1],
    num_res_blocks=1,
    num_patches=4,
    projection_dim=HIDDEN,
    num_hidden_layers=1,
    image_token_embed_dim=HIDDEN,
)
_NEXT = {"image_grid_pinpoints": _PINPOINTS, "vision_feature_layer": -1}
_OVIS_TOKENS = {"visual_indicator_token_ids": [57, 58, 59, 60, 61], "image_token_id": IMAGE}


@dataclass(frozen=True)
class Family:
    """A class of models.

    Attributes:
        make: Returns one without values of our own.
        images: Returns images for samples with so many each, and their tokens.
        token: The token that stands for a place of them.
    """

    make: Callable[[], Any]
    images: Callable[[list[int]], Images]
    token: int = IMAGE


_NEXT_VIDEO = _llava_like("LlavaNextVideo", _LLAMA, _CLIP, **_NEXT, **_VIDEO_TOKENS)
_ONE_VISION = _llava_like("LlavaOnevision", _QWEN2, _SIGLIP, **_NEXT, **_VIDEO_TOKENS)
_VIDEO_LLAVA = _llava_like("VideoLlava", _LLAMA, _CLIP, vision_feature_layer=-1, **_VIDEO_TOKENS)

FAMILIES: dict[str, Family] = {
    "llava": Family(_llava_like("Llava", _LLAMA, _CLIP, vision_feature_layer=-1), _pictures(8, 4)),
    "llava_next": Family(_llava_like("LlavaNext", _MISTRAL, _CLIP, **_NEXT), _any_resolution),
    "llava_next_video": Family(_NEXT_VIDEO, _any_resolution),
    "llava_next_video, videos": Family(_NEXT_VIDEO, _videos(3, 3), VIDEO),
    "llava_onevision": Family(_ONE_VISION, _one_vision),
    "llava_onevision, videos": Family(_ONE_VISION, _videos(3, 4), VIDEO),
    "vipllava": Family(
        _llava_like(
            "VipLlava", _LLAMA, _CLIP, vision_feature_layers=[-1, -2], vision_feature_layer=[-1, -2]
        ),
        _pictures(8, 4),
    ),
    "video_llava": Family(_VIDEO_LLAVA, _video_pictures),
    "video_llava, videos": Family(_VIDEO_LLAVA, _videos(2, 10), VIDEO),
    "mistral3": Family(_llava_like("Mistral3", _MISTRAL, _PIXTRAL), _pixtral),
    "internvl": Family(
        _llava_like("InternVL", _QWEN2, _INTERN, image_token_id=IMAGE), _pictures(8, 4)
    ),
    "got_ocr2": Family(_llava_like("GotOcr2", _QWEN2, _GOT), _pictures(32, 4)),
    "ovis2": Family(
        _llava_like("Ovis2", _QWEN2, _OVIS, hidden_size=HIDDEN, vocab_size=64, **_OVIS_TOKENS),
        _pictures(8, 4),
    ),
    "janus": Family(
        _llava_like("Janus", _LLAMA, _JANUS, vq_config=_VQ, image_token_id=IMAGE),
        _pictures(8, 4),
    ),
    "idefics3": Family(
        _llava_like("Idefics3", _LLAMA, Idefics3VisionConfig(**_IDEFICS), image_token_id=IMAGE),
        _padded(16, 4),
    ),
    "smolvlm": Family(
        _llava_like("SmolVLM", _LLAMA, SmolVLMVisionConfig(**_IDEFICS), image_token_id=IMAGE),
        _padded(16, 4),
    ),
    # Decoders whose linear layers carry the crayon, in models of other kinds.
    "llava_next, olmo2": Family(
        _llava_like("LlavaNext", hf.Olmo2Config(**_TEXT), _CLIP, **_NEXT), _any_resolution
    ),
    "internvl, qwen3": Family(
        _llava_like(
            "InternVL", hf.Qwen3Config(**_TEXT, head_dim=16), _INTERN, image_token_id=IMAGE
        ),
        _pictures(8, 4),
    ),
    "idefics3, phi3": Family(
        _llava_like(
            "Idefics3",
            hf.Phi3Config(**_TEXT),
            Idefics3VisionConfig(**_IDEFICS),
            image_token_id=IMAGE,
        ),
        _padded(16, 4),
    ),
}


def make_family(name: str) -> Any:
    """Return a stock model, biases and norms drawn too, answers far from ties."""
    torch.manual_seed(5)
    model = FAMILIES[name].make().eval()
    for parameter in model.parameters():
        parameter.data.add_(torch.randn_like(parameter), alpha=0.1)
    return model


def make_inputs(name: str, counts: list[int]) -> dict[str, Tensor]:
    """Return a left-padded batch whose samples have so many images, and its crayon."""
    family = FAMILIES[name]
    images, tokens = family.images(counts)
    generator = torch.Generator().manual_seed(3)
    rows = []
    for own in tokens:
        row = [1]
        for count in own:
            row += [family.token] * count + [7 + len(row) % 20, 9]
        rows.append(row)
    length, places = max(map(len, rows)), max(sum(own) for own in tokens)
    index = torch.randint(-1, 3, (len(rows), places), generator=generator, dtype=torch.int32)
    for sample, own in enumerate(tokens):
        index[sample, sum(own) :] = -1
    return {
        "input_ids": torch.tensor([[0] * (length - len(row)) + row for row in rows]),
        "attention_mask": torch.tensor(
            [[0] * (length - len(row)) + [1] * len(row) for row in rows]
        ),
        **images,
        "crayon_index": index,
        "crayon_class": torch.randint(0, 9, (len(rows), 3), generator=generator),
        "crayon_number": torch.randint(0, 4, (len(rows), 3), generator=generator),
    }
