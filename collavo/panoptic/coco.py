"""COCO panoptic folders: images, panoptic PNGs and one JSON, read as a map-style data set."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from PIL import Image, UnidentifiedImageError
from torch.utils.data import Dataset

from collavo.panoptic.coco_index import (
    CocoIndex,
    CocoRecord,
    Skipped,
    categories_of,
    find_coco_folder,
    list_of,
    load_json,
)
from collavo.panoptic.maps import PanopticMap, PathLike, parse_segments, read_panoptic_colours

_T = TypeVar("_T")
_UNREADABLE = (
    UnidentifiedImageError,
    Image.DecompressionBombError,
    OSError,
    SyntaxError,
    ValueError,
)


@dataclass(frozen=True, eq=False)
class PanopticSample:
    """One image with its panoptic map.

    Args:
        image: RGB.
        panoptic: Of the same height and width.
        image_id: COCO's number of the image.
        path: The image's file.
    """

    image: Image.Image
    panoptic: PanopticMap
    image_id: int
    path: Path


class CocoPanopticDataset(Dataset[PanopticSample]):
    """Images and panoptic maps of a COCO panoptic folder, in the order of the JSON's images.

    The JSON is read and checked once; pictures are read when a sample is asked for. Nothing is
    kept open, so the data set can be pickled and used by any number of workers.

    Args:
        images: Folder of the images.
        panoptic: Folder of the panoptic PNGs.
        annotations: The JSON with ``images``, ``annotations`` and, optionally, ``categories``
            (classes are found by name; without the list COCO's own ids are meant).
        keep_crowd: Whether segments with ``iscrowd`` stay; otherwise their pixels are unknown.
        skip_faults: Leave out images whose entry is faulty or whose files are missing, and list
            them in ``skipped``, instead of raising. Unreadable pictures are found when they are
            read; see ``SampleStream``.

    Raises:
        FileNotFoundError: naming the first missing folder or file.
        ValueError: naming the JSON and the entry, if a key is missing, an image has no annotation,
            an annotation has no image, a file or an id occurs twice, or a category is unknown.

    Source: COCO panoptic's folder and file format.
    """

    def __init__(
        self,
        images: PathLike,
        panoptic: PathLike,
        annotations: PathLike,
        *,
        keep_crowd: bool = True,
        skip_faults: bool = False,
    ) -> None:
        self.images = Path(images)
        self.panoptic = Path(panoptic)
        self.annotations = Path(annotations)
        self.keep_crowd = keep_crowd
        self.skip_faults = skip_faults
        check_folders(self.images, self.panoptic)
        self._index = CocoIndex.read(annotations, keep_crowd=keep_crowd, skip_faults=skip_faults)
        self._records = self._index.records
        self._check_files(self.images, [r.image for r in self._records])
        self._check_files(self.panoptic, [r.png for r in self._records])
        self._by_name = {record.image: i for i, record in enumerate(self._records)}

    @classmethod
    def from_folder(
        cls,
        root: PathLike,
        split: str = "val2017",
        *,
        keep_crowd: bool = True,
        skip_faults: bool = False,
    ) -> CocoPanopticDataset:
        """Open COCO's own folder layout.

        Args:
            root: Has ``annotations/panoptic_<split>.json``; the PNGs in
                ``annotations/panoptic_<split>/`` or ``panoptic_<split>/``; the images in
                ``<split>/`` or ``images/<split>/``.
            split: ``"train2017"`` or ``"val2017"``.
            keep_crowd: As the class itself.
            skip_faults: As the class itself.

        Raises:
            FileNotFoundError: naming the part that is missing and every place it was looked for.
            ValueError: as the class itself.
        """
        found = find_coco_folder(root, split)
        return cls(*found, keep_crowd=keep_crowd, skip_faults=skip_faults)

    @property
    def skipped(self) -> list[Skipped]:
        """What ``skip_faults`` left out, and why."""
        return self._index.skipped

    def _check_files(self, folder: Path, names: list[str]) -> None:
        with os.scandir(folder) as entries:  # one listing instead of a call per file
            present = {entry.name for entry in entries}
        missing = {n for n in names if n not in present and not (folder / n).is_file()}
        if not missing:
            return
        if not self.skip_faults:
            name = next(name for name in names if name in missing)
            raise FileNotFoundError(f"{folder / name}: listed in {self.annotations} and not there")
        kept: list[CocoRecord] = []
        for record, name in zip(self._records, names, strict=True):
            if name in missing:
                reason = f"listed in {self.annotations.name} and not there"
                self._index.skipped.append(Skipped(f"{folder.name}/{name}", reason))
            else:
                kept.append(record)
        self._index.records = self._records = kept

    def __len__(self) -> int:
        return len(self._records)

    def __iter__(self) -> Iterator[PanopticSample]:
        return (self[index] for index in range(len(self)))

    def __getitem__(self, index: int) -> PanopticSample:
        """Read one sample.

        Args:
            index: 0..len-1, or counted from the end.

        Raises:
            IndexError: if there is no such sample.
            ValueError: naming the file, if a picture is unreadable or the sizes differ.
        """
        record = self._records[index]
        path = self.images / record.image
        image = read_image(path)
        panoptic = self.panoptic_map(index)
        check_same_size(panoptic, self.panoptic / record.png, image, path)
        return PanopticSample(image, panoptic, record.image_id, path)

    def panoptic_map(self, index: int) -> PanopticMap:
        """Read one sample's map without its image.

        Args:
            index: 0..len-1, or counted from the end.

        Raises:
            IndexError: if there is no such sample.
            ValueError: naming the file, if the PNG is unreadable.
        """
        record = self._records[index]
        ids, classes = self._index.segments(record)
        colours = read_panoptic_colours(self.panoptic / record.png)
        return PanopticMap.from_segments(colours, ids.tolist(), classes.tolist())

    def file_name(self, index: int) -> str:
        """Return the file name of a sample's image, as the JSON has it.

        Args:
            index: 0..len-1, or counted from the end.
        """
        return self._records[index].image

    def index_of(self, file_name: str) -> int | None:
        """Return the index of the sample whose image has this file name, or None.

        Args:
            file_name: As the JSON has it, e.g. ``"000000000139.jpg"``.
        """
        return self._by_name.get(file_name)

    def num_segments(self, index: int) -> int:
        """Return how many segments are listed for a sample, without reading any picture.

        Args:
            index: 0..len-1, or counted from the end.
        """
        record = self._records[index]
        return record.stop - record.start


def check_folders(images: Path, panoptic: Path) -> None:
    """Raise unless both folders are there.

    Args:
        images: Folder of the images.
        panoptic: Folder of the panoptic PNGs.

    Raises:
        FileNotFoundError: naming the first missing one.
    """
    for argument, folder in (("images", images), ("panoptic", panoptic)):
        if not folder.is_dir():
            raise FileNotFoundError(f"{argument}: there is no folder {folder}")


def read_image(path: PathLike) -> Image.Image:
    """Read an image file as RGB.

    Args:
        path: Any format that Pillow reads.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: naming the file, if it is no image or is truncated.
    """
    return _read(Path(path), lambda picture: picture.convert("RGB"))


def read_image_size(path: PathLike) -> tuple[int, int]:
    """Read an image's height and width from its header; its pixels are not decoded.

    Args:
        path: Any format that Pillow reads.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: naming the file, if it is no image.
    """
    return _read(Path(path), lambda picture: (picture.height, picture.width))


def _read(path: Path, take: Callable[[Image.Image], _T]) -> _T:
    if not path.is_file():
        raise FileNotFoundError(f"{path}: there is no such image")
    try:
        with Image.open(path) as picture:
            return take(picture)
    except _UNREADABLE as error:
        raise ValueError(f"{path}: the image is unreadable or truncated ({error})") from error


def check_same_size(
    panoptic: PanopticMap, png: PathLike, image: Image.Image, path: PathLike
) -> None:
    """Raise unless a map has as many pixels as its image.

    Args:
        panoptic: The map.
        png: Its file.
        image: The image.
        path: Its file.

    Raises:
        ValueError: naming both files, if the sizes differ.
    """
    check_sizes(panoptic.size, png, (image.height, image.width), path)


def check_sizes(
    size: tuple[int, int], png: PathLike, image_size: tuple[int, int], path: PathLike
) -> None:
    """Raise unless a map and its image have the same height and width.

    Args:
        size: Height and width of the map.
        png: Its file.
        image_size: Height and width of the image.
        path: Its file.

    Raises:
        ValueError: naming both files, if the sizes differ.
    """
    if size != image_size:
        raise ValueError(
            f"{png}: the map is {size[1]}x{size[0]}, "
            f"its image {path} is {image_size[1]}x{image_size[0]}"
        )


def find_panoptic_map(png: PathLike, annotations: PathLike) -> PanopticMap:
    """Read one panoptic PNG with the entry of a COCO panoptic JSON that names its file.

    Args:
        png: The PNG.
        annotations: The JSON.

    Raises:
        FileNotFoundError: if either is not there.
        ValueError: naming the file and the key, if the JSON does not list the PNG, its entry is
            malformed, or the PNG is unreadable.
    """
    png, path = Path(png), Path(annotations)
    content = load_json(path)
    table = categories_of(content, str(path))
    for entry in list_of(content, "annotations", str(path)):
        if isinstance(entry, Mapping) and Path(str(entry.get("file_name"))).name == png.name:
            where = f"{path}: annotation of {png.name}"
            ids, classes = parse_segments(list_of(entry, "segments_info", where), table, where)
            return PanopticMap.from_segments(read_panoptic_colours(png), ids, classes)
    raise ValueError(f"{path}: expected an annotation with file_name {png.name!r}, found none")
