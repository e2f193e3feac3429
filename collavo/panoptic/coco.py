"""COCO panoptic folders: images, panoptic PNGs and one JSON, read as a map-style data set."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image
from torch.utils.data import Dataset

from collavo._arguments import expect_path
from collavo.panoptic.coco_index import (
    CocoIndex,
    CocoRecord,
    Skipped,
    categories_of,
    find_coco_folder,
)
from collavo.panoptic.file_names import FileNames, absolute, inner_name
from collavo.panoptic.images import describe_orientation
from collavo.panoptic.images import read_image as read_image
from collavo.panoptic.images import read_image_size as read_image_size
from collavo.panoptic.json_files import list_of, read_object
from collavo.panoptic.maps import PanopticMap, PathLike, parse_segments, read_panoptic_colours


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
        expect_path("images", images, "a folder of images")
        expect_path("panoptic", panoptic, "a folder of panoptic PNGs")
        expect_path("annotations", annotations, "a COCO panoptic JSON")
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
        self._names = FileNames([r.image for r in self._records], str(self.annotations))

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
        size = image.height, image.width
        check_sizes(panoptic.size, self.panoptic / record.png, size, path)
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

    def map_path(self, index: int) -> Path:
        """Return the path of a sample's panoptic PNG.

        Args:
            index: 0..len-1, or counted from the end.
        """
        return self.panoptic / self._records[index].png

    def file_name(self, index: int) -> str:
        """Return the file name of a sample's image, as the JSON has it, in slashes.

        Args:
            index: 0..len-1, or counted from the end.
        """
        return self._records[index].image

    def index_of(self, file_name: PathLike) -> int | None:
        """Return the index of the sample whose image a name or path means, or None.

        Args:
            file_name: As the JSON has it, e.g. ``"000000000139.jpg"``, or a path; the image whose
                name shares the most last components with it is meant.

        Raises:
            ValueError: naming both, if two images fit alike.
        """
        return self._names.best(Path(file_name))

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


def check_sizes(
    size: tuple[int, int], png: PathLike, image_size: tuple[int, int], path: PathLike
) -> None:
    """Raise unless a map and its image have the same height and width.

    A map belongs to the image as it is shown: where EXIF turns a photo, the map is upright too.

    Args:
        size: Height and width of the map.
        png: Its file.
        image_size: Height and width of the image as it is shown.
        path: Its file.

    Raises:
        ValueError: naming both files, if the sizes differ.
    """
    if size != image_size:
        turned = describe_orientation(path)
        way = "; a map is that of the image as shown: turn it alike" if turned else ""
        raise ValueError(
            f"{png}: the map is {size[1]}x{size[0]}, "
            f"its image {path} is {image_size[1]}x{image_size[0]}{turned}{way}"
        )


def find_panoptic_map(
    png: PathLike, annotations: PathLike, *, image: PathLike | None = None
) -> PanopticMap:
    """Read one panoptic PNG with the entry of a COCO panoptic JSON that is its own.

    The entry is the one whose ``file_name`` shares the most last components with the PNG's path, so
    that ``val/0001.png`` never gets what stands about ``train/0001.png``.

    Args:
        png: The PNG.
        annotations: The JSON.
        image: The image that the map is wanted for, by its path; None checks none.

    Raises:
        FileNotFoundError: if one of them is not there.
        ValueError: naming the file and the key, if the JSON does not list the PNG, two entries fit
            it alike, the entry is another file's or malformed, or the PNG is unreadable; naming
            both, if the image has another size or the JSON says that the map is another image's.
    """
    png, path = Path(png), Path(annotations)
    content = read_object(path)
    table = categories_of(content, str(path))
    entry = _entry_of(png, list_of(content, "annotations", str(path)), path)
    where = f"{path}: annotation of {png.name}"
    ids, classes = parse_segments(list_of(entry, "segments_info", where), table, where)
    panoptic = PanopticMap.from_segments(read_panoptic_colours(png), ids, classes)
    if image is not None:
        check_sizes(panoptic.size, png, read_image_size(image), image)
        _check_image(Path(image), png, entry, content, str(path))
    return panoptic


def _entry_of(png: Path, entries: list[Any], path: Path) -> Mapping[str, Any]:
    place = absolute(png)
    names = _listed_names(entries)
    listed = FileNames(names, str(path))
    found = listed.best(place)
    if found is None:
        raise ValueError(f"{path}: expected an annotation with file_name {png.name!r}, found none")
    # A name that differs further up is that of a moved file, or of another one that is there too.
    if listed.whole(place) != found:
        inner = inner_name(names[found], f"{path}: annotations[{found}]: file_name")
        other = next((p for f in place.parents if (p := f / inner).is_file()), None)
        if other is not None and not (place.is_file() and other.samefile(place)):
            raise ValueError(
                f"{path}: expected an annotation of {png}, found only {names[found]!r}, which is "
                f"{other}"
            )
    entry: Mapping[str, Any] = entries[found]
    return entry


def _check_image(
    image: Path, png: Path, entry: Mapping[str, Any], content: Mapping[str, Any], where: str
) -> None:
    """Raise if the JSON says that the image is another one than the map's."""
    images = content.get("images")
    if not isinstance(images, list):
        return
    try:
        found = FileNames(_listed_names(images), where).best(absolute(image))
    except ValueError:
        return  # several have that name; any may be meant
    number = images[found].get("id") if found is not None else None
    if found is not None and number != entry.get("image_id"):
        raise ValueError(
            f"{where}: {image} is its image {number}, and the map {png} is of image "
            f"{entry.get('image_id')}; give the map of the image"
        )


def _listed_names(entries: list[Any]) -> list[str]:
    names = (entry.get("file_name") if isinstance(entry, Mapping) else None for entry in entries)
    return [name if isinstance(name, str) else "" for name in names]
