"""Another projector in a model's place of it: ``collavo convert --projector``."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import collavo._requirements  # noqa: F401  (before what it checks)

from transformers.utils import CONFIG_NAME

from collavo.configuration import CollavoConfig, CollavoLlavaConfig
from collavo.conversion.joined import JoinedWeights, joined_plans
from collavo.conversion.kinds import ImageToken, Options
from collavo.conversion.plan import Entry, Header, Output, Plan, Tensors
from collavo.conversion.projector import ProjectorSource, check_type, plan_projector, read_projector
from collavo.conversion.shapes import shapes_of
from collavo.conversion.stream import Weights
from collavo.model.files import weight_patterns
from collavo.model.projector import OWN_PROJECTOR, PROJECTOR_FILE, projector_names


def with_projector(
    planned: tuple[Any, Plan], weights: Weights, options: Options, where: str
) -> tuple[tuple[Any, Plan], Weights]:
    """Return a plan, and its tensors, with a file's projector in place of its own.

    Args:
        planned: ``config.json`` and the plan.
        weights: The source's tensors.
        options: Of which ``projector`` names the file; None changes nothing.
        where: The source.

    Raises:
        FileNotFoundError: if the file is missing.
        ValueError: naming the tensors that do not fit, or a kind of projector that the model
            cannot have.
    """
    if options.projector is None:
        return planned, weights
    config, plan = planned
    found = read_projector(options.projector)
    old = [o for o in plan.outputs().values() if o.name.startswith(OWN_PROJECTOR)]
    if any(not output.dtype.is_floating_point for output in old):
        raise ValueError(f"--projector: expected a dense projector to replace, {where} has 4 bits")
    if not old or not {o.name for o in old} & set(_known(config)):
        raise ValueError(
            f"--projector: expected a model with LLaVA's projector ({OWN_PROJECTOR}*), got {where}"
        )
    config, shapes = _fitted(config, found, old)
    tensors = Tensors(found.weights.headers, found.where)
    plan_projector(tensors, found.projector_type, shapes, old[0].dtype)
    tensors.note(f"the projector is that of {found.where}")
    dropped = {output.name for output in old}
    kept = plan._replace(
        entries=tuple(e for e in plan.entries if not {o.name for o in e.outputs} & dropped)
    )
    joined = joined_plans({"source": kept, "projector": tensors.plan()})
    return (config, joined), JoinedWeights({"source": weights, "projector": found.weights})


def _known(config: Any) -> Mapping[str, str]:
    kind = config.projector_type if isinstance(config, CollavoConfig) else "mlp2x_gelu"
    return projector_names(kind)


def _fitted(
    config: Any, found: ProjectorSource, old: list[Output]
) -> tuple[Any, Mapping[str, tuple[int, ...]]]:
    """Return the configuration with the file's kind of projector, and the projector's shapes."""
    if not isinstance(config, CollavoConfig):
        check_type(found, "mlp2x_gelu")
        return config, {output.name: output.shape for output in old}
    changed: Any = config
    changed.projector_type = found.projector_type
    quantize, changed.quantize = changed.quantize, None
    shapes = shapes_of(changed)
    changed.quantize = quantize
    return changed, shapes


def plan_same(
    where: str,
    headers: Mapping[str, Header],
    values: Mapping[str, Any],
    options: Options,
    image_token: ImageToken | None,
) -> tuple[Any, Plan]:
    """Plan a folder of this package as it is, 4-bit weights included; see ``SourceKind.plan``.

    Args:
        where: The folder.
        headers: Its tensors.
        values: Its ``config.json``.
        options: Of which ``projector`` alone has a meaning.
        image_token: Is not asked for.

    Raises:
        ValueError: naming an option that would change more.
    """
    for name, given in (
        ("--dtype", options.dtype),
        ("--quantize", options.quantize),
        ("--crayon-mode", options.crayon_mode),
        ("--image-token", options.image_token),
    ):
        if given is not None:
            raise ValueError(
                f"{name}: expected none for {where}, a folder of this package, got {given!r}"
            )
    entries = tuple(
        Entry((Output(name, header.shape, header.dtype),), (name,), lambda tensor: (tensor,))
        for name, header in headers.items()
    )
    patched = values.get("model_type") == CollavoLlavaConfig.model_type
    kind: Any = CollavoLlavaConfig if patched else CollavoConfig
    return kind.from_dict(dict(values)), Plan(entries)


def copy_companions(source: Path, target: Path, config: Any, tokenizer: Any) -> None:
    """Copy all files of a folder but weights and configuration; see ``SourceKind``.

    An ``mm_projector.bin`` beside them is that of the projector that is replaced.

    Args:
        source: A folder of this package.
        target: Where to write.
        config: Not read.
        tokenizer: Not read.
    """
    weights = {path for pattern in weight_patterns() for path in source.glob(pattern)}
    for path in sorted(source.iterdir()):
        own = path.is_file() and not path.name.startswith(".")
        if own and path not in weights and path.name not in (CONFIG_NAME, PROJECTOR_FILE):
            shutil.copyfile(path, target / path.name)
