"""Crayon instructions made from COCO panoptic, as a data set of records."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import Dataset

from collavo._arguments import expect_like
from collavo.conversations.dataset import ConversationDataset as ConversationDataset
from collavo.conversations.records import Record
from collavo.panoptic.coco import CocoPanopticDataset, PanopticSample
from collavo.panoptic.instructions import (
    TEMPLATES,
    build_instructions,
    check_templates,
    draw_instruction,
)
from collavo.panoptic.maps import MapInput
from collavo.panoptic.text import detections_from_map
from collavo.prepared.read import PreparedDataset, PreparedSample


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

    @property
    def with_image(self) -> NDArray[np.bool_]:
        """Which records have an image: all, bool ``[n]``."""
        return np.ones(len(self), np.bool_)

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
