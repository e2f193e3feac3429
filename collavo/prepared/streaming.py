"""Samples one after the other, shared out over ranks and workers, past what is unreadable."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from multiprocessing.context import get_spawning_popen
from pathlib import Path
from typing import Protocol, TypeVar

import torch
import torch.distributed
from torch.utils.data import IterableDataset, get_worker_info

from collavo.panoptic.coco_index import Skipped
from collavo.panoptic.maps import PathLike

_T = TypeVar("_T")
_T_co = TypeVar("_T_co", covariant=True)


class NamedSamples(Protocol[_T_co]):
    """A map-style data set whose samples have file names, such as ``CocoPanopticDataset``."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> _T_co: ...

    def file_name(self, index: int, /) -> str:
        """Return what to call a sample in reports."""
        ...


class SampleStream(IterableDataset[_T]):
    """The samples of a data set, each of them once per epoch over all ranks and workers.

    Rank ``r`` of ``n`` takes every n-th sample of the epoch's order, beginning with the r-th, and
    its DataLoader workers share these out in the same way. Where a DataLoader gives out samples one
    by one (a batch size of 1 or None) and none is left out, their order does not depend on the
    number of workers; larger batches are of one worker's share each, so that which samples meet in
    a batch does depend on it. Ranks may differ by one sample. In memory is the order alone.

    Args:
        samples: A map-style data set, such as ``CocoPanopticDataset``, ``PreparedDataset`` or
            ``CrayonInstructionDataset``.
        shuffle: Whether every epoch has an order of its own, a pure function of seed and epoch.
        seed: Of the orders.
        rank: This process among ``world_size``; None takes it from ``torch.distributed`` when the
            iteration begins, or 0 where that is not running. Where something else shares samples
            out among processes, as accelerate does, name rank 0 of 1.
        world_size: How many processes there are; None as for ``rank``.
        on_unreadable: Called with the name and the reason of every sample that cannot be read,
            which is then left out; in the process that read it, so with workers take something
            that reaches beyond them, such as ``SkipLog``. None raises instead.

    Raises:
        ValueError: if only one of rank and world size is given, or the rank is not below the size.

    Example:
        >>> class Letters:
        ...     def __len__(self): return 5
        ...     def __getitem__(self, index): return "abcde"[index]
        ...     def file_name(self, index): return f"{index}.txt"
        >>> list(SampleStream(Letters(), rank=0, world_size=2))
        ['a', 'c', 'e']
    """

    def __init__(
        self,
        samples: NamedSamples[_T],
        *,
        shuffle: bool = False,
        seed: int = 0,
        rank: int | None = None,
        world_size: int | None = None,
        on_unreadable: Callable[[Skipped], None] | None = None,
    ) -> None:
        if (rank is None) != (world_size is None):
            raise ValueError(
                f"rank, world_size: expected both or neither, got {rank} and {world_size}"
            )
        if rank is not None and world_size is not None and not 0 <= rank < world_size:
            raise ValueError(f"rank: expected 0..{world_size - 1} of {world_size}, got {rank}")
        self.samples = samples
        self.shuffle = shuffle
        self.seed = seed
        self.rank = rank
        self.world_size = world_size
        self.on_unreadable = on_unreadable
        # In shared memory, so that workers which live over epochs see it change.
        self._epoch = torch.zeros((), dtype=torch.int64)
        self._epoch.share_memory_()  # type: ignore[no-untyped-call]

    def set_epoch(self, epoch: int) -> None:
        """Take another order from the next iteration on, in running workers too.

        Samples that have epochs of their own, as crayon instructions do, are told too.

        Args:
            epoch: The number of the epoch.
        """
        self._epoch.fill_(epoch)
        if hasattr(self.samples, "set_epoch"):
            self.samples.set_epoch(epoch)

    def __len__(self) -> int:
        """Return how many samples this rank has, unreadable ones included."""
        rank, world_size = self._place()
        return len(range(rank, len(self.samples), world_size))

    def __iter__(self) -> Iterator[_T]:
        """Read this worker's share of this rank's samples, one after the other.

        Raises:
            FileNotFoundError: naming the file, unless unreadable samples are left out.
            ValueError: naming the file, unless unreadable samples are left out.
        """
        rank, world_size = self._place()
        worker = get_worker_info()
        if worker is not None:
            rank, world_size = (
                rank + world_size * worker.id,
                world_size * worker.num_workers,
            )
        for index in self._order(rank, world_size):
            try:
                sample = self.samples[index]
            except (ValueError, OSError) as error:
                if self.on_unreadable is None:
                    raise
                self.on_unreadable(Skipped(self.samples.file_name(index), str(error)))
            else:
                yield sample

    def __getstate__(self) -> dict[str, object]:
        # A spawned worker gets the stream pickled and knows nothing of torch.distributed. Any other
        # copy asks for its rank itself, since it may have been made before there were ranks.
        if get_spawning_popen() is None:
            return self.__dict__.copy()
        rank, world_size = self._place()
        return {**self.__dict__, "rank": rank, "world_size": world_size}

    def __setstate__(self, state: dict[str, object]) -> None:
        self.__dict__.update(state)
        self._epoch.share_memory_()  # type: ignore[no-untyped-call]

    def _order(self, first: int, step: int) -> Iterator[int]:
        if not self.shuffle:
            yield from range(first, len(self.samples), step)
            return
        generator = torch.Generator().manual_seed(_mixed(self.seed, int(self._epoch)))
        order = torch.randperm(len(self.samples), generator=generator)
        yield from (int(index) for index in order[first::step].clone())

    def _place(self) -> tuple[int, int]:
        if self.rank is not None and self.world_size is not None:
            return self.rank, self.world_size
        distributed = torch.distributed
        if distributed.is_available() and distributed.is_initialized():
            return distributed.get_rank(), distributed.get_world_size()
        return 0, 1


