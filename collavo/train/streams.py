"""A data set of records with and without images, read as streams of one kind."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset

from collavo.panoptic.coco_index import Skipped
from collavo.train.arguments import CollavoTrainingArguments
from collavo.train.grouping import GroupedSampler, GroupedSchedule, Place
from collavo.train.sampler import JoinedDataset, StepSampler, join, name_of
from collavo.train.schedule import StepKind, StepSchedule

IMAGE, TEXT = "image", "text"
Collate: TypeAlias = Callable[[Any], Any]


class RecordsOf(Dataset[Any]):
    """The records of a data set that have these numbers.

    Args:
        dataset: All records.
        indices: Which, in their order here.
    """

    def __init__(self, dataset: Any, indices: NDArray[np.int64]) -> None:
        self.dataset, self.indices = dataset, indices

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> Any:
        return self.dataset[int(self.indices[index])]

    def set_epoch(self, epoch: int) -> None:
        """Tell the epoch to a data set that draws anew in each."""
        if hasattr(self.dataset, "set_epoch"):
            self.dataset.set_epoch(epoch)

    def file_name(self, index: int) -> str:
        """Return what to call a record in reports.

        Args:
            index: 0..len-1, or counted from the end.
        """
        return name_of(self.dataset, int(self.indices[index]))


class Taken(NamedTuple):
    """A record that a micro-batch has taken.

    Attributes:
        record: The record.
        counted: Whether its labels count.
    """

    record: Any
    counted: bool


class StepRecords(Dataset[Taken | None]):
    """Records by their places in micro-batches; an empty place has none.

    Args:
        records: By number.
    """

    def __init__(self, records: JoinedDataset) -> None:
        self.records = records

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, place: Place | None) -> Taken | None:
        if place is None:
            return None
        return Taken(self.records[place.sample], place.counted)

    def set_epoch(self, epoch: int) -> None:
        """Tell the epoch to the records."""
        self.records.set_epoch(epoch)


class StepCollator:
    """Makes batches of what ``StepRecords`` returns; labels that do not count are all -100.

    Args:
        collate: Makes a batch with ``labels`` of records.
    """

    def __init__(self, collate: Collate) -> None:
        self.collate = collate

    def __call__(self, places: Sequence[Taken | None]) -> dict[str, Tensor]:
        """Make one batch.

        Args:
            places: Not all of them empty.
        """
        taken = [place for place in places if place is not None]
        batch = dict(self.collate([one.record for one in taken]))
        if not all(one.counted for one in taken):  # then it is the only one
            batch["labels"] = batch["labels"].new_full(batch["labels"].shape, -100)
        return batch


def by_kind(
    dataset: Any,
    *,
    on_unusable: Callable[[Skipped], None] | None = None,
    check: Callable[[Any], None] | None = None,
) -> tuple[JoinedDataset, dict[str, int], NDArray[np.int32] | None]:
    """Return a data set with its records sorted by kind, the sizes of the kinds, and all lengths.

    A record that cannot be used is replaced by one of its kind.

    Args:
        dataset: Has ``with_image`` (bool ``[n]``) and, perhaps, ``lengths`` (int ``[n]``).
        on_unusable: As ``JoinedDataset``.
        check: As ``JoinedDataset``.

    Raises:
        ValueError: if it does not say which records have an image.
    """
    with_image = getattr(dataset, "with_image", None)
    if with_image is None:
        raise ValueError(
            f"train_dataset: expected a data set that says which records have an image "
            f"(with_image, as ConversationDataset has it), got {type(dataset).__name__}"
        )
    flags = np.asarray(with_image, bool)
    lengths = getattr(dataset, "lengths", None)
    numbers = {IMAGE: np.flatnonzero(flags), TEXT: np.flatnonzero(~flags)}
    parts = [RecordsOf(dataset, own) for own in numbers.values()]
    joined = JoinedDataset(parts, on_unusable=on_unusable, check=check)
    if lengths is not None:
        lengths = np.asarray(lengths)[np.concatenate(list(numbers.values()))]
    return joined, {kind: len(own) for kind, own in numbers.items()}, lengths


class DrawnStreams:
    """The streams of ``cpt`` and ``cit``: a data set for each kind, and a kind drawn for each step.

    Args:
        dataset: The data sets, joined; None if there is none.
        schedule: Draws the kinds.
        sizes: Samples of each kind.
    """

    def __init__(
        self, dataset: JoinedDataset | None, schedule: StepSchedule, sizes: dict[StepKind, int]
    ) -> None:
        self.dataset, self.schedule, self.sizes = dataset, schedule, sizes

    @classmethod
    def open(
        cls,
        schedule: StepSchedule,
        image: Dataset[Any] | None,
        vl: Dataset[Any] | None,
        **tools: Any,
    ) -> DrawnStreams:
        """Join the data sets.

        Args:
            schedule: Draws the kinds.
            image: Crayon instructions.
            vl: Visual instructions.
            **tools: As ``JoinedDataset``.

        Raises:
            ValueError: as ``join``.
        """
        given: dict[StepKind, Any] = {"image": image, "vl": vl}
        joined = None if image is None and vl is None else join(image, vl, **tools)
        sizes = {kind: 0 if data is None else len(data) for kind, data in given.items()}
        return cls(joined, schedule, sizes)

    def sampler(
        self, args: CollavoTrainingArguments, global_step: Callable[[], int]
    ) -> StepSampler:
        """Return the order of samples from the epoch of a step on.

        Args:
            args: Of the run.
            global_step: Returns the number of optimizer steps done so far.

        Raises:
            ValueError: as ``StepSampler``.
        """
        size, seed = args.step_size, args.stream_seed
        return StepSampler(self.schedule, self.sizes, size, seed, global_step=global_step)

    def collator(self, collate: Collate) -> Collate:
        """Return what makes batches of what the data set returns.

        Args:
            collate: Makes batches of records.
        """
        return collate

    def facts(self) -> dict[str, Any]:
        """Return what a resumed run has to share beside ``stream_facts`` of the arguments."""
        return {}


class GroupedStreams:
    """The streams of ``align`` and ``instruct``: one data set, whose steps are of one kind each.

    Args:
        dataset: By places in micro-batches; None if there is none.
        schedule: Says what a step trains on.
    """

    def __init__(self, dataset: StepRecords | None, schedule: GroupedSchedule) -> None:
        self.dataset, self.schedule = dataset, schedule

    @classmethod
    def open(
        cls, dataset: Any, global_batch: int, seed: int, *, by_length: bool = True, **tools: Any
    ) -> GroupedStreams:
        """Sort a data set's records by kind.

        Args:
            dataset: As of :func:`by_kind`; None for a trainer that does not train.
            global_batch: Samples of a step.
            seed: Of the order.
            by_length: Whether samples of alike length come together, if the data set has lengths.
            **tools: As ``JoinedDataset``.

        Raises:
            ValueError: as :func:`by_kind`, or if the data set is empty.
        """
        if dataset is None:
            return cls(None, GroupedSchedule({IMAGE: 1}, global_batch, seed))
        joined, sizes, lengths = by_kind(dataset, **tools)
        own = lengths if by_length else None
        return cls(StepRecords(joined), GroupedSchedule(sizes, global_batch, seed, own))

    def sampler(
        self, args: CollavoTrainingArguments, global_step: Callable[[], int]
    ) -> GroupedSampler:
        """Return the places of an epoch's micro-batches, from the epoch of a step on.

        Args:
            args: Of the run.
            global_step: Returns the number of optimizer steps done so far.
        """
        micro_batch, micro_batches = args.train_batch_size, args.gradient_accumulation_steps
        return GroupedSampler(
            self.schedule,
            int(args.world_size),
            int(micro_batches or 1),
            int(micro_batch),
            global_step,
        )

    def collator(self, collate: Collate) -> Collate:
        """Return what makes batches of what the data set returns.

        Args:
            collate: Makes batches of records.
        """
        return StepCollator(collate)

    def facts(self) -> dict[str, Any]:
        """Return what a resumed run has to share beside ``stream_facts`` of the arguments."""
        return {"samples": self.schedule.sizes, "order": self.schedule.fingerprint()}


def expect_images(dataset: Any, why: str, argument: str = "train_dataset") -> None:
    """Raise if a data set has records without an image.

    Args:
        dataset: With ``with_image``, or else it is not looked at.
        why: What is wrong with them.
        argument: What to call it.

    Raises:
        ValueError: naming the first of them.
    """
    with_image = getattr(dataset, "with_image", None)
    without = np.flatnonzero(~np.asarray(True if with_image is None else with_image, bool))
    if without.size:
        first = name_of(dataset, int(without[0]))
        raise ValueError(
            f"{argument}: {len(without)} of {len(dataset)} records have no image, the first is "
            f"{first}; {why}"
        )
