"""``collavo convert``: from a folder of one layout to a folder of the other."""

from __future__ import annotations

from dataclasses import replace
from os import PathLike
from pathlib import Path

import collavo._requirements  # noqa: F401  (before what it checks)

from transformers.utils.peft_utils import ADAPTER_CONFIG_NAME

from collavo._arguments import expect_path
from collavo._relatives import is_official, is_original_llava
from collavo.conversion.kinds import Options
from collavo.conversion.original import TITLE, convert_original
from collavo.conversion.sources import SAME, expect_own, is_own, recognise
from collavo.conversion.special_tokens import find_image_token
from collavo.conversion.swap import with_projector
from collavo.conversion.target import Conversion, expect_empty, write_target
from collavo.conversion.to_llava import convert_to_llava
from collavo.conversion.weights import FolderWeights
from collavo.model.files import read_config_file


def convert_folder(
    source: str | PathLike[str],
    target: str | PathLike[str],
    options: Options | None = None,
    *,
    to_official: bool = False,
    to_llava: bool = False,
    progress: bool = False,
) -> Conversion:
    """Convert a model folder, told by its ``config.json``, shard by shard.

    All names and shapes are compared before the first byte is written. The target is written under
    a temporary name inside its folder and its ``config.json`` comes last, so that a conversion that
    is killed leaves no folder that loads.

    Args:
        source: The official CoLLaVO or a LLaVA, of transformers or of its own repository, in
            safetensors or weights-only torch files; with ``to_official``, with ``to_llava`` and, to
            get another projector, with ``options.projector`` a folder of this package.
        target: A new or empty folder.
        options: What to change on the way; None changes nothing.
        to_official: Whether to write the official layout.
        to_llava: Whether to write the format of LLaVA's own repository, with the crayon left out,
            and its ``mm_projector.bin``.
        progress: Whether to show a bar.

    Returns:
        What was done.

    Raises:
        FileNotFoundError: naming the file that is missing.
        OSError: naming the file that cannot be written.
        ValueError: naming the tensors, file, field or option that does not fit, or the target if it
            is not empty.

    Example:
        >>> convert_folder("no-such-folder", "converted")
        Traceback (most recent call last):
            ...
        FileNotFoundError: no-such-folder: no such model folder
    """
    options = options or Options()
    expect_path("source", source, "a model folder")
    expect_path("target", target, "a folder")
    source, target = Path(source), Path(target)
    values = read_config_file(source)
    expect_empty(target)
    original = is_original_llava(values) and not is_official(values)
    if (asked := _asked(to_official, to_llava)) and original:
        raise ValueError(f"{source}: is {TITLE}: expected no {asked}")
    if original:
        return convert_original(source, target, values, options, progress=progress)
    if to_llava:
        expect_own(source, values)
        return convert_to_llava(source, target, values, options, progress=progress)
    _refuse_unused(source, options)
    kind = SAME if is_own(values) and options.projector is not None else recognise(source, values)
    if kind.gives_official != to_official:
        wanted = "--to-official" if kind.gives_official else "no --to-official"
        raise ValueError(f"{source}: is {kind.title}: expected {wanted}")
    weights = FolderWeights(source)
    tokenizer = kind.read_tokenizer(source)
    image_token = None
    if not kind.gives_official and kind is not SAME:
        options, image_token = find_image_token(tokenizer, options, kind.image_token_id(values))
    planned = kind.plan(str(source), weights.headers, values, options, image_token)
    planned, tensors = with_projector(planned, weights, options, str(source))
    done = write_target(
        kind.title,
        target,
        planned,
        tensors,
        options,
        lambda folder, made: kind.write_companions(source, folder, made, tokenizer),
        progress=progress,
    )
    notes = done.notes
    if tokenizer is None and not to_official and kind is not SAME:
        notes = (*notes, "no tokenizer was found, so no processor is written")
    if (source / ADAPTER_CONFIG_NAME).is_file():
        notes = (*notes, f"{ADAPTER_CONFIG_NAME}: the adapter beside the model is not applied")
    return replace(done, notes=notes)


def _asked(to_official: bool, to_llava: bool) -> str:
    """Return the option that asks for a way back, or nothing."""
    if to_official and to_llava:
        raise ValueError("--to-llava: expected none beside --to-official")
    return "--to-official" if to_official else "--to-llava" if to_llava else ""


def _refuse_unused(source: Path, options: Options) -> None:
    for name, given in (
        ("--vision", options.vision_folder),
        ("--template", options.chat_template),
    ):
        if given is not None:
            raise ValueError(f"{name}: expected none, since {source} has its own, got {given!r}")
