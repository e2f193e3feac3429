"""Several runs of the demo together: what each gained, and whether the gain stands out."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from collavo.demo.report import ROWS, differences
from collavo.panoptic.json_files import read_object


@dataclass(frozen=True)
class Gain:
    """One difference over several runs, in percentage points.

    Args:
        name: As in ``Margins``, such as ``"b2c_control"``.
        values: One per run.
    """

    name: str
    values: tuple[float, ...]

    @property
    def mean(self) -> float:
        """The mean over the runs."""
        return statistics.fmean(self.values)

    @property
    def deviation(self) -> float:
        """The sample's standard deviation; 0 for a single run."""
        return statistics.stdev(self.values) if len(self.values) > 1 else 0.0

    @property
    def stands_out(self) -> bool:
        """Whether the mean is above two standard deviations."""
        return self.mean > 2 * self.deviation


def read_reports(paths: Iterable[Path]) -> list[dict[str, Any]]:
    """Read ``report.json`` files of the demo.

    Args:
        paths: The files.

    Raises:
        ValueError: if a file is no report of the demo.
    """
    reports = []
    for path in paths:
        report = read_object(path)
        if "cit" not in report.get("measurements", {}):
            raise ValueError(f"{path}: expected a report.json of collavo demo")
        reports.append(report)
    return reports


def accuracies(report: Mapping[str, Any]) -> dict[str, dict[str, float]]:
    """Return a report's accuracies in 0..1, by measurement and kind of question.

    Args:
        report: From :func:`read_reports`.
    """
    return {
        name: {kind: one[kind]["accuracy"] for kind in ("b2c", "c2b")}
        for name, one in report["measurements"].items()
    }


def gains(reports: Sequence[Mapping[str, Any]]) -> list[Gain]:
    """Return what CIT gained in every run over the base, the control and shuffled rows.

    Args:
        reports: Of runs with a control.

    Example:
        >>> base = {"b2c": {"accuracy": 0.5}, "c2b": {"accuracy": 0.5}}
        >>> cit = {"b2c": {"accuracy": 0.75}, "c2b": {"accuracy": 1.0}}
        >>> report = {"measurements": {"base": base, "cit": cit}}
        >>> [(gain.name, gain.mean) for gain in gains([report, report])]
        [('b2c_base', 25.0), ('c2b_base', 50.0)]
    """
    found = [differences(accuracies(report)) for report in reports]
    names = found[0] if found else {}
    return [Gain(name, tuple(one[name] for one in found)) for name in names]


def markdown_table(reports: Sequence[Mapping[str, Any]]) -> str:
    """Return mean and standard deviation of every accuracy over several runs, in %.

    Args:
        reports: From :func:`read_reports`.
    """
    scores = [accuracies(report) for report in reports]
    lines = [
        "| accuracy in %, mean ± standard deviation | which object is in this box | is there any |",
        "|---|---|---|",
    ]
    for name, label in ROWS:
        if all(name in one for one in scores):
            cells = [
                _spread([100.0 * one[name][kind] for one in scores]) for kind in ("b2c", "c2b")
            ]
            words = label.strip().removeprefix("... ")
            lines.append(f"| {f'**{words}**' if name == 'cit' else words} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _spread(values: Sequence[float]) -> str:
    if len(values) == 1:
        return f"{values[0]:.1f}"
    return f"{statistics.fmean(values):.1f} ± {statistics.stdev(values):.1f}"


def gains_in_words(reports: Sequence[Mapping[str, Any]]) -> str:
    """Return what CIT gained over the base, the control and shuffled rows, as a line of text.

    Args:
        reports: Of runs with a control.
    """
    over = {
        "base": "the base",
        "control": "the same steps without crayon",
        "shuffled": "shuffled rows",
    }
    found = {gain.name: gain for gain in gains(reports)}
    parts = []
    for name, words in over.items():
        pair = [found[key] for kind in ("b2c", "c2b") if (key := f"{kind}_{name}") in found]
        both = " / ".join(f"{gain.mean:+.1f} ({gain.deviation:.1f})" for gain in pair)
        if pair:
            parts.append(f"{both} over {words}")
    return "; ".join(parts)
