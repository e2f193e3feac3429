"""The folders that a LLaVA is built of: a language model's and a CLIP tower's."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from os import PathLike
from pathlib import Path
from typing import Any, NamedTuple

import collavo._requirements  # noqa: F401  (before what it checks)

from huggingface_hub.errors import StrictDataclassError
from tokenizers import Tokenizer
from transformers import (
    CONFIG_MAPPING,
    MODEL_FOR_CAUSAL_LM_MAPPING,
    CLIPVisionConfig,
    PreTrainedTokenizerFast,
)
from transformers.utils.peft_utils import ADAPTER_CONFIG_NAME

from collavo._arguments import expect_path
from collavo._relatives import way_of
from collavo.conversion.companions import read_own_tokenizer
from collavo.conversion.projector import ProjectorSource
from collavo.conversion.stream import Weights
from collavo.conversion.tokenizer import SENTENCEPIECE_FILE, read_official_tokenizer
from collavo.conversion.weights import FolderWeights
from collavo.model.decoders import DECODERS
from collavo.model.files import check_generation, read_config_file

_CLIP_TYPES = ("clip", "clip_vision_model")
_HEAD_CLASS = "ForCausalLM"
_PROBE = "A horse isn't in this picture: yes 2,024 (été) 你好\n\n  def f(x):\n\tpass  "
_log = logging.getLogger(__name__)


class LanguageFolder(NamedTuple):
    """A language model's folder.

    Attributes:
        folder: Where it lies.
        values: Its ``config.json``.
        weights: Its tensors.
        tokenizer: Its own, a fast one.
    """

    folder: Path
    values: dict[str, Any]
    weights: Weights
    tokenizer: Any


class TowerFolder(NamedTuple):
    """A CLIP tower's folder.

    Attributes:
        folder: Where it lies.
        values: The tower's configuration.
        weights: The folder's tensors, CLIP's text model among them where it has one.
    """

    folder: Path
    values: dict[str, Any]
    weights: Weights


class Parts(NamedTuple):
    """All that a LLaVA is made of.

    Attributes:
        language: The language model.
        tower: CLIP's.
        projector: The projector; the kind of one that is drawn.
        select_layer: Which of the tower's layers gives the features.
        image_mode: As of ``make_image_processor``.
        template: Jinja.
    """

    language: LanguageFolder
    tower: TowerFolder
    projector: ProjectorSource | str
    select_layer: int
    image_mode: str
    template: str


def read_language(folder: str | PathLike[str]) -> LanguageFolder:
    """Look at a language model's folder; no tensor is read.

    Args:
        folder: As transformers writes it: ``config.json``, weights, a fast tokenizer.

    Raises:
        FileNotFoundError: naming the folder or file that is missing.
        ValueError: naming what is not that of a decoder that carries the crayon, is quantised, or
            cannot be read.
    """
    values = _read_config("language_folder", folder)
    return language_of(folder, values, None)


def language_of(
    folder: str | PathLike[str], values: dict[str, Any], weights: Weights | None
) -> LanguageFolder:
    """Look at a folder that holds a language model, and maybe more.

    Args:
        folder: Has the tokenizer.
        values: The language model's configuration.
        weights: Its tensors; None takes those of the folder.

    Raises:
        FileNotFoundError: naming the file that is missing.
        ValueError: as :func:`read_language`.
    """
    kind = values.get("model_type")
    _refuse_quantized(folder, values)
    known: Any = CONFIG_MAPPING[kind] if isinstance(kind, str) and kind in CONFIG_MAPPING else None
    named: Any = MODEL_FOR_CAUSAL_LM_MAPPING.get(known, None)
    name = "" if named is None else named.__name__
    if name.removesuffix(_HEAD_CLASS) not in DECODERS:
        way = f"; {found}" if (found := way_of(values)) is not None else ""
        raise ValueError(
            f"{folder}: expected a language model of one of the shapes {', '.join(DECODERS)}, got "
            f"model_type {kind!r} with architectures {values.get('architectures')!r}{way}"
        )
    classes = values.get("architectures")
    if classes and name not in classes:
        raise ValueError(f"{folder}: architectures: expected {name}, got {classes!r}")
    check_generation(Path(folder))
    tokenizer = _read_tokenizer(Path(folder))
    if tokenizer.eos_token_id is None:
        raise ValueError(
            f"{folder}: expected a tokenizer with an end-of-text token, which answers end with; "
            "name it in tokenizer_config.json as eos_token"
        )
    weights = FolderWeights(folder) if weights is None else weights
    return LanguageFolder(Path(folder), values, weights, tokenizer)


def _read_tokenizer(folder: Path) -> Any:
    """Read a tokenizer as its file has it.

    Some of transformers' classes, picked by the kind of model, cut a text by rules of their own.
    """
    file = folder / "tokenizer.json"
    sentencepiece = not file.is_file() and (folder / SENTENCEPIECE_FILE).is_file()
    read: Any = read_official_tokenizer if sentencepiece else read_own_tokenizer
    tokenizer = read(folder)
    if tokenizer is None:
        raise FileNotFoundError(
            f"{folder}: expected a tokenizer (tokenizer.json and tokenizer_config.json), found none"
        )
    if file.is_file():
        own = Tokenizer.from_file(str(file)).encode(_PROBE, add_special_tokens=False).ids
        if own != tokenizer(_PROBE, add_special_tokens=False)["input_ids"]:
            _log.warning(
                "%s: is taken as it is; %s, which transformers takes for this kind of model, "
                "gives other ids", file, type(tokenizer).__name__,
            )  # fmt: skip
            return PreTrainedTokenizerFast.from_pretrained(folder)
    return tokenizer


def read_tower(folder: str | PathLike[str]) -> TowerFolder:
    """Look at a CLIP tower's folder; no tensor is read.

    Args:
        folder: Of a ``CLIPModel`` or a ``CLIPVisionModel``, with or without its projection.

    Raises:
        FileNotFoundError: naming the folder or file that is missing.
        ValueError: naming what is no CLIP, is quantised, or cannot be read.
    """
    values = _read_config("vision_folder", folder)
    kind = values.get("model_type")
    if kind not in _CLIP_TYPES:
        raise ValueError(
            f"{folder}: expected a CLIP tower, model_type 'clip' or 'clip_vision_model', got "
            f"{kind!r}"
        )
    _refuse_quantized(folder, values)
    if kind == "clip":
        # Files of before transformers 4.31 hold settings that differ from CLIP's own defaults only.
        values = values.get("vision_config") or values.get("vision_config_dict") or {}
    check_tower(folder, values)
    return TowerFolder(Path(folder), dict(values), FolderWeights(folder))


def _read_config(argument: str, folder: str | PathLike[str]) -> dict[str, Any]:
    expect_path(argument, folder, "a model folder")
    values = read_config_file(folder)
    if (Path(folder) / ADAPTER_CONFIG_NAME).is_file():
        raise ValueError(
            f"{folder}: holds an adapter ({ADAPTER_CONFIG_NAME}), which would be lost; merge it "
            "into the model with PEFT's merge_and_unload(), or remove its files"
        )
    return values


def _refuse_quantized(folder: str | PathLike[str], values: Mapping[str, Any]) -> None:
    asked = values.get("quantization_config")
    if asked is not None:
        kind = asked.get("quant_method") if isinstance(asked, Mapping) else asked
        raise ValueError(
            f"{folder}: quantization_config: expected dense weights, got {kind!r}; take the folder "
            "as it was before it was quantised, and ask for --quantize nf4"
        )


def check_tower(folder: str | PathLike[str], values: Mapping[str, Any]) -> None:
    """Raise unless a configuration is a CLIP tower's.

    Args:
        folder: What it is of.
        values: The configuration.

    Raises:
        ValueError: naming what cannot be read, or sizes that do not fit each other.
    """
    try:
        config: Any = CLIPVisionConfig.from_dict(dict(values))
        sizes = (config.image_size, config.patch_size)
    except (AttributeError, KeyError, TypeError, ValueError, StrictDataclassError) as error:
        reason = " ".join(str(error).split())[:300]
        raise ValueError(f"{folder}: its config.json cannot be read ({reason})") from error
    if not all(type(size) is int and size > 0 for size in sizes) or sizes[0] % sizes[1]:
        raise ValueError(
            f"{folder}: image_size, patch_size: expected whole patches, got {sizes[0]}, {sizes[1]}"
        )
