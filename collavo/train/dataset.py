"""Training records: crayon instructions made from COCO panoptic, and conversations about images.

A record is a mapping: ``image`` (an RGB image, a path, a list of them, or None), ``panoptic`` (a
``PanopticMap``, a ``CrayonMap`` or None for each image), ``conversation`` (messages with ``role``
and ``content``) and, optionally, ``object_text`` (whether the prompt names the image's objects).
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch.utils.data import Dataset

from collavo.panoptic.coco import CocoPanopticDataset, PanopticSample, read_image
from collavo.panoptic.instructions import (
    TEMPLATES,
    build_instructions,
    check_templates,
    draw_instruction,
)
from collavo.panoptic.maps import MapInput, PathLike
from collavo.panoptic.text import detections_from_map
from collavo.prepared.read import PreparedDataset, PreparedSample

Record: TypeAlias = dict[str, Any]

_ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant"}


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
        images: Folder that relative image paths start from.
        panoptic: Gives the map or the crayon of an image's path, or None, for records without one
            of their own; a panoptic model or a store of its results.

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
        self.records = [check_record(record, f"records[{i}]") for i, record in enumerate(records)]
        self.images = None if images is None else Path(images)
        self.panoptic = panoptic

    @classmethod
    def from_llava_json(
        cls,
        path: PathLike,
        *,
        images: PathLike | None = None,
        panoptic: Callable[[Path], MapInput | None] | None = None,
    ) -> ConversationDataset:
        """Read LLaVA's format: a list of ``{"image", "conversations": [{"from", "value"}]}``.

        Args:
            path: The JSON.
            images: As the class itself.
            panoptic: As the class itself.

        Raises:
            FileNotFoundError: if there is no such file.
            ValueError: naming the file, the record and the key.

        Source: LLaVA's data format; ``<image>`` in a turn is taken out, since the chat template
            puts images first.
        """
        path = Path(path)
        if not path.is_file():
            raise FileNotFoundError(f"{path}: there is no such file of conversations")
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"{path}: not a JSON file ({error})") from error
        if not isinstance(content, list):
            raise ValueError(f"{path}: expected a list of records, got {type(content).__name__}")
        records = [_from_llava(record, f"{path}: [{i}]") for i, record in enumerate(content)]
        return cls(records, images=images, panoptic=panoptic)

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> Record:
        """Return one record with its images read.

        Args:
            index: 0..len-1, or counted from the end.

        Raises:
            IndexError: if there is no such record.
            FileNotFoundError: naming the image that is not there.
            ValueError: naming the image that is unreadable.
        """
        record = dict(self.records[index])
        images, maps = record_images(record)
        opened = []
        for position, image in enumerate(images):
            if isinstance(image, str | Path):
                path = Path(image) if self.images is None else self.images / image
                image = read_image(path)
                if maps[position] is None and self.panoptic is not None:
                    maps[position] = self.panoptic(path)
            opened.append(image)
        return {**record, "image": opened, "panoptic": maps}


def record_images(record: Mapping[str, Any]) -> tuple[list[Any], list[MapInput | None]]:
    """Return a record's images and, for each, its map, crayon or None.

    Args:
        record: A training record.

    Raises:
        ValueError: if there are maps and their number is another.
    """
    images = _as_list(record.get("image"))
    maps = _as_list(record.get("panoptic")) or [None] * len(images)
    if len(maps) != len(images):
        raise ValueError(f"panoptic: expected {len(images)} maps for 'image', got {len(maps)}")
    return images, maps


def check_record(record: object, where: str) -> Record:
    """Check a training record's form.

    Args:
        record: What is to be one.
        where: What to call it in messages.

    Raises:
        ValueError: naming ``where`` and the key.
    """
    if not isinstance(record, Mapping):
        raise ValueError(f"{where}: expected a mapping, got {type(record).__name__}")
    turns = record.get("conversation")
    if not isinstance(turns, Sequence) or isinstance(turns, str) or not turns:
        raise ValueError(f"{where}: expected 'conversation' as a list of messages, got {turns!r}")
    for position, turn in enumerate(turns):
        role = turn.get("role") if isinstance(turn, Mapping) else None
        if role not in ("system", "user", "assistant") or "content" not in turn:
            raise ValueError(
                f"{where}: conversation[{position}]: expected 'role' (system, user or assistant) "
                f"and 'content', got {turn!r}"
            )
        _check_content(turn["content"], f"{where}: conversation[{position}]")
    if not any(turn["role"] == "assistant" for turn in turns):
        raise ValueError(f"{where}: expected an assistant's turn in 'conversation', got none")
    try:
        record_images(record)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error
    return dict(record)


def _check_content(content: object, where: str) -> None:
    if isinstance(content, str):
        return
    parts: Sequence[Any] = content if isinstance(content, Sequence) else [content]
    for part in parts:
        kind = part.get("type") if isinstance(part, Mapping) else None
        if kind != "image" and not (kind == "text" and isinstance(part.get("text"), str)):
            raise ValueError(
                f"{where}: expected 'content' as a string, or a list of {{'type': 'image'}} and "
                f"{{'type': 'text', 'text': ...}}, got {part!r}"
            )


def _as_list(value: Any) -> list[Any]:
    if value is None:
        return []
    return list(value) if isinstance(value, list | tuple) else [value]


def _from_llava(record: object, where: str) -> Record:
    turns = record.get("conversations") if isinstance(record, Mapping) else None
    if not isinstance(record, Mapping) or not isinstance(turns, list):
        raise ValueError(f"{where}: expected 'conversations' as a list of turns, got {turns!r}")
    conversation = []
    for position, turn in enumerate(turns):
        role = _ROLES.get(str(turn.get("from"))) if isinstance(turn, Mapping) else None
        value = turn.get("value") if isinstance(turn, Mapping) else None
        if role is None or not isinstance(value, str):
            raise ValueError(
                f"{where}: conversations[{position}]: expected 'from' (human or gpt) and 'value', "
                f"got {turn!r}"
            )
        conversation.append({"role": role, "content": value.replace("<image>", "").strip()})
    image = record.get("image")
    placeholders = sum(turn["value"].count("<image>") for turn in turns)
    if placeholders > len(_as_list(image)):
        raise ValueError(
            f"{where}: expected {placeholders} images in 'image', one for each <image>, "
            f"got {image!r}"
        )
    return {"image": image, "conversation": conversation}
