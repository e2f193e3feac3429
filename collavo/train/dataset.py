"""Data sets of records: crayon instructions made from COCO panoptic, and conversations."""

from __future__ import annotations

import random
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import Dataset

from collavo._arguments import expect_like
from collavo.panoptic.coco import CocoPanopticDataset, PanopticSample
from collavo.panoptic.coco_index import Skipped
from collavo.panoptic.file_names import inner_name
from collavo.panoptic.images import read_image
from collavo.panoptic.instructions import (
    TEMPLATES,
    build_instructions,
    check_templates,
    draw_instruction,
)
from collavo.panoptic.json_files import read_json
from collavo.panoptic.maps import MapInput, PathLike
from collavo.panoptic.text import detections_from_map
from collavo.prepared.read import PreparedDataset, PreparedSample
from collavo.train.records import (
    Record,
    check_record,
    entry_name,
    from_llava,
    record_images,
    record_name,
)


class CrayonInstructionDataset(Dataset[Record]):
    """Crayon instructions: a question about an image's objects, answered from its panoptic map.

    Which template, and which class it asks for, is a pure function of (seed, epoch, index): it
    does not depend on the order of access, on workers or on ranks. Images without any listed
    segment have nothing to ask about and are left out.

    Args:
        samples: COCO panoptic samples, or what ``collavo prepare`` made of them, which needs no
            PNG. The same records come from both, but for images whose listed segments cover no
            pixel: preparing has seen that and they are left out, which moves the records after
            them; of COCO's own samples, asking for such a record raises.
        templates: The templates to draw from, each with the same probability.
        seed: Of the draws.
        max_number: Largest instance number, as the model's crayon has it.
        object_text: Whether the prompt names the objects; their names are the answer, so not by
            default.

    Raises:
        ValueError: if a template is unknown, no image has a segment, or samples were prepared
            without one of the templates or with another largest number.

    Source: paper section 3 (crayon prompt tuning) and figure 5.
    """

    def __init__(
        self,
        samples: CocoPanopticDataset | PreparedDataset,
        *,
        templates: Sequence[str] = tuple(TEMPLATES),
        seed: int = 0,
        max_number: int = 20,
        object_text: bool = False,
    ) -> None:
        check_templates(templates)
        expect_like(
            "samples",
            samples,
            "a CocoPanopticDataset or PreparedDataset",
            has=("__getitem__", "__len__"),
        )
        if isinstance(samples, PreparedDataset):
            _check_prepared(samples, templates, max_number)
        self.samples = samples
        self.templates = tuple(templates)
        self.seed = seed
        self.max_number = max_number
        self.object_text = object_text
        self._indices = [i for i in range(len(samples)) if samples.num_segments(i)]
        if not self._indices:
            where = samples.folder if isinstance(samples, PreparedDataset) else samples.annotations
            raise ValueError(f"samples: no image of {where} has a segment")
        # In shared memory, so that workers which live over epochs see it change.
        self._epoch = torch.zeros((), dtype=torch.int64)
        self._epoch.share_memory_()  # type: ignore[no-untyped-call]

    def set_epoch(self, epoch: int) -> None:
        """Draw other templates from now on, in running workers too.

        Args:
            epoch: The number of the epoch.
        """
        self._epoch.fill_(epoch)

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._epoch.share_memory_()  # type: ignore[no-untyped-call]

    def __len__(self) -> int:
        return len(self._indices)

    def __getitem__(self, index: int) -> Record:
        """Make one record.

        Args:
            index: 0..len-1, or counted from the end.

        Raises:
            IndexError: if there is no such record.
            ValueError: naming the file, if a picture is unreadable or no listed segment covers a
                pixel of the map.
        """
        position = range(len(self))[index]
        sample = self.samples[self._indices[position]]
        rng = random.Random(f"{self.seed}/{int(self._epoch)}/{position}")
        return self._record(sample, rng)

    def file_name(self, index: int) -> str:
        """Return the file name of a record's image, so that ``SampleStream`` can report it.

        Args:
            index: 0..len-1, or counted from the end.
        """
        return self.samples.file_name(self._indices[index])

    def _record(self, sample: PanopticSample | PreparedSample, rng: random.Random) -> Record:
        panoptic: MapInput
        if isinstance(sample, PreparedSample):
            image, panoptic, instructions = sample.image(), sample.crayon, sample.instructions
        else:
            image, panoptic = sample.image, sample.panoptic
            detections = detections_from_map(panoptic, max_number=self.max_number)
            instructions = tuple(build_instructions(detections, self.templates))
        if not instructions:
            raise ValueError(
                f"{sample.path}: none of its listed segments covers a pixel of its map"
            )
        return {
            "image": image,
            "panoptic": panoptic,
            "conversation": draw_instruction(instructions, self.templates, rng).conversation(),
            "object_text": self.object_text,
            "name": str(sample.path),
        }


def _check_prepared(samples: PreparedDataset, templates: Sequence[str], max_number: int) -> None:
    missing = [name for name in templates if name not in samples.settings.templates]
    if missing:
        raise ValueError(
            f"templates: expected some of {', '.join(samples.settings.templates)}, with which "
            f"{samples.folder} was prepared, got {list(templates)}"
        )
    if max_number != samples.settings.max_number:
        raise ValueError(
            f"max_number: expected {samples.settings.max_number}, with which {samples.folder} was "
            f"prepared, got {max_number}"
        )


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
