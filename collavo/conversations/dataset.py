"""Conversations about images, as visual instruction tuning has them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal

import numpy as np
from torch.utils.data import Dataset

from collavo.conversations.inspection import Inspector, Overlong
from collavo.conversations.llava import IMAGE_ORDERS, ImageOrder
from collavo.conversations.mixed import MixedRecords, open_source, report_skipped
from collavo.conversations.mixture import read_sources
from collavo.conversations.records import Record, check_record, record_images, record_name
from collavo.panoptic.coco_index import Skipped
from collavo.panoptic.file_names import inner_name
from collavo.panoptic.images import read_image
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
        records: The records as they were given, images as paths; read when asked for, where they
            come from a file.
        with_image: Which records have an image, bool ``[n]``.
        lengths: Tokens of each, images included, int32 ``[n]``; None if nothing measured them.
        num_cut: How many lose their last answers to ``max_length``.
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
        self.records: Sequence[Record] = [
            check_record(record, record_name(record, f"records[{i}]"))
            for i, record in enumerate(records)
        ]
        self.skipped: list[Skipped] = []
        self.with_image = np.array([bool(record_images(one)[0]) for one in self.records], np.bool_)
        self.lengths: np.ndarray[Any, Any] | None = None
        self.num_cut = 0
        self.images = None if images is None else Path(images)
        self.panoptic = panoptic

    @classmethod
    def from_llava_json(
        cls,
        path: PathLike | Sequence[PathLike | tuple[PathLike, float]],
        *,
        images: PathLike | None = None,
        panoptic: Callable[[Path], MapInput | None] | None = None,
        image_order: ImageOrder = "first",
        seed: int = 0,
        on_fault: Literal["skip", "raise"] = "skip",
        on_skip: Callable[[Skipped], None] | None = None,
        processor: Any = None,
        max_length: int | None = None,
        overlong: Overlong = "cut",
        workers: int | None = None,
        cache: PathLike | None = None,
        progress: bool = False,
    ) -> ConversationDataset:
        """Read LLaVA's format: a list of ``{"image", "conversations": [{"from", "value"}]}``.

        Every record is looked at once: its turns, whether its images are there and readable by
        their headers, and, with a processor, whether an answer is left within ``max_length``. What
        was read and found is kept beside the file (or in the user's cache, where that folder takes
        none) by content and settings, so a second time takes no time. Records stay there, mapped
        into memory: processes share them. A faulty record does not end the others: it is left out
        and listed in ``skipped`` and in ``skipped.jsonl``. An image that is removed afterwards is a
        fault when it is read; one that was missing is looked for again each time.

        Args:
            path: A file in JSON or JSON lines, LLaVA-NeXT's YAML of a mixture, or several, alone or
                with a weight each; see ``collavo.conversations.mixture.read_sources``. With weight
                2.5 every record of a file counts twice, and half of them, drawn by the seed once
                for all epochs, once more.
            images: Folder that image paths start from, and do not leave; None takes paths as they
                are.
            panoptic: As the class itself.
            image_order: ``"first"`` puts images before the words of their turn, as LLaVA's code
                does; ``"keep"`` leaves them where ``<image>`` stands; ``"random"``, as LLaVA's
                paper, draws it for the first question.
            seed: What is drawn follows from it and the record's number alone.
            on_fault: ``"raise"`` raises the first fault instead.
            on_skip: Called with every record that is left out, in place of the warning.
            processor: Measures conversations, so that there are ``lengths``.
            max_length: Longest conversation in tokens, images included; needs a processor.
            overlong: What becomes of longer ones: ``"cut"`` after their last whole answer that
                fits, ``"skip"`` leaves them out as faulty, ``"raise"`` raises.
            workers: Processes that look at records; 0 is this one, None up to eight.
            cache: Folder for what is kept; None as said above.
            progress: Whether to show a bar.

        Raises:
            FileNotFoundError: if there is no such file, or no folder ``images``.
            OSError: naming the folders, if nothing can be kept anywhere.
            ValueError: naming the file, if it is no list in JSON; or naming the first record too,
                if all of them are faulty or ``on_fault`` says so.

        Source: LLaVA's data format; :func:`collavo.conversations.llava.read_llava` has the rules.
        """
        for name, value, choices in (
            ("image_order", image_order, IMAGE_ORDERS),
            ("on_fault", on_fault, ("skip", "raise")),
            ("overlong", overlong, ("cut", "skip", "raise")),
        ):
            if value not in choices:
                raise ValueError(f"{name}: expected one of {', '.join(choices)}, got {value!r}")
        if max_length is not None and processor is None:
            raise ValueError("max_length: expected with a processor, which counts tokens, got none")
        if images is not None and not Path(images).is_dir():
            raise FileNotFoundError(f"images: there is no folder {images}")
        folder = None if images is None else Path(images)
        inspector = Inspector(folder, image_order, seed, processor, max_length, overlong)
        opened = [
            open_source(one, inspector, folder=cache, workers=workers, progress=progress)
            for one in read_sources(path)
        ]
        data = cls([], images=images, panoptic=panoptic)
        records = MixedRecords(opened, inspector, seed)
        data._take(records, measured=processor is not None)
        report_skipped(opened, records, strict=on_fault == "raise", to=on_skip)
        return data

    def _take(self, records: MixedRecords, *, measured: bool) -> None:
        self.records = records
        self.skipped = records.skipped
        self.with_image = records.with_image
        self.lengths = records.lengths if measured else None
        self.num_cut = int(records.cut.sum())

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

    def fingerprint(self) -> str | None:
        """Return what differs where other records come in another order; None where unknown.

        It is known of ``from_llava_json``, which reads the files through; pictures are not read.
        """
        own = self.records
        return own.fingerprint() if isinstance(own, MixedRecords) else None

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
