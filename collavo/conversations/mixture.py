"""Which records of which files a data set has, and how often."""

from __future__ import annotations

import itertools
import math
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import yaml

from collavo.panoptic.json_files import integer, shown
from collavo.writing import PathLike

_STRATEGY = re.compile(r"(?:(first|end|random):)?\s*([0-9]+)(%?)")
_BRACES = re.compile(r"\{([^{}]*)\}")
# More than anybody means: every repetition is a number in memory.
_MOST = 1000
_YAML = (".yaml", ".yml")


class Source(NamedTuple):
    """A file of records, and what is taken of it.

    Attributes:
        path: The file.
        weight: How often each record counts; of a fraction, a part of them counts once more.
        strategy: ``"all"``, ``"first:N"``, ``"end:N"``, ``"random:N"``, N a number or a share with
            ``%``; ``"N%"`` is ``"random:N%"``.
    """

    path: Path
    weight: float = 1.0
    strategy: str = "all"


def read_sources(
    path: PathLike | Sequence[PathLike | tuple[PathLike, float]],
) -> list[Source]:
    """Return the files that a data set is made of.

    Args:
        path: A file of records, LLaVA-NeXT's YAML of a mixture, or a list of them, each alone or
            with a weight. ``{a,b}`` in a name stands for two files, unless one has that name.

    Raises:
        FileNotFoundError: naming the YAML that is not there.
        ValueError: naming the argument, or the YAML and its entry, if it is something else.

    Example:
        >>> [(str(one.path), one.weight) for one in read_sources([("{a,b}.json", 2)])]
        [('a.json', 2.0), ('b.json', 2.0)]
    """
    given = list(path) if isinstance(path, list | tuple) else [path]
    if not given:
        raise ValueError("path: expected a file of records or a list of them, got none")
    sources = []
    for one in given:
        name: Any
        weight: Any
        name, weight = one if isinstance(one, tuple) and len(one) == 2 else (one, 1.0)
        if not isinstance(name, str | os.PathLike):
            raise ValueError(
                f"path: expected a file, or a pair of a file and its weight, got {shown(one)}"
            )
        number = isinstance(weight, int | float) and not isinstance(weight, bool)
        if not number or not 0 < weight < math.inf:
            raise ValueError(
                f"path: expected the weight of {name} as a number above 0, got {shown(weight)}"
            )
        if weight > _MOST:
            raise ValueError(
                f"path: expected a weight of {name} of at most {_MOST}, got {shown(weight)}"
            )
        for file in _expanded(os.fspath(name)):
            mixed = file.suffix.lower() in _YAML
            parts = _read_mixture(file) if mixed else [Source(file)]
            sources += [part._replace(weight=float(weight)) for part in parts]
    return sources


def _read_mixture(path: Path) -> list[Source]:
    if not path.is_file():
        raise FileNotFoundError(f"{path}: there is no such file")
    try:
        content = yaml.safe_load(path.read_bytes())
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not a YAML file ({' '.join(str(error).split())})") from error
    entries = content.get("datasets") if isinstance(content, dict) else None
    if not isinstance(entries, list) or not entries:
        raise ValueError(f"{path}: expected a list 'datasets', got {shown(entries)}")
    sources = []
    for number, entry in enumerate(entries):
        where = f"{path}: datasets[{number}]"
        name = entry.get("json_path") if isinstance(entry, dict) else None
        if not isinstance(name, str) or not name.strip():
            raise ValueError(f"{where}: expected 'json_path' as a file's name, got {shown(entry)}")
        given = entry.get("sampling_strategy")
        strategy = "all" if given is None else str(given).strip()
        if strategy != "all" and _STRATEGY.fullmatch(strategy) is None:
            raise ValueError(
                f"{where}: expected 'sampling_strategy' as all, first:N, end:N, random:N or N%, "
                f"N a number or a share such as 10%, got {strategy!r}"
            )
        beside = [path.parent / file for file in _expanded(name)]
        # LLaVA-NeXT starts from the working folder.
        files = [
            one if one.exists() else Path(file) if Path(file).exists() else one
            for one, file in zip(beside, _expanded(name), strict=True)
        ]
        sources += [Source(file, strategy=strategy) for file in files]
    return sources


def _expanded(name: str) -> list[Path]:
    pieces = _BRACES.split(name)
    if len(pieces) == 1 or Path(name).exists():
        return [Path(name)]
    choices = [piece.split(",") if i % 2 else [piece] for i, piece in enumerate(pieces)]
    return [Path("".join(choice)) for choice in itertools.product(*choices)]


def chosen(source: Source, entries: int, rng: np.random.Generator) -> np.ndarray[Any, Any]:
    """Return the numbers of the records that are taken of a file, in the order of the file.

    Args:
        source: The file.
        entries: How many it has, faulty ones too.
        rng: Draws what is drawn.

    Example:
        >>> chosen(Source(Path("a.json"), strategy="end:2"), 5, np.random.default_rng(0)).tolist()
        [3, 4]
    """
    found = _STRATEGY.fullmatch(source.strategy)
    if found is None:
        return np.arange(entries)
    how, count, share = found[1] or "random", integer(found[2]) or 0, found[3]
    # A share is rounded up, as LLaVA-NeXT does.
    count = min(entries, -(-entries * count // 100) if share else count)
    if how == "random":
        return np.sort(rng.permutation(entries)[:count])
    return np.arange(entries)[:count] if how == "first" else np.arange(entries)[entries - count :]


def repeated(
    rows: np.ndarray[Any, Any], weight: float, rng: np.random.Generator
) -> np.ndarray[Any, Any]:
    """Return rows as often as a weight says; which ones count once more is drawn.

    Args:
        rows: Any.
        weight: Above 0.
        rng: Draws.

    Example:
        >>> repeated(np.arange(4), 1.5, np.random.default_rng(0)).tolist()
        [0, 1, 2, 3, 0, 2]
    """
    whole = int(weight)
    rest = round(len(rows) * (weight - whole))
    drawn = np.sort(rng.permutation(len(rows))[:rest]) if rest else np.arange(0)
    return np.concatenate([*[rows] * whole, rows[drawn]])
