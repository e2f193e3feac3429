"""Checkpoint folders: sealed when they are whole, checked before anything is loaded."""

from __future__ import annotations

import json
import logging
import re
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from collavo import writing
from collavo.model.files import read_headers
from collavo.panoptic.json_files import read_object
from collavo_kernels.nn import DualQLoRALinear

STREAMS = "collavo_streams.json"
RESUME_FILES = ("trainer_state.json", "optimizer.pt", "scheduler.pt")
_NOT_WHOLE = "it is not a whole checkpoint, resume from an older one"
# Of an image processor's settings those that pixels follow from.
_OF_PICTURES = (
    "do_resize",
    "size",
    "resample",
    "do_center_crop",
    "crop_size",
    "do_pad",
    "do_rescale",
    "rescale_factor",
    "do_normalize",
    "image_mean",
    "image_std",
)
_STEP = re.compile(r"checkpoint-[0-9]+")
_log = logging.getLogger(__name__)


def check_weights(folder: Path, model: nn.Module) -> None:
    """Raise unless the folder holds every tensor of the model, in its shape, and no other.

    Tensors that share their memory (tied embeddings) need to be there once.

    Raises:
        FileNotFoundError: naming the folder or the file that is missing.
        ValueError: as ``read_headers``; naming the missing, surplus or misshapen tensors.
    """
    stored = {name: entry.shape for name, entry in read_headers(folder).items()}
    expected = model.state_dict()
    by_memory = {_memory(expected[key]) for key in stored if key in expected}
    # Adapters' scalings are there where they are not what the configuration says.
    stored = {key: shape for key, shape in stored.items() if ".lora_scaling." not in key}
    expected = {key: value for key, value in expected.items() if ".lora_scaling." not in key}
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


def seal(folder: Path, facts: Mapping[str, Any]) -> None:
    """Write, as the last file of a checkpoint, what says that it is whole.

    Args:
        folder: A ``checkpoint-N`` folder; all its files are synced to the disk first.
        facts: ``CollavoTrainingArguments.stream_facts()``, for :func:`check_resume`.

    Raises:
        OSError: naming the file that the disk does not take.
    """
    sizes = writing.synced_files(folder)
    content = json.dumps({**facts, "files": sizes}, indent=2) + "\n"
    writing.write_file(folder / STREAMS, content.encode())


def check_whole(folder: Path) -> dict[str, Any]:
    """Raise unless a checkpoint was written to its end, and return what it was sealed with.

    Args:
        folder: A ``checkpoint-N`` folder.

    Raises:
        FileNotFoundError: naming the missing file.
        ValueError: naming the file that is shorter or longer than it was, or no JSON.
    """
    path = folder / STREAMS
    if not path.is_file():
        raise FileNotFoundError(f"{path}: missing; {_NOT_WHOLE}")
    sealed = read_object(path, utf8=True)
    sizes = sealed.get("files")
    if not isinstance(sizes, dict):
        raise ValueError(f"{path}: expected the sizes of the checkpoint's 'files'; {_NOT_WHOLE}")
    for name, size in sizes.items():
        file = folder / name
        if not file.is_file():
            raise FileNotFoundError(f"{file}: missing; {_NOT_WHOLE}")
        found = file.stat().st_size
        # A JSON file may have been edited since.
        if found != size and file.suffix != ".json":
            raise ValueError(f"{file}: expected {size} bytes, got {found}; {_NOT_WHOLE}")
    return sealed


def check_resume(folder: Path, facts: Mapping[str, Any]) -> None:
    """Raise unless the folder is a whole checkpoint of a run with the same streams of samples.

    Args:
        folder: A ``checkpoint-N`` folder.
        facts: The present run's ``CollavoTrainingArguments.stream_facts()``.

    Raises:
        FileNotFoundError: naming the missing file.
        ValueError: naming the file that is not whole, or the argument that differs.
    """
    check_whole(folder)
    for name in RESUME_FILES:
        if not (folder / name).is_file():
            raise FileNotFoundError(
                f"{folder / name}: missing; a checkpoint of save_only_model cannot be resumed"
            )
    read_object(folder / "trainer_state.json", utf8=True)
    check_same_run(folder, facts)


def check_same_run(folder: Path, facts: Mapping[str, Any]) -> None:
    """Raise if a checkpoint says that it belongs to a run with other streams of samples.

    Args:
        folder: A ``checkpoint-N`` folder, whole or not.
        facts: As for :func:`check_resume`.

    Raises:
        ValueError: naming the argument that differs.
    """
    path = folder / STREAMS
    saved = read_object(path, utf8=True) if path.is_file() else dict(facts)
    for name in {**saved, **facts}:
        there, here = saved.get(name), facts.get(name)
        if there != here and name != "files":
            raise ValueError(
                f"{name}: the checkpoint {folder} was trained with {there!r}, this run has "
                f"{here!r}; resume with the same value"
            )


