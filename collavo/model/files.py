"""The files of a model folder: found, read, written, and their 4-bit parts brought together."""

from __future__ import annotations

import glob
import json
import zlib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from os import PathLike
from pathlib import Path, PureWindowsPath
from typing import Any, NamedTuple, cast

import collavo._requirements  # noqa: F401  (before what it checks)

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers.utils import (
    CONFIG_NAME,
    GENERATION_CONFIG_NAME,
    SAFE_WEIGHTS_INDEX_NAME,
    SAFE_WEIGHTS_NAME,
    WEIGHTS_INDEX_NAME,
    WEIGHTS_NAME,
)

from collavo import writing
from collavo._arguments import expect_path
from collavo.configuration import HUB_OPTIONS as HUB_OPTIONS
from collavo.panoptic.json_files import read_object
from collavo_kernels import NF4Weight

FACTS = ".quant_state.bitsandbytes__nf4"
PARTS = (".absmax", ".quant_map", ".nested_absmax", ".nested_quant_map", FACTS)
_SUMS = "crc32"
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
"""By safetensors' names."""


class StoredTensor(NamedTuple):
    """What the header of a safetensors file says of a tensor.

    Attributes:
        shape: Its shape.
        dtype: safetensors' name of its dtype, e.g. ``"BF16"``.
        name: Its name there.
        source: The file that it is in, or itself.
    """

    shape: tuple[int, ...]
    dtype: str
    name: str
    source: Path | Tensor

    def read(self) -> Tensor:
        """Read the tensor."""
        if isinstance(self.source, Tensor):
            return self.source
        with _opened(self.source) as tensors:
            return cast(Tensor, tensors.get_tensor(self.name))


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


def read_config_file(folder: str | PathLike[str]) -> dict[str, Any]:
    """Read ``config.json``, which says what kind of model a folder holds.

    Args:
        folder: Any model folder.

    Raises:
        FileNotFoundError: naming the folder or file that is missing, or a save that was broken off.
        ValueError: if the file holds no JSON object.
    """
    expect_path("folder", folder, "a model folder")
    if not Path(folder).is_dir():
        raise FileNotFoundError(f"{folder}: no such model folder")
    writing.check_settled(folder)
    path = Path(folder) / CONFIG_NAME
    if not path.is_file():
        raise FileNotFoundError(f"{path}: missing from the model folder")
    return read_object(path, utf8=True)


def weight_files(folder: str | PathLike[str], variant: str | None = None) -> list[Path]:
    """Return the safetensors files of a model folder, in the order of their names.

    Args:
        folder: As ``save_pretrained`` wrote it, in one file or in shards with an index.
        variant: As in transformers: the files' names have it before their ending.

    Raises:
        FileNotFoundError: naming the folder or file that is missing.
        ValueError: if the folder holds the weights of two saves, a save into it was broken off, or
            the index is none or names a file outside the folder.
    """
    expect_path("folder", folder, "a model folder")
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: no such model folder")
    writing.check_settled(folder)
    single, index = (
        folder / _variant(name, variant) for name in (SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME)
    )
    files = _indexed(index) if index.is_file() else [single]
    _expect_one_save(folder, variant, [*files, index] if index.is_file() else files)
    for file in files:
        if not file.is_file():
            raise FileNotFoundError(f"{file}: missing from the model folder")
    return files


def _variant(name: str, variant: str | None) -> str:
    stem, _, ending = name.rpartition(".")
    return name if variant is None else f"{stem}.{variant}.{ending}"


def _indexed(index: Path) -> list[Path]:
    """Return the files that an index names."""
    return [index.parent / name for name in sorted(set(placed_tensors(index).values()))]


def placed_tensors(index: Path) -> dict[str, str]:
    """Return the file of each tensor, as an index of shards says.

    Args:
        index: The index.

    Raises:
        ValueError: if it is none, or names a file elsewhere.
    """
    placed: dict[str, str] = _read_index(index)["weight_map"]
    for name in sorted(set(placed.values())):
        # Windows' rules know every separator and drive.
        if name in (".", "..") or PureWindowsPath(name).name != name:
            raise ValueError(
                f"{index}: expected names of files beside it, got {name!r}; put the shards there "
                "and let the index name them without a path"
            )
    return placed


