"""LLaVA's projector as a source: ``mm_projector.bin``, or that of a whole checkpoint."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from os import PathLike
from typing import Any, NamedTuple

import collavo._requirements  # noqa: F401  (before what it checks)

from collavo._arguments import expect_path
from collavo.configuration import PROJECTOR_TYPES
from collavo.conversion.joined import RenamedWeights
from collavo.conversion.plan import Output, Tensors, listed
from collavo.conversion.stream import Weights
from collavo.conversion.weights import FileWeights
from collavo.model.projector import LLAVA_PROJECTOR, projector_names

# A file of the projector alone has it without the model's name before it, or with PEFT's too.
_ANYWHERE = LLAVA_PROJECTOR.removeprefix("model.")


class ProjectorSource(NamedTuple):
    """A projector that is there.

    Attributes:
        where: Of what it is, for messages.
        projector_type: As of ``CollavoConfig``.
        weights: Its tensors, named ``model.mm_projector. ...``.
    """

    where: str
    projector_type: str
    weights: Weights


def read_projector(file: str | PathLike[str]) -> ProjectorSource:
    """Look at a file of LLaVA's projector; no tensor is read.

    Args:
        file: ``mm_projector.bin`` or ``non_lora_trainables.bin`` of weights alone, or safetensors.

    Raises:
        FileNotFoundError: if it is missing.
        ValueError: naming the tensors that are no projector's, or the kind of projector.
    """
    expect_path("projector", file, "a file, such as mm_projector.bin")
    weights = FileWeights(file)
    names: dict[str, str] = {}
    for name in weights.headers:
        before, found, rest = name.rpartition(_ANYWHERE)
        if not found or before.rstrip(".").split(".")[-1] not in ("", "model"):
            raise ValueError(
                f"{file}: expected LLaVA's projector alone, names with {_ANYWHERE!r}, got {name}"
            )
        new = LLAVA_PROJECTOR + rest
        if new in names:
            raise ValueError(f"{file}: {names[new]} and {name}: both are {new}")
        names[new] = name
    return ProjectorSource(str(file), type_of(names, str(file)), RenamedWeights(weights, names))


def type_of(names: Iterable[str], where: str) -> str:
    """Return the kind of a projector by its tensors.

    Args:
        names: Its tensors, named ``model.mm_projector. ...``.
        where: Of what it is.

    Raises:
        ValueError: if it is of another kind, naming what there is.
    """
    found = set(names)
    for kind in PROJECTOR_TYPES:
        weights = set(projector_names(kind, bias=False).values())
        if found & weights and found <= set(projector_names(kind).values()):
            return kind
    raise ValueError(
        f"{where}: expected a projector of one of {PROJECTOR_TYPES}, got the tensors "
        f"{listed(sorted(found)) or 'none'}"
    )


def plan_projector(
    tensors: Tensors, projector_type: str, shapes: Mapping[str, tuple[int, ...]], dtype: Any = None
) -> None:
    """Plan to take over a projector.

    Args:
        tensors: Those of a ``ProjectorSource``; gets the entries.
        projector_type: As of ``CollavoConfig``.
        shapes: Of the target's tensors, the projector's among them.
        dtype: Of what is written; None keeps the source's.
    """
    for own, original in projector_names(projector_type).items():
        if own in shapes:
            found = tensors.take(original, shapes[own])
            output = Output(own, shapes[own], dtype or found)
            tensors.make([output], [original], lambda value, to=output.dtype: (value.to(to),))


def check_type(source: ProjectorSource, asked: str) -> None:
    """Raise unless a projector is of the kind that is asked for.

    Args:
        source: The projector.
        asked: As of ``CollavoConfig``.

    Raises:
        ValueError: naming both.
    """
    if source.projector_type != asked:
        raise ValueError(
            f"projector_type: expected {source.projector_type!r}, which {source.where} has, got "
            f"{asked!r}"
        )
