"""Checkpoints of the trained tensors alone, and the fingerprint of the base that they belong to."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import collavo._requirements  # noqa: F401  (before what it checks)

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from collavo.panoptic.json_files import read_object
from collavo.train.checkpoint import check_whole
from collavo_kernels.nn import DualQLoRALinear

WEIGHTS = "trained_tensors.safetensors"
BASE = "untrained_tensors.json"
_MOST_THREADS = 8


def trained_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the parameters that require gradients, by name; a tied one is there once.

    Args:
        model: After ``prepare_stage``.

    Example:
        >>> list(trained_parameters(nn.Linear(2, 1, bias=False)))
        ['weight']
    """
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def base_fingerprint(model: nn.Module) -> dict[str, str]:
    """Return dtype, shape and a digest of every tensor that is not trained, by its saved name.

    All bytes are read (BLAKE2b, a thread for each of up to 8 cores), so any change of any tensor
    is seen; 4-bit weights count as they are saved, whatever order they have in memory, and every
    adapter's scaling counts. What it does not see: settings without a tensor, such as dropout or a
    layer that features are taken from.

    Args:
        model: After ``prepare_stage``.

    Raises:
        ValueError: naming a tensor that is offloaded and has no bytes here.

    Example:
        >>> base_fingerprint(nn.Linear(2, 1).requires_grad_(False))["bias"][:11]
        'float32 [1]'
    """
    trained = {id(p) for p in trained_parameters(model).values()}
    named = model.named_parameters(remove_duplicate=False)
    moving = {name for name, p in named if id(p) in trained}
    # The saved order first: a model that has run keeps 4-bit weights in another.
    state = {name: value for name, value in model.state_dict().items() if name not in moving}
    for name, module in model.named_modules():
        if isinstance(module, DualQLoRALinear):
            for adapter in module.adapter_names:
                scaling = module.scaling[adapter]
                state[f"{name}.lora_scaling.{adapter}"] = torch.tensor(scaling, dtype=torch.float64)
    with ThreadPoolExecutor(min(_MOST_THREADS, os.cpu_count() or 1)) as threads:
        return dict(zip(state, threads.map(_described, state, state.values()), strict=True))


def _described(name: str, value: Tensor) -> str:
    if value.is_meta:
        raise ValueError(
            f"save_trained_only: {name} is offloaded and has no values here; load the model "
            "without device_map"
        )
    data = value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
    digest = hashlib.blake2b(data.data, digest_size=16).hexdigest()
    return f"{str(value.dtype).removeprefix('torch.')} {list(value.shape)} {digest}"


def holds_trained_only(folder: Path) -> bool:
    """Say whether a checkpoint holds trained tensors in place of a whole model.

    Args:
        folder: A ``checkpoint-N`` folder.
    """
    return any((folder / name).is_file() for name in (WEIGHTS, BASE))


def save_trained(model: nn.Module, base: Mapping[str, str], folder: Path) -> None:
    """Write the trained tensors, and which base they belong to, into a checkpoint.

    Args:
        model: After ``prepare_stage``.
        base: Its ``base_fingerprint``.
        folder: An existing folder.
    """
    trained = {n: p.detach().cpu().contiguous() for n, p in trained_parameters(model).items()}
    write_trained(trained, base, folder)


def write_trained(tensors: Mapping[str, Tensor], base: Mapping[str, str], folder: Path) -> None:
    """Write tensors and a base's fingerprint as :func:`save_trained` does.

    Args:
        tensors: On the CPU.
        base: A ``base_fingerprint``.
        folder: An existing folder.
    """
    save_file(dict(tensors), folder / WEIGHTS, metadata={"format": "pt"})
    (folder / BASE).write_text(json.dumps(base, indent=0) + "\n", encoding="utf-8")


def load_trained(
    model: nn.Module, folder: str | os.PathLike[str], base: Mapping[str, str] | None = None
) -> None:
    """Bring a checkpoint's trained tensors into the model that its run began with.

    Nothing changes unless all fits: the checkpoint is whole, the model trains exactly its tensors,
    and every other tensor has the bytes that it had.

    Args:
        model: As it was before the first step: with the same adapters, after ``prepare_stage``.
        folder: A ``checkpoint-N`` of a run with ``save_trained_only``.
        base: The model's ``base_fingerprint``, where it is known; None computes it.

    Raises:
        FileNotFoundError: naming what is missing of the checkpoint.
        ValueError: naming the file that is not whole, or the tensor that does not fit.

    Example:
        >>> load_trained(nn.Linear(2, 1), "no-such-folder")
        Traceback (most recent call last):
            ...
        FileNotFoundError: no-such-folder/collavo_streams.json: missing; it is not a whole \
checkpoint, resume from an older one
    """
    folder = Path(folder)
    check_whole(folder)
    tensors = _read(folder / WEIGHTS)
    own = trained_parameters(model)
    _check_names(folder, tensors, own)
    theirs = read_object(folder / BASE, utf8=True)
    _check_base(folder, theirs, base_fingerprint(model) if base is None else base)
    with torch.no_grad():
        for name, parameter in own.items():
            parameter.copy_(tensors[name])


def _read(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        raise FileNotFoundError(f"{path}: missing; the checkpoint is not one of trained tensors")
    try:
        return load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path}: not a complete safetensors file ({error})") from error


def _check_names(
    folder: Path, tensors: Mapping[str, Tensor], own: Mapping[str, nn.Parameter]
) -> None:
    for name in (*tensors, *own):
        if name not in own or name not in tensors:
            has, lacks = ("it", "this run") if name in tensors else ("this run", "it")
            raise ValueError(
                f"{folder / WEIGHTS}: {has} trains {name} and {lacks} does not; resume with the "
                "same stage, parts and adapters"
            )
        expected, found = own[name], tensors[name]
        if (expected.shape, expected.dtype) != (found.shape, found.dtype):
            raise ValueError(
                f"{folder / WEIGHTS}: {name}: expected {expected.dtype} {list(expected.shape)}, "
                f"got {found.dtype} {list(found.shape)}; resume with the same model and adapters"
            )


def _check_base(folder: Path, theirs: Mapping[str, object], own: Mapping[str, str]) -> None:
    differing = [name for name in own if theirs.get(name) != own[name]]
    differing += [name for name in theirs if name not in own]
    if not differing:
        return
    name = differing[0]
    there, here = theirs.get(name, "none"), own.get(name, "none")
    more = f" (and {len(differing) - 1} more)" if len(differing) > 1 else ""
    raise ValueError(
        f"{folder}: belongs to another base than this model: {name}{more} was {there} and is "
        f"{here}; it holds the trained tensors alone, so resume with the model folder, adapters "
        "and seed that its run began with"
    )