def _read_index(index: Path) -> dict[str, Any]:
    """Return an index's content, with the file of each tensor in ``weight_map``."""
    read = read_object(index, utf8=True)
    placed, facts = read.get("weight_map"), read.get("metadata")
    names = list(placed.values()) if isinstance(placed, dict) else []
    fits = bool(names) and all(isinstance(name, str) and name for name in names)
    if not fits or not isinstance(facts, dict):
        raise ValueError(f"{index}: not an index of safetensors shards")
    return read


def _expect_one_save(folder: Path, variant: str | None, used: list[Path]) -> None:
    """Raise if weights of another save lie beside the files in use: which are the last is unknown.

    transformers takes one file before shards, and safetensors before PyTorch's format.
    """
    others = [path for path in _all_weights(folder, variant) if path not in used]
    if others and any(file.is_file() for file in used):
        raise ValueError(
            f"{folder}: holds the weights of two saves, {used[-1].name} and {others[0].name}; "
            "remove the files of the older one"
        )
    if others:
        raise FileNotFoundError(
            f"{used[0]}: missing from the model folder, which has {others[0].name}; only what "
            "save_pretrained writes is read: one safetensors file, or shards with their index"
        )


def _all_weights(folder: Path, variant: str | None) -> list[Path]:
    """Return all files of a folder that a loader could take for a model's weights."""
    return sorted({path for name in weight_patterns(variant) for path in folder.glob(name)})


def weight_patterns(variant: str | None = None) -> tuple[str, ...]:
    """Return patterns for the names of all files that a loader could take for a model's weights.

    Args:
        variant: As in ``weight_files``; the files of other variants do not match.
    """
    kinds = ((SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME), (WEIGHTS_NAME, WEIGHTS_INDEX_NAME))
    found = []
    for single, index in kinds:
        whole = glob.escape(_variant(single, variant))
        stem, _, ending = whole.rpartition(".")
        found += [whole, glob.escape(_variant(index, variant)), f"{stem}-*-of-*.{ending}"]
    return (*found, "shard-*-model-*-of-*.safetensors")


def read_headers(
    folder: str | PathLike[str], variant: str | None = None
) -> dict[str, StoredTensor]:
    """Read which tensors a model folder holds, from the headers of its files.

    Of shards whose index holds their sums (every sharded save of this package) all bytes are read
    too: the headers of two saves of one model are the same.

    Args:
        folder: As in ``weight_files``.
        variant: As in ``weight_files``.

    Raises:
        FileNotFoundError: naming the folder or file that is missing.
        ValueError: as ``weight_files``; naming a file that is truncated, is not a safetensors file
            or has another sum than the index says, or a tensor that is in two files or in another
            file than the index says.
    """
    stored: dict[str, StoredTensor] = {}
    place: dict[str, str] = {}
    for file in weight_files(folder, variant):
        with _opened(file) as tensors:
            for name in tensors.keys():  # noqa: SIM118
                if name in place:
                    raise ValueError(
                        f"{file}: holds {name}, which {place[name]} holds too; the files are of "
                        "two saves"
                    )
                entry, place[name] = tensors.get_slice(name), file.name
                shape = tuple(entry.get_shape())
                stored[name] = StoredTensor(shape, entry.get_dtype(), name, file)
    index = Path(folder) / _variant(SAFE_WEIGHTS_INDEX_NAME, variant)
    if index.is_file():
        _check_index(index, place)
    return stored


def _check_index(index: Path, place: Mapping[str, str]) -> None:
    """Raise unless shards hold what their index says, and are those that it was written with."""
    read = _read_index(index)
    for name, file_name in sorted(read["weight_map"].items()):
        if place.get(name) != file_name:
            raise ValueError(
                f"{index}: expected {name} in {file_name}, it is in "
                f"{place.get(name, 'no file')}; the files are of two saves"
            )
    sums = read["metadata"].get(_SUMS, {})
    for file_name in sorted(set(place.values())):
        if isinstance(sums, dict) and sums.get(file_name) not in (None, _sum(index, file_name)):
            raise ValueError(
                f"{index.parent / file_name}: is not the file that {index.name} was written with "
                f"({_SUMS}); the files are of two saves"
            )


