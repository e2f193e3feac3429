"""COCO panoptic folders: images, panoptic PNGs and one JSON, read as a map-style data set."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from PIL import Image, UnidentifiedImageError
from torch.utils.data import Dataset

from collavo.panoptic.maps import (
    PanopticMap,
    PathLike,
    category_table,
    parse_segments,
    read_panoptic_colours,
)

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


@dataclass(frozen=True)
class _Record:
    """Where one sample lies, and which entries of the flat segment lists belong to it."""

    image: str
    png: str
    image_id: int
    start: int
    stop: int


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
    ) -> None:
        self.images = Path(images)
        self.panoptic = Path(panoptic)
        self.annotations = Path(annotations)
        self.keep_crowd = keep_crowd
        for argument, folder in (("images", self.images), ("panoptic", self.panoptic)):
            if not folder.is_dir():
                raise FileNotFoundError(f"{argument}: there is no folder {folder}")
        self._read(_load_json(self.annotations))
        self._check_files()

    def _read(self, content: Mapping[str, Any]) -> None:
        where = str(self.annotations)
        table = _categories(content, where)
        by_image = _annotations_by_image(content, where)
        # Flat arrays: a worker process shares their pages, which lists of mappings would unshare.
        ids: list[int] = []
        classes: list[int] = []
        self._records: list[_Record] = []
        for position, entry in enumerate(_list(content, "images", where)):
            number = _key(entry, "id", int, f"{where}: images[{position}]")
            name = _key(entry, "file_name", str, f"{where}: images[{position}]")
            annotation = by_image.get(number)
            if annotation is None:
                raise ValueError(f"{where}: image {number} ({name}) has no annotation")
            label = f"{where}: annotation of image {number}"
            png = _key(annotation, "file_name", str, label)
            infos = self._kept(_list(annotation, "segments_info", label))
            own_ids, own_classes = parse_segments(infos, table, label)
            stop = len(ids) + len(own_ids)
            self._records.append(_Record(name, png, number, len(ids), stop))
            ids += own_ids
            classes += own_classes
        self._check_unique()
        orphans = by_image.keys() - {record.image_id for record in self._records}
        if orphans:
            raise ValueError(f"{where}: image_id {min(orphans)} is annotated and not in 'images'")
        self._by_name = {record.image: i for i, record in enumerate(self._records)}
        self._segment_ids = np.asarray(ids, dtype=np.int32)
        self._segment_classes = np.asarray(classes, dtype=np.int32)

    def _kept(self, infos: list[Any]) -> list[Any]:
        if self.keep_crowd:
            return infos
        return [i for i in infos if not (isinstance(i, Mapping) and i.get("iscrowd"))]

    def _check_unique(self) -> None:
        seen: set[object] = set()
        for record in self._records:
            named = (record.image_id, f"image {record.image}", f"map {record.png}")
            for value in named:
                if value in seen:
                    kind = f"image id {value}" if isinstance(value, int) else value
                    raise ValueError(f"{self.annotations}: {kind} is listed twice")
                seen.add(value)

    def _check_files(self) -> None:
        for folder, names in (
            (self.images, [r.image for r in self._records]),
            (self.panoptic, [r.png for r in self._records]),
        ):
            with os.scandir(folder) as entries:  # one listing instead of a call per file
                present = {entry.name for entry in entries}
            for name in names:
                if name not in present and not (folder / name).is_file():
                    raise FileNotFoundError(
                        f"{folder / name}: listed in {self.annotations} and not there"
                    )

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
        chosen = slice(record.start, record.stop)
        return PanopticMap.from_segments(
            read_panoptic_colours(self.panoptic / record.png),
            self._segment_ids[chosen].tolist(),
            self._segment_classes[chosen].tolist(),
        )

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


def read_image(path: PathLike) -> Image.Image:
    """Read an image file as RGB.

    Args:
        path: Any format that Pillow reads.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: naming the file, if it is no image or is truncated.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: there is no such image")
    try:
        with Image.open(path) as picture:
            return picture.convert("RGB")
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
    if panoptic.size != (image.height, image.width):
        raise ValueError(
            f"{png}: the map is {panoptic.size[1]}x{panoptic.size[0]}, "
            f"its image {path} is {image.width}x{image.height}"
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
    content = _load_json(path)
    table = _categories(content, str(path))
    for entry in _list(content, "annotations", str(path)):
        if isinstance(entry, Mapping) and Path(str(entry.get("file_name"))).name == png.name:
            where = f"{path}: annotation of {png.name}"
            ids, classes = parse_segments(_list(entry, "segments_info", where), table, where)
            return PanopticMap.from_segments(read_panoptic_colours(png), ids, classes)
    raise ValueError(f"{path}: expected an annotation with file_name {png.name!r}, found none")


def _load_json(path: Path) -> Mapping[str, Any]:
    if not path.is_file():
        raise FileNotFoundError(f"annotations: there is no file {path}")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: not a JSON file ({error})") from error
    if not isinstance(content, Mapping):
        raise ValueError(f"{path}: expected a JSON object, got {type(content).__name__}")
    return content


def _categories(content: Mapping[str, Any], where: str) -> Mapping[int, int]:
    if "categories" not in content:
        return category_table(None)
    try:
        return category_table(_list(content, "categories", where))
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error


def _annotations_by_image(content: Mapping[str, Any], where: str) -> dict[int, Mapping[str, Any]]:
    found: dict[int, Mapping[str, Any]] = {}
    for position, entry in enumerate(_list(content, "annotations", where)):
        number = _key(entry, "image_id", int, f"{where}: annotations[{position}]")
        if number in found:
            raise ValueError(f"{where}: image_id {number} is annotated twice")
        found[number] = entry
    return found


def _list(content: Mapping[str, Any], key: str, where: str) -> list[Any]:
    value = content.get(key)
    if not isinstance(value, list):
        raise ValueError(f"{where}: expected a list {key!r}, got {type(value).__name__}")
    return value


def _key(entry: object, key: str, kind: type[_T], where: str) -> _T:
    value = entry.get(key) if isinstance(entry, Mapping) else None
    if not isinstance(value, kind):
        raise ValueError(f"{where}: expected {key!r} as {kind.__name__}, got {value!r}")
    return value
