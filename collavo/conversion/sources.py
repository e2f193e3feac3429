"""The kinds of folders that can be converted, told by their ``config.json``."""

from __future__ import annotations

from collections.abc import Mapping
from os import PathLike
from pathlib import Path
from typing import Any

import collavo._requirements  # noqa: F401  (before what it checks)

from transformers.utils import CONFIG_NAME

from collavo._relatives import is_llava, is_official
from collavo.configuration import CollavoConfig, CollavoLlavaConfig
from collavo.conversion.companions import (
    copy_tokenizer,
    read_own_tokenizer,
    write_llava_companions,
    write_official_companions,
)
from collavo.conversion.kinds import SourceKind
from collavo.conversion.llava import llava_image_token, plan_llava
from collavo.conversion.official import plan_official
from collavo.conversion.official_config import official_image_token
from collavo.conversion.swap import copy_companions, plan_same
from collavo.conversion.to_official import plan_to_official
from collavo.conversion.tokenizer import read_official_tokenizer

OFFICIAL = SourceKind(
    title="the official CoLLaVO",
    fits=is_official,
    plan=plan_official,
    read_tokenizer=read_official_tokenizer,
    write_companions=write_official_companions,
    image_token_id=official_image_token,
)
LLAVA = SourceKind(
    title="a LLaVA",
    fits=is_llava,
    plan=plan_llava,
    read_tokenizer=read_own_tokenizer,
    write_companions=write_llava_companions,
    image_token_id=llava_image_token,
)
OWN = SourceKind(
    title="a CoLLaVO folder",
    fits=lambda values: values.get("model_type") == CollavoConfig.model_type,
    plan=plan_to_official,
    read_tokenizer=lambda folder: None,
    write_companions=copy_tokenizer,
    gives_official=True,
)
SAME = SourceKind(
    title="a folder of this package with another projector",
    fits=lambda values: False,
    plan=plan_same,
    read_tokenizer=lambda folder: None,
    write_companions=copy_companions,
)
KINDS: tuple[SourceKind, ...] = (OFFICIAL, LLAVA, OWN)


def recognise(folder: str | PathLike[str], values: Mapping[str, Any]) -> SourceKind:
    """Return a folder's kind.

    Args:
        folder: The source of a conversion.
        values: Its ``config.json``.

    Raises:
        ValueError: if it is of no kind that can be converted.
    """
    path = Path(folder) / CONFIG_NAME
    for kind in KINDS:
        if kind.fits(values):
            return kind
    if is_own(values):
        raise ValueError(
            f"{path}: this is a LLaVA with the crayon already, which load_pretrained loads; the "
            "official layout has no place for it"
        )
    known = ", ".join(kind.title for kind in KINDS)
    raise ValueError(
        f"{path}: expected {known}, got model_type {values.get('model_type')!r} with architectures "
        f"{values.get('architectures')!r}"
    )


def is_own(values: Mapping[str, Any]) -> bool:
    """Say whether a folder is one of this package.

    Args:
        values: Its ``config.json``.
    """
    own = (CollavoConfig.model_type, CollavoLlavaConfig.model_type)
    return values.get("model_type") in own


def expect_own(folder: str | PathLike[str], values: Mapping[str, Any]) -> None:
    """Raise unless a folder is one of this package.

    Args:
        folder: The folder.
        values: Its ``config.json``.

    Raises:
        ValueError: naming its ``model_type``.
    """
    if not is_own(values):
        raise ValueError(
            f"{folder}: expected a folder of this package beside --to-llava, got model_type "
            f"{values.get('model_type')!r}"
        )