def sign_index(folder: Path, variant: str | None = None) -> None:
    """Write the sums of shards into their index, so that a mixture of two saves is noticed.

    Shards of two saves of one model have the same names and hold the same tensors.

    Args:
        folder: To which a model was saved; in one file there is nothing to sign.
        variant: As in ``weight_files``.
    """
    index = folder / _variant(SAFE_WEIGHTS_INDEX_NAME, variant)
    if index.is_file():
        read = _read_index(index)
        names = sorted(set(read["weight_map"].values()))
        read["metadata"][_SUMS] = {name: _sum(index, name) for name in names}
        index.write_text(json.dumps(read, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _sum(index: Path, file_name: str) -> str:
    total = 0
    with (index.parent / file_name).open("rb") as file:
        while block := file.read(1 << 24):
            total = zlib.crc32(block, total)
    return f"{total:08x}"


def check_generation(folder: Path | None) -> None:
    """Raise if a folder's generation settings cannot be read: transformers would take its own.

    Args:
        folder: A model folder, or None.

    Raises:
        ValueError: naming the file.
    """
    path = None if folder is None else folder / GENERATION_CONFIG_NAME
    if path is not None and path.is_file():
        read_object(path, utf8=True)


def headers_of(tensors: Mapping[str, Tensor]) -> dict[str, StoredTensor]:
    """Return what the header of a safetensors file would say of tensors.

    Args:
        tensors: A state dict.
    """
    words = {dtype: word for word, dtype in DTYPES.items()}
    return {
        name: StoredTensor(
            tuple(value.shape), words.get(value.dtype, str(value.dtype)), name, value
        )
        for name, value in tensors.items()
    }


def read_tensors(files: Iterable[Path]) -> dict[str, Tensor]:
    """Read safetensors files.

    Args:
        files: Their paths.

    Raises:
        ValueError: naming a file that is truncated or is not a safetensors file.
    """
    tensors: dict[str, Tensor] = {}
    for file in files:
        with _opened(file) as opened:
            tensors |= {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    return tensors


def read_stored(stored: Mapping[str, StoredTensor]) -> dict[str, Tensor]:
    """Read tensors, each file once.

    Args:
        stored: What to read, by the names to give them.

    Raises:
        ValueError: naming a file that is truncated or is not a safetensors file.
    """
    sources = [entry.source for entry in stored.values()]
    tensors = read_tensors(sorted({source for source in sources if isinstance(source, Path)}))
    return {
        name: entry.source if isinstance(entry.source, Tensor) else tensors[entry.name]
        for name, entry in stored.items()
    }


@contextmanager
def _opened(file: Path) -> Iterator[Any]:
    try:
        with safe_open(file, framework="pt") as tensors:
            yield tensors
    except SafetensorError as error:
        raise ValueError(f"{file}: not a complete safetensors file ({error})") from error


def bytes_from_bitsandbytes(
    tensors: Mapping[str, Tensor], weights: Iterable[str]
) -> tuple[dict[str, Tensor], dict[str, torch.dtype]]:
    """Bring bitsandbytes' entries of 4-bit weights to the parameters that hold them here.

    Args:
        tensors: A checkpoint's tensors.
        weights: The names of the 4-bit weights.

    Returns:
        The tensors with ``weight`` and ``weight_scales`` (uint8) in place of ``weight`` and its
        parts, and the dtype each 4-bit weight was quantised from, by the name of the weight.

    Raises:
        ValueError: naming the part of a weight that is missing or does not fit.
    """
    names = list(weights)
    parts = {name + part for name in names for part in PARTS}
    found = {name: value for name, value in tensors.items() if name not in parts}
    dtypes: dict[str, torch.dtype] = {}
    for name in names:
        weight = NF4Weight.from_state_dict(tensors, name)
        found[name], found[f"{name}_scales"] = weight.packed, weight.scales
        dtypes[name] = weight.dtype
    return found, dtypes


def made_dense(tensors: Mapping[str, Tensor], weights: Iterable[str]) -> dict[str, Tensor]:
    """Bring bitsandbytes' entries of 4-bit weights to dense weights, in the dtype they came from.

    Args:
        tensors: A checkpoint's tensors.
        weights: The names of the 4-bit weights.

    Raises:
        ValueError: as ``bytes_from_bitsandbytes``.
    """
    names = list(weights)
    parts = {name + part for name in names for part in PARTS}
    dense = {name: NF4Weight.from_state_dict(tensors, name).dequantize() for name in names}
    return {name: value for name, value in tensors.items() if name not in parts} | dense


@contextmanager
def fields_read(where: str) -> Iterator[None]:
    """Name the file whose fields are read, where one of another kind makes code fail.

    Args:
        where: The file.

    Raises:
        ValueError: for what such fields raise.
    """
    try:
        yield
    except (AttributeError, KeyError, RuntimeError, StrictDataclassError, TypeError) as error:
        reason = " ".join(str(error).split())[:300]
        raise ValueError(f"{where}: a field is of another kind than expected ({reason})") from error
