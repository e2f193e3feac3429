"""What the times of this tree and of another commit, taken in turns, say about each other."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

from benchmarks import report, timing
from benchmarks.registry import Row

# In front of the provider's name in rows of the other commit.
BASE = "base:"
HEADERS = ("case", "mode", "dtype", "provider", "here", "p20-p80", "base", "p20-p80")
HEADERS_END = ("here / base", "p20-p80")


@dataclass(frozen=True)
class Pair:
    """One row's times here and at the base.

    Attributes:
        row: What was measured.
        dtype: In what dtype.
        here: Seconds of this tree, a list for each turn.
        base: Seconds of the base, a list for each turn.
    """

    row: Row
    dtype: str
    here: list[list[float]]
    base: list[list[float]]

    @property
    def ratios(self) -> tuple[float, float, float]:
        """The 20th, 50th and 80th percentile of the turns' ratios here / base: below 1 is faster.

        A ratio is of the medians of a turn here and of the base's turn beside it, which have seen
        the same machine. Where 1 lies between the first and the last the turns do not agree.
        """
        pairs = zip(self.here, self.base, strict=True)
        return timing.percentiles([median(here) / median(base) for here, base in pairs])


def pooled(turns: Sequence[Sequence[float]]) -> list[float]:
    """Return the times of all turns."""
    return list(itertools.chain.from_iterable(turns))


def table(pairs: Sequence[Pair]) -> str:
    """Lay the pairs of one benchmark out as a table."""
    return report.aligned([[*HEADERS, *HEADERS_END], *map(_cells, pairs)])


def _cells(pair: Pair) -> list[str]:
    row, (low, middle, high) = pair.row, pair.ratios
    sides = [cell for side in (pair.here, pair.base) for cell in _times(pooled(side))]
    ratios = [f"{middle:.3f}", f"{low:.3f} - {high:.3f}"]
    return [row.case, row.mode, pair.dtype, row.provider, *sides, *ratios]


def _times(seconds: list[float]) -> tuple[str, str]:
    low, middle, high = (report.format_time(each * 1e3) for each in timing.percentiles(seconds))
    return middle, f"{low} - {high}"
