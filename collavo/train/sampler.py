"""The order of samples: every optimizer step takes all its micro-batches from one data set."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch.utils.data import ConcatDataset, Dataset, Sampler

from collavo.train.schedule import STEP_KINDS, StepKind, StepSchedule, stable_hash


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
    """Data sets one after another, which are all told the epoch."""

    def set_epoch(self, epoch: int) -> None:
        """Tell the epoch to the data sets that draw anew in each (the trainer calls this)."""
        for dataset in self.datasets:
            if hasattr(dataset, "set_epoch"):
                dataset.set_epoch(epoch)


def join(image: Dataset[Any] | None, vl: Dataset[Any] | None) -> JoinedDataset:
    """Return the data sets as one, image samples first, in the order :class:`StepSampler` expects.

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
    return JoinedDataset(list(parts.values()))
