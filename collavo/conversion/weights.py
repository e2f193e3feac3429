"""The tensors of a folder in another layout: found, named, and read one by one."""

from __future__ import annotations

import errno
import pickle
import zipfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any, cast

import collavo._requirements  # noqa: F401  (before what it checks)

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers.utils import (
    SAFE_WEIGHTS_INDEX_NAME,
    SAFE_WEIGHTS_NAME,
    WEIGHTS_INDEX_NAME,
    WEIGHTS_NAME,
)

from collavo.conversion.plan import Header, listed
from collavo.model.files import DTYPES, placed_tensors


@dataclass(frozen=True)
class _Format:
    single: str
    index: str
    shards: str


# transformers takes safetensors first.
_FORMATS = (
    _Format(SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME, "model-*-of-*.safetensors"),
    _Format(WEIGHTS_NAME, WEIGHTS_INDEX_NAME, "pytorch_model-*-of-*.bin"),
)


class FolderWeights:
    """The tensors of a folder's safetensors or weights-only torch files.

    Args:
        folder: With one file, or shards and their index.

    Raises:
        FileNotFoundError: naming the file that is missing.
        ValueError: naming a file that is truncated, none of its format, or surplus, or a tensor
            that is in two files or in another than the index says.
    """

    def __init__(self, folder: str | PathLike[str]) -> None:
        self.folder = Path(folder)
        files, placed = _find(self.folder)
        self._look(files)
        if placed is not None:
            self._check_places(placed)

    def _look(self, files: list[Path]) -> None:
        self._opened: tuple[Path, Mapping[str, Tensor]] | None = None
        self._files: dict[str, Path] = {}
        headers: dict[str, Header] = {}
        for file in files:
            for name, header in self._headers_of(file):
                if name in self._files:
                    raise ValueError(
                        f"{file}: holds {name}, which {self._files[name].name} holds too"
                    )
                self._files[name], headers[name] = file, header
        self._opened = None
        self.headers: Mapping[str, Header] = headers
        self.largest = max(file.stat().st_size for file in files)

    def read(self, name: str) -> Tensor:
        """Read one tensor.

        Args:
            name: Its name.

        Raises:
            ValueError: naming the file, if it cannot be read any more.
        """
        file = self._files[name]
        if file.suffix == ".bin":
            return self._torch_file(file)[name]
        # A file that stays open keeps in memory all that was read of it.
        try:
            with safe_open(file, framework="pt") as tensors:
                return cast(Tensor, tensors.get_tensor(name))
        except SafetensorError as error:
            raise _damaged(file, error) from error

    def _headers_of(self, file: Path) -> Iterable[tuple[str, Header]]:
        if file.suffix == ".bin":
            tensors = self._torch_file(file)
            return [(name, Header(tuple(t.shape), t.dtype)) for name, t in tensors.items()]
        try:
            with safe_open(file, framework="pt") as opened:
                entries = [(name, opened.get_slice(name)) for name in opened.keys()]  # noqa: SIM118
                return [
                    (name, Header(tuple(e.get_shape()), _dtype(file, name, e.get_dtype())))
                    for name, e in entries
                ]
        except SafetensorError as error:
            raise _damaged(file, error) from error

    def _torch_file(self, file: Path) -> Mapping[str, Tensor]:
        """Return a torch file's tensors, mapped and not read; one file is open at a time."""
        if self._opened is None or self._opened[0] != file:
            self._opened = None
            self._opened = (file, _load_torch(file))
        return self._opened[1]

    def _check_places(self, placed: Mapping[str, str]) -> None:
        for name, file_name in sorted(placed.items()):
            if name not in self._files or self._files[name].name != file_name:
                found = self._files[name].name if name in self._files else "no file"
                raise ValueError(
                    f"{self.folder}: its index expects {name} in {file_name}, it is in {found}"
                )
        if surplus := [name for name in self._files if name not in placed]:
            raise ValueError(
                f"{self.folder}: tensors are in its shards and not in their index: "
                f"{listed(sorted(surplus))}"
            )


class FileWeights(FolderWeights):
    """The tensors of one safetensors or weights-only torch file.

    Args:
        file: Ends in ``.safetensors`` or ``.bin``.

    Raises:
        FileNotFoundError: if it is missing.
        ValueError: if it is truncated or none of its format.
    """

    def __init__(self, file: str | PathLike[str]) -> None:
        path = Path(file)
        if path.suffix not in (".bin", ".safetensors"):
            raise ValueError(f"{path}: expected a file of tensors, .bin or .safetensors")
        if not path.is_file():
            raise FileNotFoundError(f"{path}: no such file")
        self.folder = path
        self._look([path])


def _find(folder: Path) -> tuple[list[Path], Mapping[str, str] | None]:
    """Return the files of a folder's weights, and the file of each tensor by their index."""
    for kind in _FORMATS:
        single, index = folder / kind.single, folder / kind.index
        shards = sorted(folder.glob(kind.shards))
        if single.is_file() and (index.is_file() or shards):
            other = index if index.is_file() else shards[0]
            raise ValueError(
                f"{folder}: expected the weights in one file or in shards, got {single.name} and "
                f"{other.name}; remove what is not to be read"
            )
        if single.is_file():
            return [single], None
        if index.is_file():
            placed = placed_tensors(index)
            files = [folder / name for name in sorted(set(placed.values()))]
            _expect_shards(index, files, shards)
            return files, placed
        if shards:
            raise FileNotFoundError(
                f"{index}: missing beside {shards[0].name}, which it has to name"
            )
    names = " or ".join(kind.single for kind in _FORMATS)
    raise FileNotFoundError(f"{folder}: expected {names}, or shards with their index, found none")


def _expect_shards(index: Path, files: list[Path], there: list[Path]) -> None:
    for file in files:
        if not file.is_file():
            raise FileNotFoundError(f"{file}: missing; {index.name} names it")
    if surplus := [file.name for file in there if file not in files]:
        raise ValueError(
            f"{index.parent}: surplus shards that {index.name} does not name: {listed(surplus)}"
        )


def _load_torch(file: Path) -> dict[str, Tensor]:
    try:
        # Files from before torch 1.6 are no zip archives, and those alone can be mapped.
        mapped = zipfile.is_zipfile(file)
        loaded: Any = torch.load(file, map_location="cpu", weights_only=True, mmap=mapped or None)
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, KeyError) as error:
        raise _damaged(file, error) from error
    except OSError as error:
        if error.errno != errno.EINVAL:  # of seeking to before a file's beginning
            raise
        raise _damaged(file, error) from error
    if not isinstance(loaded, dict) or not all(
        isinstance(name, str) and isinstance(value, Tensor) for name, value in loaded.items()
    ):
        raise ValueError(f"{file}: expected a dictionary of tensors, got {type(loaded).__name__}")
    return loaded


def _dtype(file: Path, name: str, word: str) -> torch.dtype:
    if word not in DTYPES:
        raise ValueError(f"{file}: {name}: expected one of {', '.join(DTYPES)}, got dtype {word}")
    return DTYPES[word]


def _damaged(file: Path, error: Exception) -> ValueError:
    kind = "torch file of weights alone" if file.suffix == ".bin" else "safetensors file"
    reason = " ".join(str(error).split())[:200]
    return ValueError(f"{file}: not a complete {kind} ({reason})")
