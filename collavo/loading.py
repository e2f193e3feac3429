"""Loading model folders: what does not fit is named, never drawn at random."""

from __future__ import annotations

from collections.abc import Iterable
from os import PathLike
from pathlib import Path
from typing import Any

import collavo._requirements  # noqa: F401  (before what it checks)

from safetensors import SafetensorError
from transformers.utils import PROCESSOR_NAME

from collavo.model.files import read_tensors as read_tensors
from collavo.model.files import weight_files as weight_files
from collavo.model.llava import CollavoForConditionalGeneration
from collavo.processing.processor import CollavoProcessor


def load_pretrained(folder: str | PathLike[str], **kwargs: Any) -> CollavoForConditionalGeneration:
    """Load a model folder and accept no tensor too few, too many, or of another shape.

    transformers' ``from_pretrained`` only warns, and draws what is missing at random.

    Args:
        folder: A folder that ``save_pretrained`` wrote.
        **kwargs: As in ``from_pretrained`` (``dtype``, ``device_map``, ``attn_implementation``
            ...).

    Returns:
        The model, in evaluation mode.

    Raises:
        FileNotFoundError: naming the folder or file that is missing.
        ValueError: naming the tensors, or the file that is damaged.

    Example:
        >>> load_pretrained("no-such-folder")
        Traceback (most recent call last):
            ...
        FileNotFoundError: no-such-folder: no such model folder
    """
    files = weight_files(folder)
    if not (Path(folder) / "config.json").is_file():
        raise FileNotFoundError(f"{Path(folder) / 'config.json'}: missing from the model folder")
    try:
        model, info = CollavoForConditionalGeneration.from_pretrained(
            folder, output_loading_info=True, ignore_mismatched_sizes=True, **kwargs
        )
    except SafetensorError as error:
        names = ", ".join(str(file) for file in files)
        raise ValueError(f"{names}: not a complete safetensors file ({error})") from error
    mismatched = [
        entry[0] if isinstance(entry, tuple) else entry for entry in info["mismatched_keys"]
    ]
    _expect_none(folder, "tensors are missing", info["missing_keys"])
    _expect_none(folder, "tensors have no place in the model", info["unexpected_keys"])
    _expect_none(folder, "tensors have another shape than the model's", mismatched)
    loaded: CollavoForConditionalGeneration = model
    return loaded


def load_folder(
    folder: str | PathLike[str], **kwargs: Any
) -> tuple[CollavoForConditionalGeneration, CollavoProcessor]:
    """Load a model folder with its processor, and see that the two belong together.

    Args:
        folder: A folder into which both were saved with ``save_pretrained``.
        **kwargs: As in ``load_pretrained``.

    Returns:
        The model, in evaluation mode, and the processor.

    Raises:
        FileNotFoundError: naming the folder or file that is missing.
        ValueError: naming what is damaged, or where processor and model disagree.

    Example:
        >>> load_folder("no-such-folder")
        Traceback (most recent call last):
            ...
        FileNotFoundError: no-such-folder: no such model folder
    """
    weight_files(folder)  # a folder that is none is said to be none, not to lack a processor
    if not (Path(folder) / PROCESSOR_NAME).is_file():
        raise FileNotFoundError(
            f"{Path(folder) / PROCESSOR_NAME}: missing from the model folder; save the model's "
            "processor there with save_pretrained"
        )
    model = load_pretrained(folder, **kwargs)
    processor = _load_processor(folder)
    _check_pair(folder, model.config, processor)
    return model, processor


def _load_processor(folder: str | PathLike[str]) -> CollavoProcessor:
    try:
        loaded: CollavoProcessor = CollavoProcessor.from_pretrained(folder)
    except (ValueError, OSError, TypeError) as error:
        # transformers' message is a page.
        reason = " ".join(str(error).split())[:200]
        raise ValueError(f"{folder}: its processor cannot be read ({reason})") from error
    return loaded


def _check_pair(folder: str | PathLike[str], config: Any, processor: CollavoProcessor) -> None:
    """Raise if the processor would make inputs that are not this model's."""
    side = config.vision_config.image_size // config.vision_config.patch_size
    expected: dict[str, tuple[object, object]] = {
        "grid": (processor.grid, (side, side)),
        "image_token_id": (processor.image_token_id, config.image_token_id),
    }
    if config.crayon_mode != "none":
        expected["num_classes"] = (processor.num_classes, config.num_crayon_classes)
        expected["max_number"] = (processor.max_number, config.max_crayon_number)
    for name, (found, wanted) in expected.items():
        if found != wanted:
            raise ValueError(
                f"{folder}: its processor has {name} {found} and its model {wanted}; save the "
                "processor that the model was trained with"
            )


def _expect_none(folder: str | PathLike[str], what: str, names: Iterable[str]) -> None:
    listed = sorted(names)
    if listed:
        more = f" and {len(listed) - 5} more" if len(listed) > 5 else ""
        raise ValueError(
            f"{folder}: {what}: {', '.join(listed[:5])}{more}; "
            "the weights and config.json are not of the same model"
        )
