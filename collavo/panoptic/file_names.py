"""File names as JSON files list them: within their folder, and found by paths that end alike."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path, PurePath, PureWindowsPath

Parts = tuple[str, ...]


def parts_of(name: str) -> Parts:
    r"""Split a file name at slashes and backslashes; doubled ones and ``.`` say nothing.

    Args:
        name: As a JSON has it.

    Example:
        >>> parts_of(".\\val//001.png")
        ('val', '001.png')
    """
    return tuple(part for part in name.replace("\\", "/").split("/") if part not in ("", "."))


def inner_name(name: str, where: str) -> str:
    """Return a listed file name in slashes, if it names a file within the folder it starts from.

    Links that lie in the folder are followed: who put them there decides where they lead.

    Args:
        name: As a JSON has it.
        where: What to call its entry in messages.

    Raises:
        ValueError: naming ``where``, if the name is empty, absolute or has ``..``.

    Example:
        >>> inner_name("val/001.png", "images[0]")
        'val/001.png'
    """
    parts = parts_of(name)
    windows = PureWindowsPath(name)
    if not parts or ".." in parts or "\0" in name or windows.drive or windows.root:
        raise ValueError(
            f"{where}: expected the name of a file within its folder, relative and without '..', "
            f"got {name!r}"
        )
    return "/".join(parts)


class FileNames:
    """The file names of a JSON, by what paths end in.

    Args:
        names: The names, in order.
        where: What to call the list in messages, such as its file.

    Example:
        >>> names = FileNames(["train/001.png", "val/001.png"], "all.json")
        >>> names.best(Path("/data/val/001.png")), names.whole(Path("/data/001.png"))
        (1, None)
    """

    def __init__(self, names: Iterable[str], where: str) -> None:
        self.where = where
        self._by_base: dict[str, list[tuple[int, Parts]]] = {}
        for position, name in enumerate(names):
            if parts := parts_of(name):
                self._by_base.setdefault(parts[-1], []).append((position, parts))

    def best(self, path: PurePath) -> int | None:
        """Return the position of the name that ends as most of a path does, or None.

        Args:
            path: Its last component at least must be a name's; of names that share as many, one
                that has no others goes before.

        Raises:
            ValueError: naming both, if two names fit alike.
        """
        wanted = path.parts
        ranked: list[tuple[tuple[int, bool], int, Parts]] = []
        for position, parts in self._by_base.get(path.name, []):
            shared = _shared(parts, wanted)
            ranked.append(((shared, shared == len(parts)), position, parts))
        if not ranked:
            return None
        most = max(rank for rank, _, _ in ranked)
        first, *others = [entry for entry in ranked if entry[0] == most]
        if others:
            names = ["/".join(parts) for _, _, parts in (first, others[0])]
            raise ValueError(
                f"{self.where}: {path} ends as much like {names[0]!r} (entry {first[1]}) as like "
                f"{names[1]!r} (entry {others[0][1]}); give a path that ends as one of them alone"
            )
        return first[1]

    def whole(self, path: PurePath, least: int = 1) -> int | None:
        """Return the position of the longest name that a path ends in as a whole, or None.

        Args:
            path: The path.
            least: How many components the name must have.
        """
        wanted = path.parts
        fitting = [
            (len(parts), position)
            for position, parts in self._by_base.get(path.name, [])
            if len(parts) >= least and _shared(parts, wanted) == len(parts)
        ]
        return max(fitting)[1] if fitting else None


def absolute(path: str | PurePath) -> Path:
    """Return a path from the root on, without ``..``; links stay as they are.

    Args:
        path: Any.
    """
    return Path(os.path.abspath(path))


def _shared(parts: Parts, wanted: Parts) -> int:
    """Count the components in which both end."""
    count = 0
    for one, other in zip(reversed(parts), reversed(wanted), strict=False):
        if one != other:
            break
        count += 1
    return count
