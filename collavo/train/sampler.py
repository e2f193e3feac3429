"""The order of samples: every optimizer step takes all its micro-batches from one data set."""

from __future__ import annotations

import warnings
from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import ConcatDataset, Dataset, Sampler

from collavo.panoptic.coco_index import Skipped
from collavo.prepared.streaming import SkipLog
from collavo.train.schedule import STEP_KINDS, StepKind, StepSchedule, stable_hash

# More than a data set has by chance: a folder that is not there, or a setting that fits none.
_MOST_IN_A_ROW = 100


class _Stream:
    """An endless shuffled pass after pass over ``range(size)``, readable at any position."""

    def __init__(self, seed: int, kind: StepKind, size: int) -> None:
        self.seed, self.kind, self.size = seed, kind, size
        self._pass = -1
        self._order: list[int] = []

    def at(self, position: int) -> int:
        number, offset = divmod(position, self.size)
        if number != self._pass:
            generator = torch.Generator().manual_seed(stable_hash(self.seed, self.kind, number))
            self._order = torch.randperm(self.size, generator=generator).tolist()
            self._pass = number
        return self._order[offset]


class StepSampler(Sampler[int]):
    """Yields indices into the joined data sets, ``step_size`` of one kind after another.

    Each kind has its own endless stream of shuffled passes; the k-th step of a kind takes the k-th
    ``step_size`` samples of that stream. The order follows from the seed and the step alone, so a
    resumed run goes on where it stopped, whatever happened in between. Accelerate hands the batches
    to the ranks in turn, so one step's batches are of one kind on all of them.

    Args:
        schedule: Draws the kind of each step.
        sizes: Samples of each kind that there are; the joined data set holds them in this order.
        step_size: Samples of one optimizer step, over all ranks and micro-batches.
        seed: Orders the streams.
        global_step: Returns the number of optimizer steps done so far.

    Raises:
        ValueError: if a kind that can be drawn has no samples, or ``step_size`` is below one.

    Example:
        >>> sampler = StepSampler(StepSchedule(0, 0.0), {"image": 4}, step_size=2, seed=0)
        >>> sorted(sampler), len(sampler)
        ([0, 1, 2, 3], 4)
    """

    def __init__(
        self,
        schedule: StepSchedule,
        sizes: Mapping[StepKind, int],
        step_size: int,
        seed: int,
        global_step: Callable[[], int] = lambda: 0,
    ) -> None:
        if step_size < 1:
            raise ValueError(f"step_size: expected at least 1, got {step_size}")
        needed: dict[StepKind, bool] = {
            "image": schedule.vl_probability < 1.0,
            "vl": schedule.vl_probability > 0.0,
        }
        for kind, is_needed in needed.items():
            if is_needed and not sizes.get(kind):
                raise ValueError(
                    f"{kind} data set: it has no samples, and vl_probability="
                    f"{schedule.vl_probability} draws from it"
                )
        self.schedule = schedule
        self.sizes: dict[StepKind, int] = {kind: sizes.get(kind, 0) for kind in STEP_KINDS}
        self.step_size = step_size
        self.seed = seed
        self.global_step = global_step

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps in which as many samples are seen as the data sets hold, rounded up."""
        return -(-sum(self.sizes.values()) // self.step_size)

    def __len__(self) -> int:
        return self.steps_per_epoch * self.step_size

    def __iter__(self) -> Iterator[int]:
        first = self.global_step() // self.steps_per_epoch * self.steps_per_epoch
        return self._indices(first)

    def _indices(self, first: int) -> Iterator[int]:
        streams = {
            kind: _Stream(self.seed, kind, size) for kind, size in self.sizes.items() if size
        }
        offsets: dict[StepKind, int] = {"image": 0, "vl": self.sizes["image"]}
        done = self.schedule.counts(0, first)
        for step in range(first, first + self.steps_per_epoch):
            kind = self.schedule.kind(step)
            start = done[kind] * self.step_size
            for position in range(start, start + self.step_size):
                yield offsets[kind] + streams[kind].at(position)
            done[kind] += 1


class JoinedDataset(ConcatDataset[Any]):
    """Data sets one after another, which are all told the epoch, past what cannot be used.

    One bad record must not end a run of days: it is reported, and the next one of its data set
    that can be used stands in for it, the same one whenever it is asked for.

    Args:
        datasets: The data sets.
        on_unusable: Called with the name and the reason of every record that is left out, in the
            process that read it; None raises instead.
        check: Raises for a record that no batch can be made with.
    """

    def __init__(
        self,
        datasets: Sequence[Dataset[Any]],
        *,
        on_unusable: Callable[[Skipped], None] | None = None,
        check: Callable[[Any], None] | None = None,
    ) -> None:
        super().__init__(datasets)
        self.on_unusable = on_unusable
        self.check = check

    def set_epoch(self, epoch: int) -> None:
        """Tell the epoch to the data sets that draw anew in each (the trainer calls this)."""
        for dataset in self.datasets:
            if hasattr(dataset, "set_epoch"):
                dataset.set_epoch(epoch)

    @property
    def with_image(self) -> NDArray[np.bool_] | None:
        """Which records have an image, bool ``[n]``; None if one of the data sets does not say."""
        return self._joined("with_image")

    @property
    def lengths(self) -> NDArray[np.int32] | None:
        """Tokens of each record, ``[n]``; None if one of the data sets does not say."""
        return self._joined("lengths")

    def _joined(self, name: str) -> NDArray[Any] | None:
        found: list[Any] = [getattr(dataset, name, None) for dataset in self.datasets]
        return None if any(one is None for one in found) else np.concatenate(found)

    def file_name(self, index: int) -> str:
        """Return what to call a record in reports.

        Args:
            index: 0..len-1, or counted from the end.
        """
        return name_of(*self._find(index))

    def __getitem__(self, index: int) -> Any:
        """Return one record, or the next that can be used.

        Args:
            index: 0..len-1, or counted from the end.

        Raises:
            IndexError: if there is no such record.
            ValueError: if a hundred records in a row, or all there are, cannot be used.
        """
        dataset, first = self._find(index)
        if self.on_unusable is None:
            return dataset[first]
        size = len(dataset)
        for step in range(min(size, _MOST_IN_A_ROW)):
            own = (first + step) % size
            try:
                record = dataset[own]
                if self.check is not None:
                    self.check(record)
                return record
            except (ValueError, OSError) as error:
                fault = error
                name = name_of(dataset, own)
                self.on_unusable(Skipped(name, str(error).removeprefix(f"{name}: ")))
        raise ValueError(
            f"{min(size, _MOST_IN_A_ROW)} records in a row cannot be used; the last: {fault}"
        ) from fault

    def _find(self, index: int) -> tuple[Any, int]:
        position = range(len(self))[index]
        number = bisect_right(self.cumulative_sizes, position)
        return self.datasets[number], position - (
            self.cumulative_sizes[number - 1] if number else 0
        )


def name_of(dataset: Any, index: int) -> str:
    """Return what to call a record of any data set in reports.

    Args:
        dataset: Perhaps with ``file_name(index)``.
        index: Of the record.
    """
    named = hasattr(dataset, "file_name")
    return str(dataset.file_name(index)) if named else f"record {index}"


class UnusableReport:
    """Writes down what is left out of a run, and says once that there is something.

    Args:
        path: JSON lines with ``file`` and ``reason``; see ``SkipLog``.
    """

    def __init__(self, path: Path) -> None:
        self.log = SkipLog(path)
        self._said = self._begun = False

    def begin(self) -> None:
        """Forget what an earlier run has listed; a second call changes nothing."""
        if not self._begun:
            self._begun = True
            with suppress(OSError):  # then nothing can be listed either, and the run goes on
                self.log.path.unlink(missing_ok=True)

    def __call__(self, skipped: Skipped) -> None:
        """Add an entry; a report that cannot be written does not end the run either.

        Args:
            skipped: What was left out, and why.
        """
        try:
            self.log.path.parent.mkdir(parents=True, exist_ok=True)
            self.log(skipped)
            where = f"all are listed in {self.log.path}"
        except OSError as error:
            where = f"the list could not be written ({error})"
        if not self._said:
            self._said = True
            warnings.warn(
                f"{skipped.name}: {skipped.reason}; records that cannot be used are left out of "
                f"this run, {where}",
                stacklevel=2,
            )

    def summary(self) -> str:
        """Return how many records were left out and where to read which, or the empty text."""
        try:
            count = str(len({entry.name for entry in self.log.entries()}))
        except (ValueError, OSError):  # somebody else has written there
            count = "some"
        return "" if count == "0" else f"{count} records were left out, listed in {self.log.path}"


def join(
    image: Dataset[Any] | None,
    vl: Dataset[Any] | None,
    *,
    on_unusable: Callable[[Skipped], None] | None = None,
    check: Callable[[Any], None] | None = None,
) -> JoinedDataset:
    """Return the data sets as one, image samples first, in the order :class:`StepSampler` expects.

    Args:
        image: Crayon instructions.
        vl: Visual instructions.
        on_unusable: As :class:`JoinedDataset`.
        check: As :class:`JoinedDataset`.

    Raises:
        ValueError: if there is none, or one has no length.
    """
    present = {"train_dataset": image, "vl_dataset": vl}
    parts = {name: data for name, data in present.items() if data is not None}
    if not parts:
        raise ValueError("train_dataset: expected a data set of crayon instructions, got None")
    for name, data in parts.items():
        if not hasattr(data, "__len__") or not hasattr(data, "__getitem__"):
            raise ValueError(f"{name}: expected a data set with a length and items by index")
    return JoinedDataset(list(parts.values()), on_unusable=on_unusable, check=check)
