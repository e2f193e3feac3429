"""Loading model folders: what does not fit is named, never drawn at random."""

from __future__ import annotations

from os import PathLike
from pathlib import Path
from typing import Any, cast

import collavo._requirements  # noqa: F401  (before what it checks)

from transformers.utils import CONFIG_NAME, PROCESSOR_NAME

from collavo._arguments import expect_path
from collavo.configuration import CollavoConfig, CollavoLlavaConfig, check_model_type
from collavo.model.files import read_tensors as read_tensors
from collavo.model.files import weight_files as weight_files
from collavo.model.inventory import expect_none
from collavo.model.llava import CollavoForConditionalGeneration
from collavo.model.patched import CollavoLlavaForConditionalGeneration
from collavo.panoptic.json_files import read_object
from collavo.processing.processor import CollavoProcessor
from collavo.writing import check_settled


def load_pretrained(
    folder: str | PathLike[str], **kwargs: Any
) -> CollavoForConditionalGeneration | CollavoLlavaForConditionalGeneration:
    """Load a model folder and accept no tensor too few, too many, or of another shape.

    A folder in which a LLaVA that ``apply_to_llava`` changed was saved gives that LLaVA again: with
    its crayon and adapters, and its decoder in the 4 bits it had.

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
    expect_path("folder", folder, "a model folder")
    if _config_values(folder).get("model_type") == CollavoLlavaConfig.model_type:
        return cast(
            CollavoLlavaForConditionalGeneration,
            _load_whole(CollavoLlavaForConditionalGeneration, folder, kwargs),
        )
    return _load_collavo(folder, kwargs)


def _load_collavo(
    folder: str | PathLike[str], kwargs: dict[str, Any]
) -> CollavoForConditionalGeneration:
    return cast(
        CollavoForConditionalGeneration,
        _load_whole(CollavoForConditionalGeneration, folder, kwargs),
    )


def _load_whole(kind: Any, folder: str | PathLike[str], kwargs: dict[str, Any]) -> object:
    model, info = kind.from_pretrained(folder, output_loading_info=True, **kwargs)
    expect_none(str(folder), "tensors are missing", info["missing_keys"])
    return cast(object, model)


def _config_values(folder: str | PathLike[str]) -> dict[str, Any]:
    """Read ``config.json``, which says what kind of model the folder holds."""
    expect_path("folder", folder, "a model folder")
    if not Path(folder).is_dir():
        raise FileNotFoundError(f"{folder}: no such model folder")
    check_settled(folder)
    path = Path(folder) / CONFIG_NAME
    if not path.is_file():
        raise FileNotFoundError(f"{path}: missing from the model folder")
    return read_object(path, utf8=True)


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
    expect_path("folder", folder, "a model folder")
    # A folder that is none, or another model's, is said to be that and not to lack a processor.
    check_model_type(_config_values(folder), str(folder), CollavoConfig.model_type)
    weight_files(folder)
    if not (Path(folder) / PROCESSOR_NAME).is_file():
        raise FileNotFoundError(
            f"{Path(folder) / PROCESSOR_NAME}: missing from the model folder; save the model's "
            "processor there with save_pretrained"
        )
    model = _load_collavo(folder, kwargs)
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
