"""The files of a model folder: weights found, read, and their 4-bit parts brought together."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from os import PathLike
from pathlib import Path
from typing import Any

import collavo._requirements  # noqa: F401  (before what it checks)

import torch
from huggingface_hub import snapshot_download
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from collavo_kernels import NF4Weight

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
