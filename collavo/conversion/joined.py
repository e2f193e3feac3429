"""Several sources as one: each tensor's name has its source's key before it."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from collavo.conversion.plan import Header, Plan
from collavo.conversion.stream import Weights

_BETWEEN = "/"


class JoinedWeights:
    """The tensors of several sources, named ``key/name``.

    Args:
        sources: By their keys.
    """

    def __init__(self, sources: Mapping[str, Weights]) -> None:
        self._sources = dict(sources)
        self.headers: Mapping[str, Header] = {
            f"{key}{_BETWEEN}{name}": header
            for key, weights in sources.items()
            for name, header in weights.headers.items()
        }
        self.largest = max(weights.largest for weights in sources.values())

    def read(self, name: str) -> Tensor:
        """Read one tensor.

        Args:
            name: Its name, the key included.
        """
        key, _, own = name.partition(_BETWEEN)
        return self._sources[key].read(own)


class RenamedWeights:
    """Some of a source's tensors, under other names.

    Args:
        weights: The source.
        names: Each tensor's name in it, by the new one.
    """

    def __init__(self, weights: Weights, names: Mapping[str, str]) -> None:
        self._weights, self._names = weights, dict(names)
        self.headers: Mapping[str, Header] = {
            new: weights.headers[old] for new, old in names.items()
        }
        self.largest = weights.largest

    def read(self, name: str) -> Tensor:
        """Read one tensor.

        Args:
            name: Its new name.
        """
        return self._weights.read(self._names[name])


def joined_plans(plans: Mapping[str, Plan]) -> Plan:
    """Return one plan over :class:`JoinedWeights` of plans that each have a source of their own.

    Args:
        plans: By the keys of their sources; what they write comes in their order.
    """

    def named(key: str, sources: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(f"{key}{_BETWEEN}{name}" for name in sources)

    parts = plans.items()
    return Plan(
        tuple(
            entry._replace(sources=named(key, entry.sources))
            for key, plan in parts
            for entry in plan.entries
        ),
        tuple(note for plan in plans.values() for note in plan.notes),
        frozenset(name for plan in plans.values() for name in plan.decoder),
        tuple(
            check._replace(sources=named(key, check.sources))
            for key, plan in parts
            for check in plan.checks
        ),
    )
