"""The order of LLaVA's stages: steps of one kind, alike lengths, equal work for all devices."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import Sampler

from collavo.train.schedule import stable_hash

# Steps whose samples are sorted by length together: with more, steps would be less alike a random
# draw; with fewer, there would be more padding.
WINDOW = 16

Indices = NDArray[np.int64]


class Place(NamedTuple):
    """A sample's place in a micro-batch.

    Attributes:
        sample: Its number.
        counted: Whether its labels count; else it only keeps a device from having nothing to do.
    """

    sample: int
    counted: bool = True


class GroupedSchedule:
    """Says what every optimizer step trains on: samples of one kind, of alike length.

    Each epoch takes every sample once. A kind of n samples has ceil(n / global_batch) steps, whose
    order is drawn; the last of them holds what is left over. Samples are shuffled, then sorted by
    length within windows of a few steps. All of it follows from the seed and the step's number, so
    all ranks agree, and a resumed run goes on where it stopped.

    Args:
        sizes: Samples of each kind; the joined data set holds them in this order.
        global_batch: Samples of a step, over all devices and micro-batches.
        seed: Any integer.
        lengths: Tokens of each sample of the joined data set; None takes all as alike.

    Raises:
        ValueError: if there is no sample, or the lengths are more or fewer.

    Example:
        >>> schedule = GroupedSchedule({"image": 5, "text": 2}, global_batch=2, seed=0)
        >>> schedule.steps_per_epoch, schedule.counts(0, 4)
        (4, {'image': 3, 'text': 1})
        >>> sorted(index for step in range(4) for index in schedule.samples(step))
        [0, 1, 2, 3, 4, 5, 6]
    """

    def __init__(
        self,
        sizes: Mapping[str, int],
        global_batch: int,
        seed: int,
        lengths: Sequence[int] | NDArray[Any] | None = None,
    ) -> None:
        total = sum(sizes.values())
        if total < 1:
            raise ValueError("train_dataset: expected at least one record, got none")
        if lengths is not None and len(lengths) != total:
            raise ValueError(f"lengths: expected one for each of {total}, got {len(lengths)}")
        self.sizes = {kind: size for kind, size in sizes.items() if size}
        self.global_batch, self.seed = global_batch, seed
        self.lengths: Indices = np.ones(total, np.int64)
        if lengths is not None:
            self.lengths = np.asarray(lengths, np.int64)
        self._steps = {kind: -(-size // global_batch) for kind, size in self.sizes.items()}
        first = dict(zip(sizes, np.cumsum([0, *sizes.values()]).tolist(), strict=False))
        self._first = {kind: first[kind] for kind in self.sizes}
        self._epoch, self._plan = -1, list[tuple[str, Indices]]()

    @property
    def kinds(self) -> tuple[str, ...]:
        """The kinds that there are samples of."""
        return tuple(self.sizes)

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps in which every sample is seen once."""
        return sum(self._steps.values())

    def kind(self, step: int) -> str:
        """Return the kind of a global optimizer step, counted from 0."""
        return self._at(step)[0]

    def samples(self, step: int) -> list[int]:
        """Return the samples of a global optimizer step, the longest first."""
        indices: list[int] = self._at(step)[1].tolist()
        return indices

    def counts(self, first: int, last: int) -> dict[str, int]:
        """Return how many steps of each kind there are in ``range(first, last)``."""
        found = Counter(self.kind(step) for step in range(first, last))
        return {kind: found[kind] for kind in self.kinds}

    def fingerprint(self) -> str:
        """Return a word for what the order follows from beside seed and batch: kinds, lengths."""
        digest = hashlib.blake2b(repr(self.sizes).encode(), digest_size=8)
        digest.update(self.lengths.tobytes())
        return digest.hexdigest()

    def _at(self, step: int) -> tuple[str, Indices]:
        epoch, place = divmod(step, self.steps_per_epoch)
        if epoch != self._epoch:
            self._plan, self._epoch = self._planned(epoch), epoch
        return self._plan[place]

    def _planned(self, epoch: int) -> list[tuple[str, Indices]]:
        queues = {kind: iter(self._of_kind(kind, epoch)) for kind in self.kinds}
        kinds = [kind for kind, steps in self._steps.items() for _ in range(steps)]
        order = self._permutation(len(kinds), "order of kinds", epoch)
        return [(kinds[i], next(queues[kinds[i]])) for i in order]

    def _of_kind(self, kind: str, epoch: int) -> list[Indices]:
        shuffled = self._first[kind] + self._permutation(self.sizes[kind], kind, epoch)
        full = len(shuffled) // self.global_batch * self.global_batch
        width = WINDOW * self.global_batch
        windows = [shuffled[start : min(start + width, full)] for start in range(0, full, width)]
        grouped = [self._by_length(one).reshape(-1, self.global_batch) for one in windows]
        steps = [step for window in grouped for step in window]
        order = self._permutation(len(steps), f"order of {kind}", epoch)
        rest = [self._by_length(shuffled[full:])] if full < len(shuffled) else []
        return [*(steps[i] for i in order), *rest]

    def _by_length(self, indices: Indices) -> Indices:
        return indices[np.argsort(-self.lengths[indices], kind="stable")]

    def _permutation(self, size: int, *what: str | int) -> Indices:
        generator = torch.Generator().manual_seed(stable_hash(self.seed, *what))
        drawn: Indices = torch.randperm(size, generator=generator).numpy()
        return drawn


