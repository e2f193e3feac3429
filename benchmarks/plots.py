"""Draw the kept results as SVG: one plot per operator and device, and one overview per device.

``python -m benchmarks.plots`` reads ``results/<device>/<op>.csv`` and writes
``plots/<device>/<op>.svg`` (one per mode, where one would be too long), what ``plots_qlora`` draws
beside it, and ``plots/<device>/overview.svg``. The colours are told apart by
colour-blind readers; the background is transparent and the text grey, for light and dark pages.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks import plots_qlora, report
from benchmarks.plot_style import COLOURS, MARKERS, TEXT, pyplot, write
from benchmarks.qlora_problem import BASE_ONLY

PLOTS = Path(__file__).parent / "plots"
# They do other work (no crayon and RoPE, no adapters, a weight of 16 bits, decoding and no more):
# the operator's own plot and table show them, a speed over them would compare different things.
OTHER_WORK = (
    "sdpa-alone",
    "ours-alone",
    "dense+lora",
    "pillow-alone",
    "decoding-alone",
    *BASE_ONLY,
)
# Longer plots are split; of a mode this many lines stand in the overview.
MOST_LINES, OVERVIEW_LINES = 30, 6


def is_ours(provider: str) -> bool:
    """Whether the provider is this package's whole operator (``ours``, ``ours:cpu``, ...)."""
    return provider.split(":")[0] == "ours" and provider not in OTHER_WORK


def is_peer(provider: str) -> bool:
    """Whether the provider is another way to do the operator's whole work."""
    ours = provider.startswith("ours") or "reference" in provider
    return not ours and provider not in OTHER_WORK and provider.split(":")[0] not in OTHER_WORK


def label(row: report.Measurement) -> str:
    """Name a line of the plot: case, mode, dtype, and on a CPU threads and instruction set."""
    return ", ".join(filter(None, (row.case, row.mode, row.dtype, row.on)))


def providers(rows: Sequence[report.Measurement]) -> list[str]:
    """List the providers, ours first, else in the order of the file."""
    names = list(dict.fromkeys(row.provider for row in rows))
    return sorted(names, key=lambda name: not name.startswith("ours"))


def speedups(rows: Sequence[report.Measurement]) -> dict[str, float]:
    """Return, by line, the best peer's median over our best; lines without both drop."""
    result: dict[str, float] = {}
    for name in dict.fromkeys(map(label, rows)):
        line = [row for row in rows if label(row) == name]
        ours = [row.p50_ms for row in line if is_ours(row.provider)]
        others = [row.p50_ms for row in line if is_peer(row.provider)]
        if ours and others:
            result[name] = min(others) / min(ours)
    return result


def sheets(rows: Sequence[report.Measurement]) -> dict[str, list[report.Measurement]]:
    """Split an operator's rows into plots of a readable length, by the end of their file's name."""
    if len(set(map(label, rows))) <= MOST_LINES:
        return {"": list(rows)}
    parts: dict[str, list[report.Measurement]] = {}
    for row in rows:
        parts.setdefault("_" + report.slug(f"{row.mode} {row.on}"), []).append(row)
    return parts


def overview_lines(rows: Sequence[report.Measurement]) -> dict[str, float]:
    """Return the first speedups of each mode, threads and instruction set."""
    chosen: dict[str, float] = {}
    for part in {(row.mode, row.on): None for row in rows}:
        found = speedups([row for row in rows if (row.mode, row.on) == part])
        chosen.update(list(found.items())[:OVERVIEW_LINES])
    return chosen


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


def draw_overview(groups: dict[str, list[report.Measurement]], path: Path) -> bool:
    """Draw the speed of the best of ours over the best peer's; False if nothing to draw."""
    bars = [
        (op, name, value)
        for op, rows in groups.items()
        for name, value in overview_lines(rows).items()
    ]
    if not bars:
        return False
    plt = pyplot()
    figure, axes = plt.subplots(figsize=(8, 1.2 + 0.28 * len(bars)))
    operators = list(dict.fromkeys(op for op, _, _ in bars))
    for index, (op, _, value) in enumerate(bars):
        axes.barh(
            index, value - 1, left=1, color=COLOURS[operators.index(op) % len(COLOURS)], height=0.7
        )
        axes.annotate(
            f"{value:.2f}x",
            (max(value, 1.0), index),
            xytext=(4, 0),
            textcoords="offset points",
            va="center",
        )
    axes.axvline(1.0, color=TEXT, linewidth=1)
    axes.set_xscale("log")
    axes.set_xlim(right=2 * max(1.0, *(value for _, _, value in bars)))
    axes.set_yticks(range(len(bars)), [f"{op}: {name}" for op, name, _ in bars])
    axes.set_ylim(len(bars) - 0.5, -0.5)
    device = next(iter(groups.values()))[0].device
    axes.set_xlabel(f"speed over the best peer that does the same work (1 = equal), {device}")
    write(figure, path)
    return True


def draw_all(results: Path = report.RESULTS, plots: Path = PLOTS) -> list[Path]:
    """Draw every kept result and return the files written."""
    written: list[Path] = []
    for folder in sorted(path for path in results.glob("*") if path.is_dir()):
        groups = {path.stem: report.read_csv(path) for path in sorted(folder.glob("*.csv"))}
        groups = {op: rows for op, rows in groups.items() if rows}
        for op, rows in groups.items():
            for end, part in sheets(rows).items():
                written.append(plots / folder.name / f"{op}{end}.svg")
                draw_operator(part, written[-1])
            if op == "qlora_linear":
                written += plots_qlora.draw(rows, plots / folder.name)
        overview = plots / folder.name / "overview.svg"
        if groups and draw_overview(groups, overview):
            written.append(overview)
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
