"""The parts of a model that a stage can train, and which tensors are whose."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Literal, Protocol, cast, get_args, runtime_checkable

import collavo._requirements  # noqa: F401  (before what it checks)

from torch import nn

from collavo.model.families import decoder_of

Part = Literal["crayon", "projector", "decoder", "adapters", "vision"]
PARTS: tuple[Part, ...] = get_args(Part)


@runtime_checkable
class CrayonModel(Protocol):
    """A model with a crayon prompt and named adapters."""

    def crayon_parameters(self) -> Iterable[nn.Parameter]:
        """Return queries, crayon MLP and, in projection mode, every ``A_seg`` and ``B_seg``."""
        ...

    def adapter_parameters(self, name: str) -> Iterable[nn.Parameter]:
        """Return A and B of the named adapter, of all layers; ``ValueError`` if it has none."""
        ...


def crayon_model(model: nn.Module) -> CrayonModel:
    """Return what a wrapper trains.

    Args:
        model: Wrapped or not.

    Raises:
        ValueError: if it has no crayon and adapters.
    """
    # DistributedDataParallel keeps the model under this name; FSDP2 changes it in place.
    inner = getattr(model, "module", model)
    if not isinstance(inner, CrayonModel):
        raise ValueError(
            f"model: expected a CoLLaVO model with crayon_parameters() and adapter_parameters(), "
            f"got {type(inner).__name__}"
        )
    return inner


def part_parameters(
    model: nn.Module, part: Part, adapters: Sequence[str] = ()
) -> list[nn.Parameter]:
    """Return the parameters of one part of a model; each parameter is of one part alone.

    Args:
        model: A CoLLaVO model, or one that ``apply_to_llava`` changed; wrapped or not.
        part: ``"crayon"``; ``"adapters"``, those of the names; ``"vision"``, the tower;
            ``"decoder"``, embeddings, dense layers and head; ``"projector"``, what is between.
        adapters: Names of adapters, read for the part of that name.

    Raises:
        ValueError: naming the part, if the model has none such, or the adapter.
    """
    inner = crayon_model(model)
    if part == "crayon":
        found = list(inner.crayon_parameters())
    elif part == "adapters":
        found = [p for name in adapters for p in _adapter(inner, name)]
    elif part in PARTS:
        found = list(_dense(inner, part))
    else:
        raise ValueError(f"parts: expected some of {', '.join(PARTS)}, got {part!r}")
    if not found:
        raise ValueError(f"model: {_MISSING[part]}, so there is no part {part!r} to train")
    return found


def _adapter(model: CrayonModel, name: str) -> list[nn.Parameter]:
    try:
        return list(model.adapter_parameters(name))
    except ValueError as error:
        raise ValueError(f"model: the model has no {name!r}") from error


def parameters_of_images(model: nn.Module) -> Iterator[nn.Parameter]:
    """Yield what a batch without an image gives gradients of zero: no token of it is reached.

    Args:
        model: A CoLLaVO model, wrapped or not.
    """
    inner = crayon_model(model)
    yield from inner.crayon_parameters()
    for name in getattr(getattr(inner, "model", None), "crayon_image_adapters", ()):
        yield from inner.adapter_parameters(name)


_MISSING = {
    "crayon": "its crayon_mode is 'none'",
    "adapters": "no adapter was named (adapters=, on the command line --adapters)",
    "decoder": "its decoder has no dense weight",
    "projector": "it has nothing between vision tower and decoder",
    "vision": "it has no vision tower",
}


def _dense(model: CrayonModel, part: Part) -> Iterator[nn.Parameter]:
    """Yield the floating parameters of one part that are neither the crayon's nor an adapter's."""
    whole = cast(Any, model)
    decoder = decoder_of(whole.model)
    if part == "decoder" and not all(p.is_floating_point() for p in decoder.parameters()):
        raise ValueError(
            "model: its decoder's weights are in 4 bits, which no step can move; train adapters "
            "over them (adapters=, on the command line --adapters)"
        )
    # A tower is a model with a configuration of its own; what is between has none.
    towers = [m for m in whole.model.children() if m is not decoder and hasattr(m, "config")]
    owners: dict[int, Part] = {id(p): "projector" for p in whole.model.parameters()}
    owners |= {id(p): "vision" for tower in towers for p in tower.parameters()}
    owners |= {id(p): "decoder" for p in decoder.parameters()}
    added = {id(p) for p in model.crayon_parameters()}
    for name in whole.model.crayon_adapters:
        added |= {id(p) for p in model.adapter_parameters(name)}
    for parameter in whole.parameters():
        # The head stands outside of the model without a head.
        owner = owners.get(id(parameter), "decoder")
        if owner == part and id(parameter) not in added and parameter.is_floating_point():
            yield parameter
