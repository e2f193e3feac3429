"""The maps of a COCO panoptic data set for the pictures of another one."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TypeAlias

from collavo.panoptic.coco import CocoPanopticDataset, check_sizes
from collavo.panoptic.file_names import FileNames, absolute
from collavo.panoptic.images import read_image_size
from collavo.panoptic.maps import MapInput, PathLike, read_panoptic_size
from collavo.prepared.read import PreparedDataset

Samples: TypeAlias = CocoPanopticDataset | PreparedDataset


class PictureMaps:
    """Gives a picture of a data set the map that COCO panoptic samples have for it, or None.

    With a folder named, that folder is what the samples' JSON describes: a picture has the map of
    the name that leads from the folder to it, or of a longer one in which its path ends. Without
    one, a picture has the map of the longest listed name in which its path ends, if it is the only
    picture of the data set that does so, or the samples' own file.

    All that names and headers tell is checked at once, before anything is trained. That opens every
    picture that has a map, so of several processes one should do it.

    Args:
        samples: COCO panoptic samples, or what ``collavo prepare`` made of them.
        pictures: The paths of all pictures of the data set.
        folder: Such as ``images/coco/train2017``; None goes by the names alone.
        sizes: Whether pictures are opened, and have to be as large as their maps.

    Raises:
        ValueError: naming both, if two pictures end in the same listed name or a picture has
            another size than its map; or naming the folder, if no picture lies in it.
    """

    def __init__(
        self,
        samples: Samples,
        pictures: Iterable[PathLike],
        *,
        folder: PathLike | None = None,
        sizes: bool = True,
    ) -> None:
        self.samples = samples
        self.source = (
            samples.folder if isinstance(samples, PreparedDataset) else samples.annotations
        )
        names = [samples.file_name(index) for index in range(len(samples))]
        listed = FileNames(names, str(self.source))
        paths = list(dict.fromkeys(absolute(path) for path in pictures))
        self.num_pictures = len(paths)
        depths = dict.fromkeys(paths, 1) if folder is None else _depths(absolute(folder), paths)
        found: dict[int, list[Path]] = {}
        for path, depth in depths.items():
            index = listed.whole(path, least=depth)
            if index is not None:
                found.setdefault(index, []).append(path)
        self._index = {self._only(names[index], rivals): index for index, rivals in found.items()}
        if sizes:
            for path, index in self._index.items():
                self._check_size(path, index)

    def __call__(self, path: PathLike) -> MapInput | None:
        """Return a picture's map or crayon, or None where there is none for it.

        Args:
            path: One of the pictures.

        Raises:
            FileNotFoundError: naming the map that is not there.
            ValueError: naming the map that is unreadable.
        """
        index = self._index.get(absolute(path))
        if index is None:
            return None
        if isinstance(self.samples, PreparedDataset):
            return self.samples.crayon(index)
        return self.samples.panoptic_map(index)

    def summary(self) -> str:
        """Return in one line how many of the pictures found a map."""
        return f"{len(self._index)} of {self.num_pictures} pictures found a map in {self.source}"

    def fingerprint(self) -> str:
        """Return how many of how many pictures have a map."""
        return f"maps of {len(self._index)} of {self.num_pictures} pictures"

    def _check_size(self, path: Path, index: int) -> None:
        """Raise if a picture and its map differ in size, by their headers."""
        samples = self.samples
        try:
            image_size = read_image_size(path)
            if isinstance(samples, PreparedDataset):
                size, png = samples[index].size, f"{samples[index].path} (prepared)"
            else:
                png = str(samples.map_path(index))
                size = read_panoptic_size(png)
        except (OSError, ValueError):
            return  # what cannot be read is named when it is asked for
        check_sizes(size, png, image_size, path)

    def _only(self, name: str, rivals: list[Path]) -> Path:
        """Return the one picture that a listed name means."""
        images = self.samples.images
        if len(rivals) > 1 and images is not None:
            own = absolute(images / name)
            rivals = [p for p in rivals if p == own or _same_file(p, own)][:1] or rivals
        if len(rivals) > 1:
            raise ValueError(
                f"{self.source}: {name!r} is the ending of two pictures, {rivals[0]} and "
                f"{rivals[1]}; name the folder whose pictures it describes (folder=, on the "
                "command line --vl-coco-images)"
            )
        return rivals[0]


def _depths(folder: Path, paths: list[Path]) -> dict[Path, int]:
    """Return how many components lead from a folder to each path that lies in it."""
    inside = [path for path in paths if path.is_relative_to(folder)]
    if not inside and paths:
        raise ValueError(
            f"folder (--vl-coco-images): expected a folder of the pictures, which begin with "
            f"{paths[0]}, got {folder}"
        )
    return {path: len(path.parts) - len(folder.parts) for path in inside}


def _same_file(one: Path, other: Path) -> bool:
    return one.is_file() and other.is_file() and one.samefile(other)