class SkipLog:
    """A report of what a stream left out: a file to which every worker adds lines.

    Args:
        path: JSON lines with ``file`` and ``reason``; added to if it is there.

    Example:
        >>> from tempfile import TemporaryDirectory
        >>> with TemporaryDirectory() as folder:
        ...     log = SkipLog(f"{folder}/skipped.jsonl")
        ...     log(Skipped("000000000139.png", "truncated"))
        ...     log.entries()
        [Skipped(name='000000000139.png', reason='truncated')]
    """

    def __init__(self, path: PathLike) -> None:
        self.path = Path(path)

    def __call__(self, skipped: Skipped) -> None:
        """Add an entry.

        Args:
            skipped: What was left out, and why.
        """
        line = skip_line(skipped).encode()
        # One write to a file opened for appending: lines of several processes do not mix.
        handle = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        try:
            os.write(handle, line)
        finally:
            os.close(handle)

    def entries(self) -> list[Skipped]:
        """Return what has been reported so far, in the order in which it came.

        Raises:
            ValueError: naming the file and the line, if it is no such report.
        """
        return read_skips(self.path) if self.path.is_file() else []


def skip_line(skipped: Skipped) -> str:
    """Write an entry of a report as a line of JSON.

    Args:
        skipped: The entry.
    """
    return json.dumps({"file": skipped.name, "reason": skipped.reason}) + "\n"


def read_skips(path: PathLike) -> list[Skipped]:
    """Read a report.

    Args:
        path: JSON lines with ``file`` and ``reason``.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: naming the file and the line, if it is no such report.
    """
    path = Path(path)
    found = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        try:
            entry = json.loads(line)
            found.append(Skipped(entry["file"], entry["reason"]))
        except (ValueError, TypeError, KeyError) as error:
            raise ValueError(
                f"{path}: line {number}: expected 'file' and 'reason', got {line[:80]!r}"
            ) from error
    return found


def _mixed(seed: int, epoch: int) -> int:
    """Return a seed of its own for every pair; neighbouring seeds and epochs do not meet."""
    return (seed * 0x9E3779B97F4A7C15 + epoch * 0xD1B54A32D192ED03) % 2**63