class GroupedSampler(Sampler[Place | None]):
    """Yields the places of all micro-batches of an epoch, each micro-batch ``batch_size`` long.

    They come in the order in which accelerate hands batches to the ranks: in turn. Where a step is
    small, places are left empty (None), and a micro-batch of which all would be holds a sample that
    does not count, so every rank runs the same number of forward passes.

    Args:
        schedule: Says what a step trains on.
        devices: Ranks.
        micro_batches: Of each step, on each device.
        batch_size: Of a micro-batch.
        global_step: Returns the number of optimizer steps done so far.

    Raises:
        ValueError: if that is not the schedule's global batch.
    """

    def __init__(
        self,
        schedule: GroupedSchedule,
        devices: int,
        micro_batches: int,
        batch_size: int,
        global_step: Callable[[], int] = lambda: 0,
    ) -> None:
        if devices * micro_batches * batch_size != schedule.global_batch:
            raise ValueError(
                f"batch_size: expected {devices} devices x {micro_batches} micro-batches x "
                f"batch_size to be the global batch {schedule.global_batch}, got {batch_size}"
            )
        self.schedule, self.devices, self.micro_batches = schedule, devices, micro_batches
        self.batch_size, self.global_step = batch_size, global_step

    def __len__(self) -> int:
        return self.schedule.steps_per_epoch * self.schedule.global_batch

    def __iter__(self) -> Iterator[Place | None]:
        steps = self.schedule.steps_per_epoch
        return self._places(self.global_step() // steps * steps)

    def _places(self, first: int) -> Iterator[Place | None]:
        for step in range(first, first + self.schedule.steps_per_epoch):
            samples = self.schedule.samples(step)
            for batch in deal(samples, self.schedule.lengths, self.devices, self.micro_batches):
                # The shortest one costs least.
                yield from map(Place, batch) if batch else [Place(samples[-1], counted=False)]
                yield from [None] * (self.batch_size - max(len(batch), 1))


def deal(
    samples: Sequence[int], lengths: Indices, devices: int, micro_batches: int
) -> list[list[int]]:
    """Deal a step's samples to micro-batches of alike length, with equal work for all devices.

    Args:
        samples: Of one step, the longest first.
        lengths: Tokens, by sample.
        devices: Ranks.
        micro_batches: Of each device.

    Returns:
        The micro-batches: the first of each device, then the second of each, ...; their sizes
        differ by at most one.

    Example:
        >>> deal([3, 2, 1, 0], np.array([1, 2, 7, 9]), devices=2, micro_batches=2)
        [[3], [2], [0], [1]]
    """
    base, more = divmod(len(samples), devices * micro_batches)
    room = [base + (number < more) for number in range(devices * micro_batches)]
    work = [0] * devices
    dealt: list[list[int]] = []
    left = iter(samples)
    for micro in range(micro_batches):
        own = room[micro * devices : (micro + 1) * devices]
        batches: list[list[int]] = [[] for _ in range(devices)]
        for _ in range(sum(own)):
            free = [device for device in range(devices) if len(batches[device]) < own[device]]
            device = min(free, key=work.__getitem__)
            batches[device].append(sample := next(left))
            work[device] += int(lengths[sample])
        dealt += batches
    return dealt
