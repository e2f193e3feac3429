"""Conversations about images, as visual instruction tuning has them."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from torch.utils.data import Dataset

from collavo.conversations.records import (
    Record,
    check_record,
    entry_name,
    from_llava,
    record_images,
    record_name,
)
from collavo.panoptic.coco_index import Skipped
from collavo.panoptic.file_names import inner_name
from collavo.panoptic.images import read_image
from collavo.panoptic.json_files import read_json
from collavo.panoptic.maps import MapInput, PathLike


class ConversationDataset(Dataset[Record]):
    """Conversations about images, or about nothing to see, as visual instruction tuning has them.

    Args:
        records: Mappings with ``conversation`` and, optionally, ``image`` and ``panoptic``.
            Images given as paths are read when a record is asked for.
        images: Folder that image paths start from, and do not leave; None takes paths as they are.
        panoptic: Gives the map or the crayon of an image's path, or None, for records without one
            of their own; ``PictureMaps``, a panoptic model or a store of its results.

    Attributes:
        skipped: What ``from_llava_json`` left out, and why.

    Raises:
        ValueError: naming the record and the key, if one is malformed.

    Example:
        >>> turns = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
        >>> ConversationDataset([{"conversation": turns}])[0]["conversation"][1]["content"]
        'Hello'
    """

    def __init__(
        self,
        records: Sequence[Mapping[str, Any]],
        *,
        images: PathLike | None = None,
        panoptic: Callable[[Path], MapInput | None] | None = None,
    ) -> None:
        self.records = [
            check_record(record, record_name(record, f"records[{i}]"))
            for i, record in enumerate(records)
        ]
        self.skipped: list[Skipped] = []
        self.images = None if images is None else Path(images)
        self.panoptic = panoptic

    @classmethod
    def from_llava_json(
        cls,
        path: PathLike,
        *,
        images: PathLike | None = None,
        panoptic: Callable[[Path], MapInput | None] | None = None,
        on_skip: Callable[[Skipped], None] | None = None,
    ) -> ConversationDataset:
        """Read LLaVA's format: a list of ``{"image", "conversations": [{"from", "value"}]}``.

        A malformed record does not end the others: it is left out and listed in ``skipped``, and a
        warning says how many there are.

        Args:
            path: The JSON.
            images: As the class itself.
            panoptic: As the class itself.
            on_skip: Called with every record that is left out, in place of the warning.

        Raises:
            FileNotFoundError: if there is no such file.
            ValueError: naming the file, if it is no list in JSON; or naming the first record too,
                if all of them are malformed.

        Source: LLaVA's data format; an ``<image>`` that is an image's place is taken out, since the
            chat template puts images first.
        """
        path = Path(path)
        content = read_json(path)
        if not isinstance(content, list):
            raise ValueError(f"{path}: expected a list of records, got {type(content).__name__}")
        records, skipped = [], []
        for position, entry in enumerate(content):
            name = entry_name(entry, f"{path}: [{position}]")
            try:
                records.append(check_record(from_llava(entry, name), name))
            except ValueError as error:
                skipped.append(Skipped(name, str(error).removeprefix(f"{name}: ")))
        if skipped and not records:
            raise ValueError(f"{skipped[0].name}: {skipped[0].reason}")
        if on_skip is not None:
            for one in skipped:
                on_skip(one)
        elif skipped:
            warnings.warn(
                f"{path}: {len(skipped)} of {len(content)} records are left out and listed in "
                f"'skipped'; the first: {skipped[0].name}: {skipped[0].reason}",
                stacklevel=2,
            )
        data = cls([], images=images, panoptic=panoptic)
        data.records, data.skipped = records, skipped  # checked already
        return data

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> Record:
        """Return one record with its images read.

        Args:
            index: 0..len-1, or counted from the end.

        Raises:
            IndexError: if there is no such record.
            FileNotFoundError: naming the record, and the image that is not there.
            ValueError: naming the record, and the image that is unreadable or lies outside of the
                folder.
        """
        try:
            return self._opened(index)
        except (ValueError, OSError) as error:
            kind = FileNotFoundError if isinstance(error, FileNotFoundError) else ValueError
            raise kind(f"{self.file_name(index)}: {error}") from error

    def file_name(self, index: int) -> str:
        """Return what to call a record in reports: its file, its number there and its id.

        Args:
            index: 0..len-1, or counted from the end.
        """
        return str(self.records[index]["name"])

    def _opened(self, index: int) -> Record:
        record = dict(self.records[index])
        images, maps = record_images(record)
        opened = []
        for position, image in enumerate(images):
            source = image
            if isinstance(image, str | Path):
                source = self._path(image)
                if maps[position] is None and self.panoptic is not None:
                    maps[position] = self.panoptic(source)
            opened.append(read_image(source))
        return {**record, "image": opened, "panoptic": maps}

    def pictures(self) -> list[Path]:
        """Return the paths of the records' images, those of faulty names left out."""
        paths = []
        for record in self.records:
            for image in record_images(record)[0]:
                if isinstance(image, str | Path):
                    with suppress(ValueError):  # raised where the record is asked for
                        paths.append(self._path(image))
        return paths

    def _path(self, image: str | Path) -> Path:
        if self.images is None:
            return Path(image)
        return self.images / inner_name(str(image), "image")
