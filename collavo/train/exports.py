"""A trained model for everybody: a whole folder, PEFT's adapters and LLaVA's projector."""

from __future__ import annotations

import logging
import os
from contextlib import suppress
from pathlib import Path
from typing import Any

import collavo._requirements  # noqa: F401  (before what it checks)

import torch
from torch import Tensor, nn

from collavo import writing
from collavo._arguments import expect_path
from collavo.configuration import PROJECTOR_TYPES
from collavo.model.files import weight_patterns
from collavo.model.projector import OWN_PROJECTOR, PROJECTOR_FILE, projector_names
from collavo_kernels.nn import DualQLoRALinear, save_peft_adapter

ADAPTERS = "adapters"
# What a save replaces of an earlier one's parts, which would lie beside another model.
PARTS_PATTERNS = (PROJECTOR_FILE, f"{ADAPTERS}/*/adapter_model.safetensors")
_log = logging.getLogger(__name__)


def export(model: Any, processor: Any, folder: str | os.PathLike[str]) -> None:
    """Write a model so that this package, PEFT and LLaVA's own code each find what they read.

    ``folder`` itself is a whole model folder, for ``from_pretrained`` and ``load_folder``;
    ``folder/adapters/NAME`` holds each adapter as PEFT's; ``folder/mm_projector.bin`` the projector
    under LLaVA's names, as plain tensors (``torch.load(path, weights_only=True)``). Adapters do not
    bring the projector that was trained with them, so it is always beside them. A projector that
    LLaVA has no file for, and an adapter of image tokens alone, are in the whole folder only; the
    log says so.

    Args:
        model: A CoLLaVO model, or one that ``apply_to_llava`` changed.
        processor: Saved with it; None leaves the folder without one.
        folder: Is made if needed; what is there stays until all is written.

    Raises:
        TypeError: if the folder is no path.
        OSError: naming the file that could not be written.
        ValueError: if the model is offloaded, or an adapter's name can be no folder's.

    Example:
        >>> export(None, None, 3)
        Traceback (most recent call last):
            ...
        TypeError: folder: expected the path of the export, got int
    """
    expect_path("folder", folder, "the export")
    with writing.written_folder(folder, (*weight_patterns(), *PARTS_PATTERNS)) as partial:
        model.save_pretrained(partial)
        if processor is not None:
            processor.save_pretrained(partial)
        write_parts(model, partial)


def write_parts(model: nn.Module, folder: Path) -> None:
    """Write adapters and projector for others into a folder that already has the whole model.

    Args:
        model: As for :func:`export`.
        folder: An existing folder.

    Raises:
        OSError: naming the file that could not be written.
        ValueError: if an adapter's name can be no folder's.
    """
    check_names(model)
    for name in adapter_names(model):
        save_peft_adapter(model, folder / ADAPTERS / name, name)
    tensors = projector_tensors(model)
    if tensors:
        torch.save(tensors, folder / PROJECTOR_FILE)


def check_names(model: nn.Module) -> None:
    """Raise if an adapter could have no folder.

    Args:
        model: As for :func:`export`.

    Raises:
        ValueError: naming the adapter.
    """
    for module in model.modules():
        for name in module.adapter_names if isinstance(module, DualQLoRALinear) else ():
            if Path(name).name != name:
                raise ValueError(f"adapters: {name!r} can be no folder's name; rename the adapter")


def adapter_names(model: nn.Module) -> list[str]:
    """Return the adapters that PEFT has a folder for, in their order; others are logged.

    Args:
        model: As for :func:`export`.
    """
    found, of_images = dict[str, None](), set[str]()
    for module in model.modules():
        if isinstance(module, DualQLoRALinear):
            found |= dict.fromkeys(module.adapter_names)
            of_images |= set(module.image_adapters)
    for name in sorted(of_images):
        _log.warning("adapter %r acts on image tokens alone, which PEFT has no word for", name)
    return [name for name in found if name not in of_images]


def projector_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Return the projector's tensors under LLaVA's names; none where LLaVA has no such projector.

    Args:
        model: As for :func:`export`.
    """
    own = {n: p for n, p in model.named_parameters() if n.startswith(OWN_PROJECTOR)}
    for kind in PROJECTOR_TYPES:
        names = projector_names(kind, bias=any(name.endswith(".bias") for name in own))
        if own.keys() == names.keys():
            return {names[name]: value.detach().cpu().clone() for name, value in own.items()}
    _log.warning("%s is not written: LLaVA has no file for this model's projector", PROJECTOR_FILE)
    return {}


def parts_size(model: nn.Module) -> int:
    """Return the bytes of what :func:`write_parts` writes.

    Args:
        model: As for :func:`export`.
    """
    return sum(
        p.numel() * p.element_size()
        for name, p in model.named_parameters()
        if name.startswith(OWN_PROJECTOR) or {"lora_A", "lora_B"} & set(name.split("."))
    )


def check_export(model: nn.Module, folder: Path) -> None:
    """Raise unless an export could be written; nothing of the trial stays.

    Args:
        model: Gives the sizes.
        folder: Of the export.

    Raises:
        OSError: naming what cannot be written, or the space that is wanted and found.
    """
    made = not folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    try:
        writing.settle(folder)
        writing.check_file(folder / PROJECTOR_FILE)
        whole = sum(one.numel() * one.element_size() for one in model.parameters())
        writing.check_size(folder, whole + parts_size(model), whole)
    finally:
        if made:
            with suppress(OSError):
                folder.rmdir()
