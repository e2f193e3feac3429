"""Loading model folders: what does not fit is named, never drawn at random."""

from __future__ import annotations

from os import PathLike
from pathlib import Path
from typing import Any, cast

import collavo._requirements  # noqa: F401  (before what it checks)

from transformers.utils import PROCESSOR_NAME

from collavo.configuration import CollavoConfig, CollavoLlavaConfig, check_model_type
from collavo.model.families import token_ids
from collavo.model.files import read_config_file
from collavo.model.files import read_tensors as read_tensors
from collavo.model.files import weight_files as weight_files
from collavo.model.inventory import expect_none
from collavo.model.llava import CollavoForConditionalGeneration
from collavo.model.patched import CollavoLlavaForConditionalGeneration
from collavo.processing.processor import CollavoProcessor

# Families whose images all have the grid of the tower's patches, if the processor has one grid.
_GRID_OF_PATCHES = ("collavo", "llava", "vipllava", "video_llava")


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
    patched = read_config_file(folder).get("model_type") == CollavoLlavaConfig.model_type
    kind: Any = CollavoLlavaForConditionalGeneration if patched else CollavoForConditionalGeneration
    model, info = kind.from_pretrained(folder, output_loading_info=True, **kwargs)
    expect_none(str(folder), "tensors are missing", info["missing_keys"])
    return cast("CollavoForConditionalGeneration | CollavoLlavaForConditionalGeneration", model)


def expect_model_folder(folder: str | PathLike[str]) -> None:
    """Look at a folder's ``config.json``, and raise unless ``load_folder`` loads such models.

    Args:
        folder: As in ``load_folder``.

    Raises:
        FileNotFoundError: naming the folder or file that is missing.
        ValueError: naming the ``model_type``, with the way for a LLaVA or the official CoLLaVO.
    """
    values = read_config_file(folder)
    if values.get("model_type") != CollavoLlavaConfig.model_type:
        check_model_type(values, str(folder), CollavoConfig.model_type)


def load_folder(
    folder: str | PathLike[str], **kwargs: Any
) -> tuple[
    CollavoForConditionalGeneration | CollavoLlavaForConditionalGeneration, CollavoProcessor
]:
    """Load a model folder with its processor, and see that the two belong together.

    The model may be one that ``apply_to_llava`` changed, of any family.

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
    # A folder that is none, or another model's, is said to be that and not to lack a processor.
    expect_model_folder(folder)
    weight_files(folder)
    if not (Path(folder) / PROCESSOR_NAME).is_file():
        raise FileNotFoundError(
            f"{Path(folder) / PROCESSOR_NAME}: missing from the model folder; save the model's "
            "processor there with save_pretrained"
        )
    model = load_pretrained(folder, **kwargs)
    processor = _load_processor(folder)
    _check_pair(folder, model, processor)
    return model, processor


def _load_processor(folder: str | PathLike[str]) -> CollavoProcessor:
    try:
        loaded: CollavoProcessor = CollavoProcessor.from_pretrained(folder)
    except (ValueError, OSError, TypeError) as error:
        # transformers' message is a page.
        reason = " ".join(str(error).split())[:200]
        raise ValueError(f"{folder}: its processor cannot be read ({reason})") from error
    return loaded


def _check_pair(folder: str | PathLike[str], model: Any, processor: CollavoProcessor) -> None:
    """Raise if the processor would make inputs that are not this model's."""
    config, prompt = model.config, model.model.crayon_prompt
    expected: dict[str, tuple[object, object]] = {
        "image_token_id": (processor.image_token_id, token_ids(model.model)["image"])
    }
    if processor.one_grid and config.model_type in _GRID_OF_PATCHES:
        side = config.vision_config.image_size // config.vision_config.patch_size
        expected["grid"] = (processor.grid, (side, side))
    if prompt is not None:
        classes, numbers = prompt.class_embedding, prompt.number_embedding
        expected["num_classes"] = (processor.num_classes, classes.weight.shape[0] - 1)
        expected["max_number"] = (processor.max_number, numbers.weight.shape[0] - 1)
    for name, (found, wanted) in expected.items():
        if found != wanted:
            raise ValueError(
                f"{folder}: its processor has {name} {found} and its model {wanted}; save the "
                "processor that the model was trained with"
            )