def data_facts(dataset: object, collator: object) -> dict[str, Any]:
    """Return what a resumed run has to share of its records, and of how they become tensors.

    Args:
        dataset: Its ``fingerprint()``, and that of its maps, count where they are known.
        collator: The ``fingerprint()`` of its ``processor`` counts, what that makes of pictures,
            and its ``max_length``.

    Example:
        >>> data_facts([], None)
        {}
    """
    processor = getattr(collator, "processor", None)
    maps = getattr(dataset, "panoptic", None)
    sources = {"records": dataset, "processor": processor, "maps": maps}
    found: dict[str, Any] = {
        name: one.fingerprint() for name, one in sources.items() if hasattr(one, "fingerprint")
    }
    if maps is not None:  # of one's own making it tells its kind alone
        found.setdefault("maps", type(maps).__name__)
    found["max_length"] = getattr(collator, "max_length", None)
    found |= {name: getattr(processor, name, None) for name in ("box_frame", "reduce")}
    images: Any = getattr(processor, "image_processor", None)
    if hasattr(images, "to_json_string"):
        said = json.loads(images.to_json_string())
        found |= {f"image_processor.{name}": said.get(name) for name in _OF_PICTURES}
    return {name: value for name, value in found.items() if value is not None}


def adapter_facts(model: nn.Module) -> dict[str, list[str]]:
    """Return each adapter's ranks, alphas and dropouts, which its tensors do not all show.

    Args:
        model: With or without adapters.

    Example:
        >>> adapter_facts(nn.Linear(2, 2))
        {}
    """
    found: dict[str, set[str]] = {}
    for module in model.modules():
        if isinstance(module, DualQLoRALinear):
            for name in module.adapter_names:
                rank, alpha = module.adapter_size(name)
                line = f"rank {rank}, alpha {alpha:g}, dropout {module.dropout:g}"
                found.setdefault(name, set()).add(line)
    return {name: sorted(lines) for name, lines in found.items()}


def checkpoints(folder: Path) -> list[Path]:
    """Return the ``checkpoint-N`` folders of an output folder, whole or not, by their steps.

    Args:
        folder: The output folder; it may be missing.
    """
    found = [path for path in folder.glob("checkpoint-*") if is_checkpoint(path)]
    return sorted((path for path in found if path.is_dir()), key=_step)


def is_checkpoint(folder: Path) -> bool:
    """Say whether a folder has a checkpoint's name.

    Args:
        folder: It need not be there.
    """
    return _STEP.fullmatch(folder.name) is not None


def last_whole(folder: Path) -> Path:
    """Return the last checkpoint that was written to its end; a later one is named in the log.

    Args:
        folder: The output folder.

    Raises:
        ValueError: if there is none.
    """
    for path in reversed(checkpoints(folder)):
        try:
            check_whole(path)
        except (ValueError, OSError) as error:
            _log.warning("%s: passed over (%s)", path, error)
        else:
            return path
    raise ValueError(
        f"resume_from_checkpoint: expected a whole checkpoint-N in {folder}, found none; train "
        "from the beginning"
    )


def rotate(folder: Path, limit: int | None, keep: Iterable[Path]) -> None:
    """Remove the oldest checkpoints beyond a limit, first those that are not whole.

    Args:
        folder: The output folder.
        limit: How many may stay; None or 0: all.
        keep: The present one and the best; they stay, and are among those that are counted.
    """
    kept = {path.resolve() for path in keep if path.is_dir()}
    found = [path for path in checkpoints(folder) if path.resolve() not in kept]
    surplus = len(found) + len(kept) - limit if limit else 0
    for path in sorted(found, key=_age)[: max(surplus, 0)]:
        shutil.rmtree(path, ignore_errors=True)


def _age(folder: Path) -> tuple[bool, float]:
    try:
        check_whole(folder)
    except (ValueError, OSError):
        return False, folder.stat().st_mtime
    return True, (folder / STREAMS).stat().st_mtime


def _step(folder: Path) -> int:
    return int(folder.name.removeprefix("checkpoint-"))


def _memory(tensor: torch.Tensor) -> tuple[int, tuple[int, ...]]:
    return tensor.data_ptr(), tuple(tensor.shape)


def _tied(tensor: torch.Tensor, present: set[tuple[int, tuple[int, ...]]]) -> bool:
    return tensor.numel() > 0 and _memory(tensor) in present


def _some(keys: list[str], limit: int = 5) -> str:
    more = f" and {len(keys) - limit} more" if len(keys) > limit else ""
    return ", ".join(keys[:limit]) + more
