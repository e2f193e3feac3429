"""The way back: a model of this package as LLaVA's own repository writes it."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import collavo._requirements  # noqa: F401  (before what it checks)

import torch
from torch import Tensor
from transformers.utils import PROCESSOR_NAME

from collavo.configuration import TEXT_FIELDS, CollavoConfig, CollavoLlavaConfig
from collavo.conversion.companions import copy_tokenizer
from collavo.conversion.kinds import Options
from collavo.conversion.llava import read_llava_config, stock_on_meta
from collavo.conversion.plan import Tensors
from collavo.conversion.shapes import on_meta
from collavo.conversion.stream import Weights
from collavo.conversion.target import Conversion, write_target
from collavo.conversion.weights import FolderWeights
from collavo.model.inventory import part_of
from collavo.model.projector import (
    LLAVA_TOWER,
    OWN_PROJECTOR,
    PROJECTOR_FILE,
    projector_names,
)
from collavo.panoptic.json_files import read_object

_DECODER, _TOWER, _INNER = "model.language_model.", "model.vision_tower.", "vision_model."
_CLASSES = {
    "llama": ("llava_llama", "LlavaLlamaForCausalLM"),
    "mistral": ("llava_mistral", "LlavaMistralForCausalLM"),
    "qwen2": ("llava_qwen", "LlavaQwenForCausalLM"),
}
# Hidden size, layers, patch and image of OpenAI's towers that LLaVA is made with.
_OPENAI = {
    (1024, 24, 14, 336): "openai/clip-vit-large-patch14-336",
    (1024, 24, 14, 224): "openai/clip-vit-large-patch14",
}
_LEFT_OUT = ("architectures", "dtype", "torch_dtype", "transformers_version", "_name_or_path")


def convert_to_llava(
    source: Path, target: Path, values: Mapping[str, Any], options: Options, *, progress: bool
) -> Conversion:
    """Write a LLaVA in the original repository's format, and its ``mm_projector.bin``.

    Args:
        source: A CoLLaVO folder, or one of a LLaVA that ``apply_to_llava`` changed.
        target: A new or empty folder.
        values: The source's ``config.json``.
        options: ``dtype``; ``vision_folder``, the folder or hub id that ``mm_vision_tower`` is to
            name (None: OpenAI's, where the tower has its sizes); ``crayon_mode="none"``, to leave
            out a crayon that was trained.
        progress: Whether to show a bar.

    Raises:
        FileNotFoundError: naming the file that is missing.
        ValueError: naming the setting for which the format has no place, or the tensors.
    """
    for name, given in (
        ("--quantize", options.quantize),
        ("--image-token", options.image_token),
        ("--projector", options.projector),
        ("--template", options.chat_template),
    ):
        if given is not None:
            raise ValueError(f"{name}: expected none beside --to-llava, got {given!r}")
    if options.crayon_mode not in (None, "none"):
        raise ValueError(
            "--crayon-mode: expected none, or 'none' to leave out a trained crayon, beside "
            f"--to-llava, got {options.crayon_mode!r}"
        )
    base, kind, model = _read(source, values)
    weights = FolderWeights(source)
    tensors = Tensors(weights.headers, str(source))
    names = {n for n in model.state_dict() if part_of(n) is None}
    tied = set(getattr(model, "all_tied_weights_keys", None) or {})
    shapes = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    for name in sorted(names - (tied - set(weights.headers))):
        tensors.copy(_name_there(name, kind), name, shapes[name])
    _leave_out_crayon(tensors, force=options.crayon_mode == "none")
    config = _values(base, kind, source, options)
    return write_target(
        "a LLaVA in its own repository's format",
        target,
        (config, tensors.plan()),
        weights,
        options,
        partial(_write_companions, source, weights, kind, options.dtype),
        progress=progress,
    )


def _read(source: Path, values: Mapping[str, Any]) -> tuple[Any, str, Any]:
    """Return a LLaVA's configuration, its kind of projector, and the stock model on "meta"."""
    patched = values.get("model_type") == CollavoLlavaConfig.model_type
    base: Any
    if patched:
        own = CollavoLlavaConfig.from_dict(dict(values))
        base, crayon = own.base(), dict(own.crayon or {})
        adapters = list((crayon.get("decoder") or {}).get("adapters") or ())
        quantize, extra = crayon.get("base"), 0
    else:
        base = CollavoConfig.from_dict(dict(values))
        adapters, quantize, extra = list(base.adapters), base.quantize, base.extra_embeddings
    text = base.get_text_config()
    text_type = "llama" if text.model_type == "collavo_text" else text.model_type
    layer = getattr(base, "vision_feature_layer", None)
    for name, said, fits, expected in (
        ("model_type", base.model_type, base.model_type in ("collavo", "llava"), "a LLaVA-1.5"),
        ("text_config", text_type, text_type in _CLASSES, " or ".join(_CLASSES)),
        ("vision_config", base.vision_config.model_type,
         base.vision_config.model_type == "clip_vision_model", "a CLIP tower"),
        ("adapters", adapters, not adapters, "none: merge them, or write them with "
         "save_peft_adapter and load the model without"),
        ("quantize", quantize, quantize is None, "dense weights"),
        ("extra_embeddings", extra, not extra, "as many rows in the head as in the embedding"),
        ("vision_feature_layer", layer, type(layer) is int, "one layer"),
        ("vision_feature_select_strategy", base.vision_feature_select_strategy,
         base.vision_feature_select_strategy == "default", "'default', without CLS"),
        ("projector_hidden_act", base.projector_hidden_act,
         base.projector_hidden_act == "gelu", "'gelu'"),
    ):  # fmt: skip
        if not fits:
            raise ValueError(
                f"{source}: {name}: expected {expected}, got {said!r}; LLaVA's own format has no "
                "place for it"
            )
    if not patched:
        return base, base.projector_type, on_meta(base)
    stock = read_llava_config(str(source), {**base.to_dict(), "model_type": "llava"})
    return base, "mlp2x_gelu", stock_on_meta(str(source), stock)


def _name_there(name: str, kind: str) -> str:
    if name.startswith(OWN_PROJECTOR):
        return projector_names(kind)[name]
    if name.startswith(_TOWER):
        return f"{LLAVA_TOWER}{_INNER}{name.removeprefix(_TOWER).removeprefix(_INNER)}"
    return name.replace(_DECODER, "model.", 1)


def _leave_out_crayon(tensors: Tensors, *, force: bool) -> None:
    """Take the crayon's tensors, of which the last factor has to be zero unless it is forced."""
    names = [name for name in tensors.headers if part_of(name) is not None]
    for name in names:
        tensors.take(name, tensors.headers[name].shape)
    if not names:
        return
    tensors.note("the crayon is left out" + ("" if force else ", which has no effect yet"))
    last = [name for name in names if name.endswith(".B.weight")]
    last = last or [name for name in names if ".mlp.2." in name]
    if not force:
        tensors.check(last, partial(_expect_zeros, tensors.where, last))


def _expect_zeros(where: str, names: list[str], *tensors: Tensor) -> None:
    for name, tensor in zip(names, tensors, strict=True):
        if tensor.any():
            raise ValueError(
                f"{where}: {name}: expected an untrained crayon, got one that was trained, for "
                "which LLaVA's own format has no place; --crayon-mode none leaves it out"
            )


def _values(base: Any, kind: str, source: Path, options: Options) -> dict[str, Any]:
    """Return ``config.json``, and in ``vision_config`` what LLaVA's own leaves to the hub."""
    text, vision = base.get_text_config(), base.vision_config
    text_type = "llama" if text.model_type == "collavo_text" else text.model_type
    sizes = (vision.hidden_size, vision.num_hidden_layers, vision.patch_size, vision.image_size)
    tower = options.vision_folder or _OPENAI.get(sizes)
    if tower is None:
        raise ValueError(
            "--vision: expected the folder or hub id of the CLIP that mm_vision_tower is to name: "
            f"the tower of {source} is not one of OpenAI's large ones"
        )
    own = {n: v for n, v in text.to_dict().items() if n not in (*TEXT_FIELDS, *_LEFT_OUT)}
    rope = dict(own.pop("rope_parameters", None) or {})
    scaling = {n: v for n, v in rope.items() if n not in ("rope_theta", "rope_type")}
    usual = rope.get("rope_type", "default") == "default"
    seen = {n: v for n, v in vision.to_dict().items() if n not in _LEFT_OUT}
    model_type, architecture = _CLASSES[text_type]
    return {
        **own,
        "model_type": model_type,
        "architectures": [architecture],
        "rope_theta": rope.get("rope_theta", 10000.0),
        "rope_scaling": None if usual else {"type": rope["rope_type"], **scaling},
        "tie_word_embeddings": bool(base.tie_word_embeddings),
        "image_aspect_ratio": _aspect(source),
        "mm_hidden_size": vision.hidden_size,
        "mm_projector_type": kind,
        "mm_use_im_patch_token": False,
        "mm_use_im_start_end": False,
        "mm_vision_select_feature": "patch",
        "mm_vision_select_layer": base.vision_feature_layer,
        "mm_vision_tower": str(tower),
        "unfreeze_mm_vision_tower": True,
        "use_mm_proj": True,
        "vision_config": seen,
    }


def _aspect(source: Path) -> str | None:
    """Return what LLaVA does with a picture that is no square, as the folder's processor does."""
    file = source / PROCESSOR_NAME
    said = read_object(file, utf8=True).get("image_processor", {}) if file.is_file() else {}
    if said.get("do_pad"):
        return "pad"
    if said and not said.get("do_center_crop"):
        raise ValueError(
            f"{file}: image_processor: expected one that pads or crops pictures to squares, as "
            "LLaVA's does, got one that squashes them"
        )
    return None


def _write_companions(
    source: Path,
    weights: Weights,
    kind: str,
    dtype: torch.dtype | None,
    target: Path,
    config: Any,
) -> None:
    copy_tokenizer(source, target, config, None)
    tensors = {
        there: weights.read(own).to(dtype or weights.headers[own].dtype)
        for own, there in projector_names(kind).items()
        if own in weights.headers
    }
    torch.save(tensors, target / PROJECTOR_FILE)
