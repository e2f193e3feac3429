"""What a conversion will write, tensor by tensor, made from headers alone.

A source's description takes every tensor by its name and shape and says what becomes of it. So all
that does not fit is found, and named, before the first byte is read or written.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

# What older files hold beside weights: it follows from the configuration.
DERIVED = ("rotary_emb.inv_freq", "embeddings.position_ids")
_SHOWN = 8


class Header(NamedTuple):
    """What a file's header says of a tensor.

    Attributes:
        shape: Its shape.
        dtype: Its dtype.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype


class Output(NamedTuple):
    """A tensor that will be written.

    Attributes:
        name: Its name in the target.
        shape: Its shape there; -1 is a length that its values decide.
        dtype: Its dtype there.
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def size(self) -> int:
        """The bytes it takes, without what its values decide."""
        return max(0, math.prod(self.shape)) * self.dtype.itemsize

    def allows(self, tensor: Tensor) -> bool:
        """Say whether a tensor is what was planned.

        Args:
            tensor: What was made.
        """
        if tensor.dtype != self.dtype or tensor.dim() != len(self.shape):
            return False
        pairs = zip(self.shape, tensor.shape, strict=True)
        return all(planned in (-1, size) for planned, size in pairs)


class Entry(NamedTuple):
    """Tensors that are made together: ``outputs <- make(*sources)``.

    Attributes:
        outputs: What comes of it, in the order of ``make``'s result.
        sources: The names of what it is made of, in the order of ``make``'s arguments.
        make: Called with the sources' tensors, which it must not change; returns one tensor for
            each output, in its shape and dtype.
    """

    outputs: tuple[Output, ...]
    sources: tuple[str, ...]
    make: Callable[..., Sequence[Tensor]]

    @property
    def size(self) -> int:
        """The bytes that its outputs take."""
        return sum(output.size for output in self.outputs)


class Check(NamedTuple):
    """What values have to be, looked at before anything is written.

    Attributes:
        sources: The names of the tensors to look at.
        look: Called with them; raises ValueError.
    """

    sources: tuple[str, ...]
    look: Callable[..., None]


class Plan(NamedTuple):
    """All that a conversion writes.

    Attributes:
        entries: In the order of the source's files, as far as possible.
        notes: Sentences that the user is told: what is dropped, added or drawn.
        decoder: Outputs that ``--quantize`` brings to 4 bits: the decoder's linear weights.
        checks: What is looked at first.
    """

    entries: tuple[Entry, ...]
    notes: tuple[str, ...] = ()
    decoder: frozenset[str] = frozenset()
    checks: tuple[Check, ...] = ()

    def outputs(self) -> dict[str, Output]:
        """Return what is written, by name."""
        return {output.name: output for entry in self.entries for output in entry.outputs}


class Tensors:
    """A source's tensors, taken one by one into a plan.

    What is missing, has another shape, or is left over is collected and named together by
    :meth:`plan`.

    Args:
        headers: The source's tensors by name; ``DERIVED`` ones are not looked at.
        where: What they are of, for messages: the folder.

    Example:
        >>> headers = {"old": Header((2, 3), torch.float16)}
        >>> tensors = Tensors(headers, "a folder")
        >>> tensors.copy("new", "old", (2, 3))
        >>> tensors.plan().entries[0].outputs
        (Output(name='new', shape=(2, 3), dtype=torch.float16),)
    """

    def __init__(self, headers: Mapping[str, Header], where: str) -> None:
        self.headers = {n: h for n, h in headers.items() if not n.endswith(DERIVED)}
        self.where = where
        self._left = dict.fromkeys(self.headers)
        self._missing: list[str] = []
        self._misshapen: list[str] = []
        self._entries: list[Entry] = []
        self._notes: list[str] = []
        self._checks: list[Check] = []

    def shape(self, name: str, dims: int) -> tuple[int, ...]:
        """Return the shape of a tensor that the configuration is read from.

        Args:
            name: Its name.
            dims: How many dimensions it has to have.

        Raises:
            ValueError: if it is missing or has another number of dimensions.
        """
        if name not in self.headers:
            raise ValueError(f"{self.where}: tensor {name!r} is missing")
        shape = self.headers[name].shape
        if len(shape) != dims:
            raise ValueError(
                f"{self.where}: {name}: expected {dims} dimensions, got shape {list(shape)}"
            )
        return shape

    def names(self, prefix: str) -> list[str]:
        """Return the names that begin with a prefix and are not taken yet.

        Args:
            prefix: Of the names.
        """
        return [name for name in self._left if name.startswith(prefix)]

    def take(self, name: str, shape: tuple[int, ...]) -> torch.dtype:
        """Take a tensor; what does not fit is kept for :meth:`plan`.

        Args:
            name: Its name.
            shape: The shape it has to have.

        Returns:
            Its dtype (float32 where it is missing).
        """
        found = self.headers.get(name)
        if found is None:
            self._missing.append(name)
            return torch.float32
        self._left.pop(name, None)
        if found.shape != tuple(shape):
            self._misshapen.append(f"{name}: expected {list(shape)}, found {list(found.shape)}")
        elif not found.dtype.is_floating_point or found.dtype.itemsize < 2:
            kind = str(found.dtype).removeprefix("torch.")
            self._misshapen.append(f"{name}: expected float16, bfloat16 or float32, found {kind}")
        return found.dtype

    def copy(self, target: str, source: str, shape: tuple[int, ...]) -> None:
        """Plan a tensor that is written as it is.

        Args:
            target: Its new name.
            source: Its name.
            shape: The shape it has to have.
        """
        dtype = self.take(source, shape)
        self.make([Output(target, tuple(shape), dtype)], [source], lambda tensor: (tensor,))

    def make(
        self,
        outputs: Sequence[Output],
        sources: Sequence[str],
        function: Callable[..., Sequence[Tensor]],
    ) -> None:
        """Plan tensors that are made of others; those have to be taken with :meth:`take`.

        Args:
            outputs: As in :class:`Entry`.
            sources: As in :class:`Entry`; none for what is drawn or filled.
            function: As ``make`` of :class:`Entry`.
        """
        self._entries.append(Entry(tuple(outputs), tuple(sources), function))

    def check(self, sources: Sequence[str], look: Callable[..., None]) -> None:
        """Plan to look at values before anything is written.

        Args:
            sources: As in :class:`Check`.
            look: As in :class:`Check`.
        """
        self._checks.append(Check(tuple(sources), look))

    def note(self, sentence: str) -> None:
        """Plan to tell the user something, once.

        Args:
            sentence: Without a full stop.
        """
        if sentence not in self._notes:
            self._notes.append(sentence)

    def plan(self, decoder: Collection[str] = ()) -> Plan:
        """Return the plan.

        Args:
            decoder: As in :class:`Plan`.

        Raises:
            ValueError: naming what is missing, has another shape, or is left over.
        """
        found = (
            ("is missing", self._missing),
            ("does not fit", self._misshapen),
            ("has no place", sorted(self._left)),
        )
        complaints = [f"{what}: {listed(names)}" for what, names in found if names]
        if complaints:
            raise ValueError(f"{self.where}: {'; '.join(complaints)}")
        place = {name: index for index, name in enumerate(self.headers)}
        entries = sorted(self._entries, key=lambda entry: place.get((*entry.sources, "")[0], -1))
        return Plan(tuple(entries), tuple(self._notes), frozenset(decoder), tuple(self._checks))


def listed(names: Sequence[str]) -> str:
    """Return names in words, the first few where there are many.

    Args:
        names: What to list.
    """
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more
