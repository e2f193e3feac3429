"""Draw the kept results as SVG: a plot per operator and device, and the README's picture.

``python -m benchmarks.plots`` reads ``results/<device>/<op>.csv`` and writes
``plots/<device>/<op>.svg`` (one per mode, where one would be too long), what ``plots_qlora`` draws
beside it, and ``plots/<device>/headline.svg`` and ``llava_stages.svg``, where there are rows for
them. The colours are told
apart by colour-blind readers; backgrounds are transparent and text is grey, for light and dark
pages, but in the headline, which is dark on white.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks import headline, llava_picture, plots_qlora, report
from benchmarks.plot_style import COLOURS, MARKERS, TEXT, pyplot, write

PLOTS = Path(__file__).parent / "plots"
# Longer plots are split.
MOST_LINES = 30


def label(row: report.Measurement) -> str:
    """Name a line of the plot: case, mode, dtype, and on a CPU threads and instruction set."""
    return ", ".join(filter(None, (row.case, row.mode, row.dtype, row.on)))


def providers(rows: Sequence[report.Measurement]) -> list[str]:
    """List the providers, ours first, else in the order of the file."""
    names = list(dict.fromkeys(row.provider for row in rows))
    return sorted(names, key=lambda name: not name.startswith("ours"))


def sheets(rows: Sequence[report.Measurement]) -> dict[str, list[report.Measurement]]:
    """Split an operator's rows into plots of a readable length, by the end of their file's name."""
    if len(set(map(label, rows))) <= MOST_LINES:
        return {"": list(rows)}
    parts: dict[str, list[report.Measurement]] = {}
    for row in rows:
        parts.setdefault("_" + report.slug(f"{row.mode} {row.on}"), []).append(row)
    return parts


def draw_operator(rows: Sequence[report.Measurement], path: Path) -> None:
    """Draw the medians of one operator on one device, the roof as a tick on each line."""
    plt = pyplot()
    lines = list(dict.fromkeys(map(label, rows)))
    figure, axes = plt.subplots(figsize=(8, 1.4 + 0.32 * len(lines)))
    for index, name in enumerate(providers(rows)):
        mine = [row for row in rows if row.provider == name]
        axes.errorbar(
            [row.p50_ms for row in mine],
            [lines.index(label(row)) for row in mine],
            xerr=[
                [row.p50_ms - row.p20_ms for row in mine],
                [row.p80_ms - row.p50_ms for row in mine],
            ],
            fmt=MARKERS[index % len(MARKERS)],
            color=COLOURS[index % len(COLOURS)],
            fillstyle="full" if index < len(COLOURS) else "none",
            markersize=6,
            elinewidth=1,
            label=name,
        )
    roofs = {lines.index(label(row)): row.p50_ms * row.roof for row in rows if row.roof}
    if roofs:
        axes.plot(
            list(roofs.values()),
            list(roofs),
            "|",
            color=TEXT,
            markersize=14,
            label="roof",
            zorder=0,
        )
    axes.set_yticks(range(len(lines)), lines)
    axes.set_ylim(len(lines) - 0.5, -0.5)
    axes.set_xscale("log")
    axes.grid(axis="x", color=TEXT, alpha=0.25, linewidth=0.6)
    axes.set_xlabel(f"median time, ms (p20 to p80 as a line; left is faster), {rows[0].device}")
    axes.set_title(rows[0].op, loc="left", fontweight="bold")
    axes.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0))
    write(figure, path)


def draw_all(results: Path = report.RESULTS, plots: Path = PLOTS) -> list[Path]:
    """Draw every kept result and return the files written."""
    written: list[Path] = []
    for device, groups in report.by_device(results).items():
        for op, rows in groups.items():
            for end, part in sheets(rows).items():
                written.append(plots / device / f"{op}{end}.svg")
                draw_operator(part, written[-1])
            if op == "qlora_linear":
                written += plots_qlora.draw(rows, plots / device)
        picture = plots / device / "headline.svg"
        if headline.draw(groups, picture):
            written.append(picture)
        runs = sorted((results / device).glob("llava_seed*.json"))
        if runs:
            written.append(plots / device / "llava_stages.svg")
            llava_picture.draw(runs, written[-1])
    return written


def main() -> int:
    """Draw everything; the exit status is 1 where no results are kept."""
    written = draw_all()
    for path in written:
        print(path)
    if not written:
        print(f"no results under {report.RESULTS}; run pytest with --save-results", file=sys.stderr)
    return 0 if written else 1


if __name__ == "__main__":
    raise SystemExit(main())
