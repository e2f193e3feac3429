"""``collavo build``: a LLaVA folder from a language model's folder and a CLIP tower's."""

from __future__ import annotations

from functools import partial
from os import PathLike
from pathlib import Path
from typing import Literal

import collavo._requirements  # noqa: F401  (before what it checks)

import torch

from collavo._arguments import expect_path
from collavo.configuration import PROJECTOR_TYPES, CollavoConfig
from collavo.conversion.built_companions import (
    check_image_mode,
    write_built_companions,
)
from collavo.conversion.built_plan import plan_built
from collavo.conversion.joined import JoinedWeights
from collavo.conversion.kinds import Options
from collavo.conversion.parts import Parts, read_language, read_tower
from collavo.conversion.projector import ProjectorSource, check_type, read_projector
from collavo.conversion.special_tokens import add_special_tokens
from collavo.conversion.stream import Weights
from collavo.conversion.target import Conversion, expect_empty, write_target
from collavo.processing.chat_templates import chat_template as template_of


def build_llava(
    language_folder: str | PathLike[str],
    vision_folder: str | PathLike[str],
    target: str | PathLike[str],
    *,
    projector_type: Literal["mlp2x_gelu", "linear"] | None = None,
    projector: str | PathLike[str] | None = None,
    quantize: Literal["nf4"] | None = None,
    image_mode: str = "pad",
    chat_template: str = "vicuna_v1",
    crayon_mode: Literal["attention", "projection", "none"] = "attention",
    dtype: torch.dtype | None = None,
    seed: int = 0,
    progress: bool = False,
) -> Conversion:
    """Build a LLaVA with the crayon, untrained, from a language model and a CLIP tower.

    A language model of LLaMA's shape becomes a CoLLaVO; every other decoder that carries the crayon
    (Mistral, Qwen2, ...) a LLaVA of transformers that ``apply_to_llava`` changed. The projector is
    drawn as PyTorch draws linear layers, which is what LLaVA's own code trains from; the crayon has
    no effect until it is trained. The tokenizer gets ``<image>`` and, where it has none or pads
    with its unknown, first or last token, ``<pad>``. Where embedding and head have no rows for
    them, both get the mean of their rows: no untrained token is then ever the likeliest. Features
    are those of the tower's layer before the last without CLS. All else is copied bit for bit.

    Args:
        language_folder: The language model's, with its fast tokenizer; safetensors or weights-only
            torch files.
        vision_folder: The tower's: a ``CLIPModel`` or ``CLIPVisionModel``.
        target: A new or empty folder; ``collavo.loading.load_folder`` reads it.
        projector_type: As of ``CollavoConfig``; ``"linear"`` for LLaMA's shape alone. None takes
            that of ``projector``, else ``"mlp2x_gelu"``.
        projector: A file of a trained projector, LLaVA's ``mm_projector.bin``; None draws one.
        quantize: ``"nf4"`` writes the decoder's linear layers in 4 bits.
        image_mode: As of ``make_image_processor``, for the saved processor.
        chat_template: The name of its template, of those of ``collavo.processing.chat_templates``.
        crayon_mode: As of ``CollavoTextConfig``.
        dtype: Of the written tensors; None keeps the files' own, the projector having the
            language model's.
        seed: Of the projector and the crayon.
        progress: Whether to show a bar.

    Returns:
        What was done.

    Raises:
        FileNotFoundError: naming the file that is missing.
        OSError: naming the file that cannot be written.
        ValueError: naming the folder, tensors, field or argument that does not fit, or the target
            if it is not empty. Nothing is written then.

    Source: arXiv 2304.08485, section 4; arXiv 2310.03744.

    Example:
        >>> build_llava("no-such-folder", "clip", "built")
        Traceback (most recent call last):
            ...
        FileNotFoundError: no-such-folder: no such model folder
    """
    options = Options(dtype=dtype, quantize=quantize, crayon_mode=crayon_mode)
    if projector_type not in (None, *PROJECTOR_TYPES):
        raise ValueError(
            f"projector_type: expected one of {PROJECTOR_TYPES}, got {projector_type!r}"
        )
    if type(seed) is not int or not 0 <= seed < 2**63:
        raise ValueError(f"seed: expected a whole number from 0 to 2**63 - 1, got {seed!r}")
    check_image_mode(image_mode)
    template = template_of(chat_template)
    expect_path("target", target, "a folder")
    target = Path(target)
    expect_empty(target)
    language, tower = read_language(language_folder), read_tower(vision_folder)
    between: ProjectorSource | str = projector_type or "mlp2x_gelu"
    if projector is not None:
        between = read_projector(projector)
        check_type(between, projector_type or between.projector_type)
    parts = Parts(language, tower, between, -2, image_mode, template)
    return write_parts("a new {}", parts, target, options, seed=seed, progress=progress)


def write_parts(
    title: str,
    parts: Parts,
    target: Path,
    options: Options,
    *,
    seed: int = 0,
    progress: bool = False,
) -> Conversion:
    """Write a LLaVA with the crayon; all that can be refused is, before the first byte.

    Args:
        title: What it is, with a place for the kind of model.
        parts: All that it is made of; the tokenizer is changed.
        target: A new or empty folder.
        options: Of which ``dtype``, ``quantize`` and ``crayon_mode`` are read.
        seed: Of what is drawn.
        progress: Whether to show a bar.

    Raises:
        OSError: naming the file that cannot be written.
        ValueError: naming the folder, tensors or field that does not fit.
    """
    language, tower, between = parts.language, parts.tower, parts.projector
    added = add_special_tokens(language.tokenizer, str(language.folder))
    config, plan = plan_built(language, tower, between, options, added, parts.select_layer)
    weights: dict[str, Weights] = {"language": language.weights, "vision": tower.weights}
    if not isinstance(between, str):
        weights["projector"] = between.weights
    own = isinstance(config, CollavoConfig)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return write_target(
            title.format("CoLLaVO" if own else "LLaVA of transformers with the crayon"),
            target,
            (config, plan),
            JoinedWeights(weights),
            options,
            partial(write_built_companions, parts),
            progress=progress,
        )
