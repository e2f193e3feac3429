"""What vision-language models of transformers have in common, whatever their class.

A model has a decoder, image tokens that stand in the text, each for one place of an image, and
functions that encode images to one feature per image token.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any, cast

import collavo._requirements  # noqa: F401  (before what it checks)

import torch
from torch import Tensor, nn

MODALITIES = ("image", "video")
_DECODERS = ("language_model", "text_model")
# What a configuration has whose image tokens are latents: each has looked at the whole image.
_RESAMPLERS = ("perceiver_config", "qformer_config")
# Inputs that images come in; the others of the functions that encode them say more about these.
_PIXELS = ("pixel_values", "pixel_values_images", "pixel_values_videos")


def decoder_of(model: Any) -> nn.Module:
    """Return the decoder of a vision-language model without its head.

    Args:
        model: Such a model, e.g. ``LlavaModel``.

    Raises:
        TypeError: if it has none with ``layers``.
    """
    for name in _DECODERS:
        decoder = getattr(model, name, None)
        if isinstance(getattr(decoder, "layers", None), nn.ModuleList):
            return cast(nn.Module, decoder)
    raise TypeError(
        f"model: expected a decoder with layers as one of {', '.join(_DECODERS)}, got "
        f"{type(model).__name__}, which has none"
    )


def token_ids(model: Any) -> dict[str, int]:
    """Return the id of the token that stands for a place of an image, and of a video.

    Args:
        model: A vision-language model without its head.
    """
    encoded = [each for each in MODALITIES if hasattr(model, f"get_{each}_features")]
    tokens = {modality: token_id(model.config, modality) for modality in encoded}
    return {modality: token for modality, token in tokens.items() if token is not None}


def token_id(config: Any, modality: str = "image") -> int | None:
    """Return the id of the token that stands for a place of an image, or video.

    Args:
        config: Of a vision-language model; families call it by either of two names.
        modality: ``"image"`` or ``"video"``.
    """
    for name in (f"{modality}_token_id", f"{modality}_token_index"):
        if isinstance(value := getattr(config, name, None), int):
            return value
    return None


def check_family(model: Any) -> None:
    """Raise unless a model is one whose image tokens can have a crayon.

    Args:
        model: Anything.

    Raises:
        TypeError: naming what is missing.
    """
    expected = (
        "model: expected a vision-language model of transformers, e.g. "
        f"LlavaForConditionalGeneration, got {type(model).__name__}"
    )
    if not isinstance(model, nn.Module):
        raise TypeError(f"{expected}; from_pretrained loads one")
    inner = getattr(model, "model", None)
    missing = None
    if not isinstance(inner, nn.Module) or not hasattr(model, "generate"):
        missing = "a model without its head as model.model, or generate()"
    elif not any(hasattr(inner, name) for name in _DECODERS):
        missing = f"a decoder as one of model.model's {', '.join(_DECODERS)}"
    elif "image" not in token_ids(inner):
        missing = "config.image_token_id and get_image_features"
    if missing is not None:
        raise TypeError(
            f"{expected}, which lacks {missing}; in other models crayon_context of "
            "collavo_kernels.nn gives the decoder a crayon, and attn_implementation='crayon' runs "
            "this package's attention"
        )
    decoder_of(inner)


def check_places(model: Any) -> None:
    """Raise where image tokens stand for no place of an image.

    Args:
        model: A vision-language model.

    Raises:
        ValueError: naming the model and the setting.
    """
    for name in _RESAMPLERS:
        if getattr(model.config, name, None) is not None:
            raise ValueError(
                f"crayon_mode: expected 'none' for {type(model).__name__}, whose resampler "
                f"(config.{name}) leaves its image tokens no place in the image, so that no "
                "segment could be said to hold one; adapters and quantize work without the crayon"
            )


def vision_width(config: Any) -> int:
    """Return the hidden size of a vision tower; the decoder's where the tower names none.

    Args:
        config: Of a vision-language model.
    """
    width = getattr(getattr(config, "vision_config", None), "hidden_size", None)
    return width if isinstance(width, int) else int(config.get_text_config().hidden_size)


def dtype_of(model: Any) -> torch.dtype:
    """Return the dtype of a model, read where nothing is quantised and scripts upcast nothing.

    That is between tower and decoder: a projector, or whatever else the model has of its own.

    Args:
        model: A vision-language model without its head.
    """
    decoder = decoder_of(model)
    parts = [part for part in model.children() if part is not decoder]
    own = [part for part in parts if not hasattr(part, "config")]
    for part in (*own, *parts, decoder):
        for parameter in part.parameters():
            return cast(torch.dtype, parameter.dtype)
    return cast(torch.dtype, model.dtype)


def image_inputs(model: Any, inputs: Mapping[str, Any]) -> dict[str, tuple[str, ...]]:
    """Return by modality the names of the inputs, of those given, that hold its images.

    Args:
        model: A vision-language model without its head.
        inputs: Of its forward.
    """
    found = {}
    for modality in token_ids(model):
        encode = getattr(model, f"get_{modality}_features")
        names = {*inspect.signature(encode).parameters, f"pixel_values_{modality}s"}
        if modality == "video":
            names.discard("pixel_values")  # what older versions call the video here
        given = tuple(name for name in inputs if name in names and inputs[name] is not None)
        if set(given) & set(_PIXELS):
            found[modality] = given
    return found


def encode_images(model: Any, inputs: Mapping[str, Any]) -> dict[str, Any]:
    """Return by modality what the model makes of the images among its inputs.

    Args:
        model: A vision-language model without its head.
        inputs: Of its forward.
    """
    encoded = {}
    for modality, names in image_inputs(model, inputs).items():
        encode = getattr(model, f"get_{modality}_features")
        known = inspect.signature(encode).parameters
        given = {n: inputs[n] for n in names}
        if modality == "video" and "pixel_values_videos" not in known:
            given["pixel_values"] = given.pop("pixel_values_videos")
        encoded[modality] = encode(**given, return_dict=True)
    return encoded


def find_tokens(
    model: Any, input_ids: Tensor | None, inputs_embeds: Tensor | None
) -> dict[str, Tensor]:
    """Return by modality a bool ``[B, S]``: where its tokens stand.

    Args:
        model: A vision-language model without its head.
        input_ids: int64 ``[B, S]`` or None.
        inputs_embeds: ``[B, S, hidden_size]``, read where there are no ids.

    Raises:
        ValueError: if both are None.
    """
    if input_ids is not None:
        return {name: input_ids == token for name, token in token_ids(model).items()}
    if inputs_embeds is None:
        raise ValueError("input_ids: expected input_ids or inputs_embeds, got neither")
    embed = model.get_input_embeddings()
    found = {}
    for name, token in token_ids(model).items():
        ids = torch.full((), token, dtype=torch.long, device=inputs_embeds.device)
        found[name] = cast(Tensor, (inputs_embeds == embed(ids)).all(-1))
    return found
