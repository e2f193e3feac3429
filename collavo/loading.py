"""Reading model folders: 4-bit tensors, and a load that names what does not fit."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

import collavo._requirements  # noqa: F401  (before what it checks)

import torch
from huggingface_hub import snapshot_download
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers.utils import PROCESSOR_NAME, SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from collavo_kernels import NF4Weight

if TYPE_CHECKING:
    from collavo.model.llava import CollavoForConditionalGeneration
    from collavo.processing.processor import CollavoProcessor

_FACTS = ".quant_state.bitsandbytes__nf4"
_PARTS = (".absmax", ".quant_map", ".nested_absmax", ".nested_quant_map", _FACTS)
HUB_OPTIONS = ("cache_dir", "force_download", "local_files_only", "token", "revision", "subfolder")


def local_folder(name: str | PathLike[str], options: Mapping[str, Any]) -> Path:
    """Return the folder that holds a model, after fetching it if it is a hub id.

    Args:
        name: A folder or a hub id.
        options: transformers' download options, by name; others are not read.
    """
    subfolder = options.get("subfolder") or ""
    if Path(name).is_dir():
        return Path(name) / subfolder
    known = {key: options[key] for key in HUB_OPTIONS[:-1] if key in options}
    fetched = snapshot_download(str(name), allow_patterns=["*.json", "*.safetensors"], **known)
    return Path(fetched) / subfolder


def weight_files(folder: str | PathLike[str]) -> list[Path]:
    """Return the safetensors files of a model folder, in the order of their names.

    Args:
        folder: As ``save_pretrained`` wrote it, in one file or in shards with an index.

    Raises:
        FileNotFoundError: naming the folder or file that is missing.
        ValueError: if the index is not one.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: no such model folder")
    index = folder / SAFE_WEIGHTS_INDEX_NAME
    if index.is_file():
        try:
            names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        except (json.JSONDecodeError, KeyError, AttributeError) as error:
            raise ValueError(f"{index}: not an index of safetensors shards") from error
        files = [folder / name for name in sorted(names)]
    else:
        files = [folder / SAFE_WEIGHTS_NAME]
    for file in files:
        if not file.is_file():
            raise FileNotFoundError(f"{file}: missing from the model folder")
    return files


def read_tensors(files: Iterable[Path]) -> dict[str, Tensor]:
    """Read safetensors files.

    Args:
        files: Their paths.

    Raises:
        ValueError: naming a file that is truncated or is not a safetensors file.
    """
    tensors: dict[str, Tensor] = {}
    for file in files:
        try:
            with safe_open(file, framework="pt") as opened:
                tensors |= {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
        except SafetensorError as error:
            raise ValueError(f"{file}: not a complete safetensors file ({error})") from error
    return tensors


def bytes_from_bitsandbytes(
    tensors: dict[str, Tensor],
) -> tuple[dict[str, Tensor], dict[str, torch.dtype]]:
    """Bring bitsandbytes' entries of every 4-bit weight to the parameters that hold them here.

    Args:
        tensors: A checkpoint's tensors.

    Returns:
        The tensors with ``weight`` and ``weight_scales`` (uint8) in place of ``weight`` and its
        parts, and the dtype each 4-bit weight was quantised from, by the name of the weight.

    Raises:
        ValueError: naming the part of a weight that is missing or does not fit.
    """
    weights = [name.removesuffix(_FACTS) for name in tensors if name.endswith(_FACTS)]
    parts = {name + part for name in weights for part in _PARTS}
    found = {name: value for name, value in tensors.items() if name not in parts}
    dtypes: dict[str, torch.dtype] = {}
    for name in weights:
        weight = NF4Weight.from_state_dict(tensors, name)
        found[name], found[f"{name}_scales"] = weight.packed, weight.scales
        dtypes[name] = weight.dtype
    return found, dtypes


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
    from collavo.model.llava import CollavoForConditionalGeneration

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
    from collavo.processing.processor import CollavoProcessor

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
