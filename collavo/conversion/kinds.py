"""What a kind of folder has to say to be converted."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any, Literal

import collavo._requirements  # noqa: F401  (before what it checks)

import torch

from collavo.configuration import CRAYON_MODES
from collavo.conversion.plan import Header, Plan

_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


@dataclass(frozen=True)
class Options:
    """What a user can ask of a conversion.

    Args:
        dtype: Of the target's floating tensors; None keeps every file's own.
        quantize: ``"nf4"`` writes the decoder's linear layers in 4 bits.
        crayon_mode: Of the target; None is the source's own way.
        image_token: The image token's word, or its id; None is ``<image>``.
        vision_folder: The CLIP tower of a LLaVA in its own repository's format that lacks it, or
            lacks its settings.
        projector: A file of LLaVA's projector, such as ``mm_projector.bin``, which takes the place
            of the source's.
        chat_template: The name of the processor's template, for a LLaVA in its own repository's
            format; None is LLaVA's own choice by the kind of decoder.

    Raises:
        ValueError: naming the option that is none of these.
    """

    dtype: torch.dtype | None = None
    quantize: Literal["nf4"] | None = None
    crayon_mode: str | None = None
    image_token: str | int | None = None
    vision_folder: str | PathLike[str] | None = None
    projector: str | PathLike[str] | None = None
    chat_template: str | None = None

    def __post_init__(self) -> None:
        """Check what a caller in Python gives."""
        token = self.image_token
        known = type(token) in (int, str, type(None))
        for name, fits, expected in (
            (
                "dtype",
                self.dtype in (None, *_DTYPES),
                "None or one of " + ", ".join(map(str, _DTYPES)),
            ),
            ("quantize", self.quantize in (None, "nf4"), "None or 'nf4'"),
            (
                "crayon_mode",
                self.crayon_mode in (None, *CRAYON_MODES),
                f"None or one of {CRAYON_MODES}",
            ),
            ("image_token", known, "None, a word or an id"),
        ):
            if not fits:
                raise ValueError(f"{name}: expected {expected}, got {getattr(self, name)!r}")


@dataclass(frozen=True)
class ImageToken:
    """Which token stands for an image, as the source's tokenizer has it.

    Args:
        word: Its text.
        token_id: Its id: the tokenizer's own, or the next one, which the tokenizer gets.
        vocabulary: How many ids the tokenizer has, the image token's included.
    """

    word: str
    token_id: int
    vocabulary: int


@dataclass(frozen=True)
class SourceKind:
    """A kind of folder and how it is converted.

    Args:
        title: What it is, for messages, e.g. ``"the official CoLLaVO"``.
        fits: Whether a ``config.json`` (its content) is of this kind.
        plan: ``plan(where, headers, config_values, options, image_token) -> (config, plan)``;
            ``image_token`` is None where the folder has no tokenizer. ``config`` is what the target
            says in ``config.json``, with ``quantize`` as the options have it and no ``dtype``,
            which is written by the conversion itself, as is ``adapter_dtype``. The plan is dense
            and in the files' dtypes; its ``decoder`` names what goes to 4 bits. Raises ValueError
            for what does not fit.
        read_tokenizer: ``read_tokenizer(folder)`` returns the folder's fast tokenizer, or None
            where it has none.
        write_companions: ``write_companions(source, target, config, tokenizer)`` writes what lies
            beside weights and configuration: generation settings, processor, tokenizer. The
            tokenizer is what ``read_tokenizer`` gave, with the image token added.
        gives_official: Whether it is converted by ``--to-official``, and only so.
        image_token_id: The id of the image token that a ``config.json`` names, None where it names
            none.
    """

    title: str
    fits: Callable[[Mapping[str, Any]], bool]
    plan: Callable[
        [str, Mapping[str, Header], Mapping[str, Any], Options, ImageToken | None],
        tuple[Any, Plan],
    ]
    read_tokenizer: Callable[[Path], Any]
    write_companions: Callable[[Path, Path, Any, Any], None]
    gives_official: bool = False
    image_token_id: Callable[[Mapping[str, Any]], int | None] = lambda values: None
