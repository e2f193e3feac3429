"""What a COCO panoptic folder holds: where its parts lie, and what its JSON lists."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from collavo.panoptic.file_names import inner_name
from collavo.panoptic.json_files import flag, integer, key_of, list_of, read_object, shown
from collavo.panoptic.maps import PathLike, category_table, parse_segments


class CocoFolder(NamedTuple):
    """The three parts of a COCO panoptic folder.

    Attributes:
        images: Folder of the images.
        panoptic: Folder of the panoptic PNGs.
        annotations: The JSON.
    """

    images: Path
    panoptic: Path
    annotations: Path


def find_coco_folder(root: PathLike, split: str = "val2017") -> CocoFolder:
    """Find the parts of COCO's panoptic layout, as people unzip it.

    Args:
        root: Has ``annotations/panoptic_<split>.json``; the PNGs in
            ``annotations/panoptic_<split>/`` or ``panoptic_<split>/``; the images in ``<split>/``
            or ``images/<split>/``.
        split: ``"train2017"`` or ``"val2017"``.

    Raises:
        FileNotFoundError: naming the part that is missing and every place it was looked for.

    Source: COCO panoptic 2017's archives.
    """
    root = Path(root)
    name = f"panoptic_{split}"
    if not root.is_dir():
        raise FileNotFoundError(f"root: there is no folder {root}")
    return CocoFolder(
        images=_first("images", root / split, root / "images" / split),
        panoptic=_first("panoptic PNGs", root / "annotations" / name, root / name),
        annotations=_first("annotations", root / "annotations" / f"{name}.json"),
    )


def _first(part: str, *places: Path) -> Path:
    for place in places:
        if place.is_file() if place.suffix == ".json" else place.is_dir():
            return place
    looked = " or ".join(str(place) for place in places)
    raise FileNotFoundError(f"{part}: expected {looked}, found nothing there")


@dataclass(frozen=True)
class Skipped:
    """Something of a data set that is left out, and why.

    Args:
        name: The file, or the entry of the JSON.
        reason: What is wrong with it.
    """

    name: str
    reason: str


@dataclass(frozen=True)
class CocoRecord:
    """Where one sample lies, and which entries of the flat segment lists belong to it.

    Args:
        image: The image's file name, within the images' folder.
        png: The panoptic PNG's file name, within theirs.
        image_id: COCO's number of the image.
        start: First entry of the segment lists.
        stop: One past the last.
    """

    image: str
    png: str
    image_id: int
    start: int
    stop: int


@dataclass
class CocoIndex:
    """What a COCO panoptic JSON lists, checked, in the order of its images.

    Args:
        path: The JSON.
        records: One per image.
        segment_ids: int32, of all records one after the other.
        segment_classes: int32, class indices, in the same order.
        skipped: What was left out; see :meth:`read`.
    """

    path: Path
    records: list[CocoRecord] = field(default_factory=list)
    segment_ids: np.ndarray[Any, Any] = field(default_factory=lambda: np.zeros(0, np.int32))
    segment_classes: np.ndarray[Any, Any] = field(default_factory=lambda: np.zeros(0, np.int32))
    skipped: list[Skipped] = field(default_factory=list)

    @classmethod
    def read(
        cls,
        path: PathLike,
        *,
        keep_crowd: bool = True,
        skip_faults: bool = False,
        limit: int | None = None,
    ) -> CocoIndex:
        """Read and check the JSON.

        Args:
            path: With ``images``, ``annotations`` and, optionally, ``categories`` (classes are
                found by name; without the list COCO's own ids are meant).
            keep_crowd: Whether segments with ``iscrowd`` stay.
            skip_faults: Leave out what is wrong with single entries and list it in ``skipped``. An
                image whose segments are not all right is left out; of entries that contradict each
                other the first counts.
            limit: Only so many records from the JSON's beginning; what is wrong with images after
                them, or with annotations of other images, is then no fault. None takes all.

        Raises:
            FileNotFoundError: if there is no such file.
            ValueError: naming the JSON and what is malformed as a whole; and, unless faults are
                skipped, the entry, if a key is missing, an image has no annotation, an annotation
                has no image, a file or an id occurs twice, or a category is unknown.
        """
        index = cls(Path(path))
        _Reader(index, keep_crowd, skip_faults, limit).read(read_object(index.path))
        return index

    def segments(self, record: CocoRecord) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
        """Return the ids and the classes of a record's segments, int32 ``[S]`` each.

        Args:
            record: One of ``records``.
        """
        chosen = slice(record.start, record.stop)
        return self.segment_ids[chosen], self.segment_classes[chosen]


class _Reader:
    """Fills an index from a JSON's content."""

    def __init__(
        self, index: CocoIndex, keep_crowd: bool, skip_faults: bool, limit: int | None
    ) -> None:
        self.index = index
        self.where = str(index.path)
        self.keep_crowd = keep_crowd
        self.skip_faults = skip_faults
        self.limit = limit
        self.seen: set[str] = set()
        # The image, where it is known, of every faulty annotation.
        self.owners: list[int | None] = []
        self.ids: list[int] = []
        self.classes: list[int] = []

    def read(self, content: Mapping[str, Any]) -> None:
        table = categories_of(content, self.where)
        images = list_of(content, "images", self.where)
        by_image = self.annotations(list_of(content, "annotations", self.where))
        doubtful = len(self.index.skipped)
        for position, entry in enumerate(images):
            if self.limit is not None and len(self.index.records) >= self.limit:
                self.forget_faults(doubtful, images[:position])
                break
            try:
                self.add(entry, by_image, table, f"images[{position}]")
            except ValueError as error:
                name = entry.get("file_name") if isinstance(entry, Mapping) else None
                self.fault(name if isinstance(name, str) else f"images[{position}]", error)
        else:
            self.check_orphans(images, by_image)
        # Flat arrays: a worker process shares their pages, which lists of mappings would unshare.
        self.index.segment_ids = np.asarray(self.ids, dtype=np.int32)
        self.index.segment_classes = np.asarray(self.classes, dtype=np.int32)

    def fault(self, name: str, error: ValueError) -> None:
        if not self.skip_faults:
            raise error
        reason = str(error).removeprefix(f"{self.where}: ")
        self.index.skipped.append(Skipped(name, reason))

    def forget_faults(self, count: int, images: list[Any]) -> None:
        """Keep, of the annotations' faults, which come first, those of these images."""
        numbers = {integer(entry.get("id")) for entry in images if isinstance(entry, Mapping)}
        faults = zip(self.index.skipped[:count], self.owners, strict=True)
        kept = [fault for fault, owner in faults if owner is not None and owner in numbers]
        self.index.skipped[:count] = kept

    def annotations(self, entries: list[Any]) -> dict[int, Mapping[str, Any]]:
        found: dict[int, Mapping[str, Any]] = {}
        for position, entry in enumerate(entries):
            name = f"annotations[{position}]"
            number = None
            try:
                number = key_of(entry, "image_id", int, f"{self.where}: {name}")
                if number in found:
                    raise ValueError(f"{self.where}: image_id {number} is annotated twice")
            except ValueError as error:
                self.fault(name, error)
                self.owners.append(number)
            else:
                found[number] = entry
        return found

    def add(
        self,
        entry: object,
        by_image: Mapping[int, Mapping[str, Any]],
        table: Mapping[int, int | str],
        position: str,
    ) -> None:
        where = self.where
        number = key_of(entry, "id", int, f"{where}: {position}")
        name = key_of(entry, "file_name", str, f"{where}: {position}")
        name = inner_name(name, f"{where}: {position}: file_name")
        annotation = by_image.get(number)
        if annotation is None:
            raise ValueError(f"{where}: image {number} ({name}) has no annotation")
        label = f"{where}: annotation of image {number}"
        png = inner_name(key_of(annotation, "file_name", str, label), f"{label}: file_name")
        infos = self.kept(list_of(annotation, "segments_info", label), label)
        ids, classes = parse_segments(infos, table, label)
        named = (f"image id {number}", f"image {name}", f"map {png}")
        for text in named:
            if text in self.seen:
                raise ValueError(f"{where}: {text} is listed twice")
        self.seen.update(named)
        start = len(self.ids)
        self.index.records.append(CocoRecord(name, png, number, start, start + len(ids)))
        self.ids += ids
        self.classes += classes

    def kept(self, infos: list[Any], label: str) -> list[Any]:
        if self.keep_crowd:
            return infos
        places = enumerate(infos)
        return [one for i, one in places if not _is_crowd(one, f"{label}: segments_info[{i}]")]

    def check_orphans(self, images: list[Any], by_image: Mapping[int, Mapping[str, Any]]) -> None:
        listed = {integer(entry.get("id")) for entry in images if isinstance(entry, Mapping)}
        for number in sorted(by_image.keys() - listed):
            name = str(by_image[number].get("file_name"))
            text = f"{self.where}: image_id {number} is annotated and not in 'images'"
            self.fault(name, ValueError(text))


def _is_crowd(info: object, where: str) -> bool:
    value = info.get("iscrowd") if isinstance(info, Mapping) else None
    crowd = False if value is None else flag(value)
    if crowd is None:
        raise ValueError(f"{where}: expected 'iscrowd' as 0 or 1, got {shown(value)}")
    return crowd


def categories_of(content: Mapping[str, Any], where: str) -> Mapping[int, int | str]:
    """Return the class index, or an own class's name, of every category id of a JSON.

    Args:
        content: Of the JSON; without ``categories`` COCO's own ids are meant.
        where: What to call it in messages.

    Raises:
        ValueError: naming ``where`` and the entry.
    """
    if "categories" not in content:
        return category_table(None)
    try:
        return category_table(list_of(content, "categories", where))
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error
