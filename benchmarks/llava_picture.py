"""The README's picture of ``collavo demo --llava``: what a LLaVA gets right, stage by stage."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path

from benchmarks.plot_style import COLOURS, pyplot, write
from collavo.demo.llava.report import accuracies
from collavo.demo.llava.seeds import read_reports

INK, PAPER, SOFT = "#1c1c1c", "#ffffff", "#5f5f5f"
KINDS = {
    "captions": "captions: every class named, no other",
    "presence": "is there any ...? (half are yes)",
    "places": "which object is at the top, at the bottom?",
}
BARS = {
    "built": ("as built", COLOURS[7]),
    "aligned": ("after align", COLOURS[4]),
    "instructed": ("after instruct, with the crayon", COLOURS[0]),
    "crayon shuffled": ("same model, crayon rows shuffled", COLOURS[1]),
    "crayon left out": ("same model, crayon left out", COLOURS[3]),
}


def draw(paths: Sequence[Path], path: Path) -> None:
    """Draw the mean over runs as bars, each run as a dot.

    Args:
        paths: Reports of ``collavo demo --llava``, at least one.
        path: Where the SVG goes.

    Raises:
        ValueError: if a report is none.
    """
    runs = [accuracies(report["measurements"]) for report in read_reports(paths)]
    plt = pyplot()
    figure = plt.figure(figsize=(9, 3.1), facecolor=PAPER)
    axes = figure.add_axes((0.06, 0.2, 0.93, 0.62), facecolor=PAPER)
    width = 0.8 / len(BARS)
    for place, (name, (label, colour)) in enumerate(BARS.items()):
        for group, kind in enumerate(KINDS):
            values = [100.0 * run[name][kind] for run in runs]
            x, mean = group + (place - (len(BARS) - 1) / 2) * width, statistics.mean(values)
            shown = label if group == 0 else None
            axes.bar(x, mean, 0.9 * width, color=colour, label=shown)
            axes.plot([x] * len(values), values, ".", color=INK, markersize=3)
            axes.annotate(
                f"{mean:.0f}", (x, max(mean, *values)), xytext=(0, 3), ha="center", color=INK,
                textcoords="offset points", fontsize=9,
            )  # fmt: skip
    axes.set_xticks(range(len(KINDS)), list(KINDS.values()), color=INK)
    axes.set_yticks((0, 50, 100), ("0 %", "50 %", "100 %"), color=SOFT)
    axes.set_ylim(0, 105)
    axes.tick_params(length=0)
    figure.legend(ncols=3, loc="upper left", bbox_to_anchor=(0.05, 1.0), labelcolor=INK)
    words = f"Right answers about held-out scenes; means of {len(runs)} seeds, each seed a dot."
    figure.text(0.06, 0.02, words, color=SOFT)
    write(figure, path, transparent=False)
