"""Checkpoint folders: checked before anything is loaded, written whole or not at all."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from collavo.model.files import weight_files

STREAMS = "collavo_streams.json"
RESUME_FILES = ("trainer_state.json", "optimizer.pt", "scheduler.pt", STREAMS)


def check_weights(folder: Path, model: nn.Module) -> None:
    """Raise unless the folder holds every tensor of the model, in its shape, and no other.

    Tensors that share their memory (tied embeddings) need to be there once. Only the files' headers
    are read.

    Raises:
        FileNotFoundError: naming the folder or the file that is missing.
        ValueError: naming the file that is no safetensors file, or the missing, surplus or
            misshapen tensors.
    """
    stored: dict[str, tuple[int, ...]] = {}
    for path in weight_files(folder):
        try:
            with safe_open(path, framework="pt") as tensors:
                stored |= {key: tuple(tensors.get_slice(key).get_shape()) for key in tensors.keys()}  # noqa: SIM118
        except SafetensorError as error:
            raise ValueError(f"{path}: not a complete safetensors file ({error})") from error
    expected = model.state_dict()
    by_memory = {_memory(expected[key]) for key in stored if key in expected}
    missing = [key for key in expected if key not in stored and not _tied(expected[key], by_memory)]
    surplus = [key for key in stored if key not in expected]
    misshapen = [
        f"{key} (expected {tuple(expected[key].shape)}, got {shape})"
        for key, shape in stored.items()
        if key in expected and tuple(expected[key].shape) != shape
    ]
    found = {"missing": missing, "surplus": surplus, "misshapen": misshapen}
    faults = [f"{kind}: {_some(keys)}" for kind, keys in found.items() if keys]
    if faults:
        raise ValueError(f"{folder}: its tensors are not this model's; {'; '.join(faults)}")


def check_resume(folder: Path, facts: Mapping[str, Any]) -> None:
    """Raise unless the folder is a whole checkpoint of a run with the same streams of samples.

    Args:
        folder: A ``checkpoint-N`` folder.
        facts: The present run's ``CollavoTrainingArguments.stream_facts()``.

    Raises:
        FileNotFoundError: naming the missing file.
        ValueError: naming the argument that differs.
    """
    for name in RESUME_FILES:
        if not (folder / name).is_file():
            raise FileNotFoundError(
                f"{folder / name}: missing; it is not a whole checkpoint, resume from an older one"
            )
    saved = _read_json(folder / STREAMS)
    for name, value in facts.items():
        if saved.get(name) != value:
            raise ValueError(
                f"{name}: the checkpoint {folder} was trained with {saved.get(name)!r}, "
                f"this run has {value!r}; resume with the same value"
            )


def write_streams(folder: Path, facts: Mapping[str, Any]) -> None:
    """Write what :func:`check_resume` compares."""
    (folder / STREAMS).write_text(json.dumps(dict(facts), indent=2) + "\n")


@contextmanager
def written_whole(folder: Path) -> Iterator[Path]:
    """Yield a folder to write into; its files replace those of ``folder`` if all went well.

    Otherwise the half-written files are removed and ``folder`` stays as it was.
    """
    folder = folder.resolve()  # "." has no name and no neighbour
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir(parents=True)
        yield partial
        folder.mkdir(parents=True, exist_ok=True)
        fresh = sorted(path.name for path in partial.iterdir())
        for name in fresh:
            os.replace(partial / name, folder / name)
        # Weights of an earlier save in other parts would be read instead of, or beside, these.
        for stale in folder.glob("model*.safetensors*"):
            if stale.name not in fresh:
                stale.unlink()
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text())
    except (ValueError, OSError) as error:
        raise ValueError(f"{path}: not a JSON file ({error})") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path}: expected a JSON object, got {type(value).__name__}")
    return value


def _memory(tensor: torch.Tensor) -> tuple[int, tuple[int, ...]]:
    return tensor.data_ptr(), tuple(tensor.shape)


def _tied(tensor: torch.Tensor, present: set[tuple[int, tuple[int, ...]]]) -> bool:
    return tensor.numel() > 0 and _memory(tensor) in present


def _some(keys: list[str], limit: int = 5) -> str:
    more = f" and {len(keys) - limit} more" if len(keys) > limit else ""
    return ", ".join(keys[:limit]) + more
