"""Several runs of ``collavo demo --llava`` together."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from collavo.demo.llava.report import ROWS, accuracies, differences
from collavo.panoptic.json_files import read_object

_KINDS = {
    "captions": "captions right",
    "presence": "is there any",
    "places": "which object is at the top, or the bottom",
}


def read_reports(paths: Iterable[Path]) -> list[dict[str, Any]]:
    """Read ``report.json`` files of ``collavo demo --llava``.

    Args:
        paths: The files.

    Raises:
        ValueError: if a file is none.
    """
    reports = []
    for path in paths:
        report = read_object(path)
        if "instructed" not in report.get("measurements", {}):
            raise ValueError(f"{path}: expected a report.json of collavo demo --llava")
        reports.append(report)
    return reports


def smallest_gains(reports: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Return the smallest of each difference over the runs, in points, by the margins' names.

    Args:
        reports: From :func:`read_reports`, at least one.
    """
    found = [differences(accuracies(report["measurements"])) for report in reports]
    return {name: min(one[name] for one in found) for name in found[0]}


def markdown_table(reports: Sequence[Mapping[str, Any]]) -> str:
    """Return every share in %, one column a kind, the runs in a cell.

    Args:
        reports: From :func:`read_reports`, at least one.
    """
    scores = [accuracies(report["measurements"]) for report in reports]
    lines = [
        f"| right in %, a number a seed | {' | '.join(_KINDS.values())} |",
        "|---|---|---|---|",
    ]
    for name, label in ROWS:
        cells = [" / ".join(f"{100.0 * one[name][kind]:.1f}" for one in scores) for kind in _KINDS]
        lines.append(f"| {label.strip()} | {' | '.join(cells)} |")
    seconds = " / ".join(f"{report['seconds']['total']:.0f}" for report in reports)
    threads = statistics.mode(report["threads"] for report in reports)
    lines.append(f"| seconds, {threads} threads | {seconds} | | |")
    return "\n".join(lines)


def captions_in_words(reports: Sequence[Mapping[str, Any]]) -> str:
    """Return in a sentence how many captions are right, stage by stage, mean over the runs.

    Args:
        reports: From :func:`read_reports`, at least one.
    """
    scores = [accuracies(report["measurements"]) for report in reports]
    names = ("built", "aligned", "instructed", "crayon left out")
    built, aligned, instructed, off = (
        f"{100.0 * statistics.mean(one[name]['captions'] for one in scores):.0f} %"
        for name in names
    )
    return (
        f"captions of held-out scenes are right in {built} of cases as built, in {aligned} after "
        f"`align`, in {instructed} after `instruct` with the crayon, and in {off} where the same "
        f"model goes without (means of {len(scores)} seeds)"
    )
