"""What the times of this tree and of another commit, taken in turns, say about each other."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from benchmarks import report, timing
from benchmarks.registry import Row

# In front of the provider's name in rows of the other commit.
BASE = "base:"
HEADERS = ("case", "mode", "dtype", "provider", "here", "p20-p80", "base", "p20-p80")
HEADERS_END = ("here / base", "p20-p80 of turns")


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
    def ratio(self) -> float:
        """The median here over the median of the base: below 1 is faster."""
        return statistics.median(pooled(self.here)) / statistics.median(pooled(self.base))

    @property
    def spread(self) -> tuple[float, float]:
        """The 20th and the 80th percentile of the turns' own ratios.

        A turn here and the base's beside it have seen the same machine. Where the two lie on
        either side of 1 the turns do not agree on who is faster.
        """
        pairs = zip(self.here, self.base, strict=True)
        ratios = [statistics.median(here) / statistics.median(base) for here, base in pairs]
        low, _, high = timing.percentiles(ratios)
        return low, high


def pooled(turns: Sequence[Sequence[float]]) -> list[float]:
    """Return the times of all turns."""
    return list(itertools.chain.from_iterable(turns))


def table(pairs: Sequence[Pair]) -> str:
    """Lay the pairs of one benchmark out as a table."""
    return report.aligned([[*HEADERS, *HEADERS_END], *map(_cells, pairs)])


def _cells(pair: Pair) -> list[str]:
    row, (low, high) = pair.row, pair.spread
    sides = [cell for side in (pair.here, pair.base) for cell in _times(pooled(side))]
    dtype = pair.dtype.removeprefix("torch.")
    ratio = f"{pair.ratio:.3f}"
    return [row.case, row.mode, dtype, row.provider, *sides, ratio, f"{low:.3f} - {high:.3f}"]


def _times(seconds: list[float]) -> tuple[str, str]:
    low, middle, high = (report.format_time(each * 1e3) for each in timing.percentiles(seconds))
    return middle, f"{low} - {high}"
