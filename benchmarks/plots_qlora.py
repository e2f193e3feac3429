"""Plots of ``qlora_linear`` over the number of tokens: times and speed, the roof drawn in."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks import report
from benchmarks.plot_style import COLOURS, MARKERS, TEXT, pyplot, write

RANK = "r64"
MODES = ("fwd", "fwd+bwd")
LEFT_OUT = ("reference", "compile(reference)", "dequantize+lora", "dense+lora")
# What ours is held against, bar by bar.
RATIOS = ("peft", "bitsandbytes", "dense")
SPEEDS = (0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100, 200, 500)
Rows = Sequence[report.Measurement]


def draw(rows: Rows, folder: Path) -> list[Path]:
    """Draw each mode, number of threads and instruction set; return the files written."""
    written: list[Path] = []
    groups: dict[tuple[str, str], list[report.Measurement]] = {}
    for row in rows:
        if row.mode in MODES and row.case.endswith("/" + RANK):
            groups.setdefault((row.mode, row.on), []).append(row)
    for (mode, on), group in groups.items():
        shapes = {shape: _of(group, shape) for shape in dict.fromkeys(map(_shape, group))}
        shapes = {s: part for s, part in shapes.items() if len(set(map(_tokens, part))) > 1}
        if not shapes:
            continue
        written.append(folder / f"qlora_linear_tokens_{report.slug(f'{mode} {on}')}.svg")
        _draw_shapes(shapes, f"qlora_linear, {mode}, {RANK}", written[-1])
    return written


def _shape(row: report.Measurement) -> str:
    return row.case.split("/")[0]


def _tokens(row: report.Measurement) -> int:
    return int(row.case.split("/")[1].removeprefix("m"))


def _of(rows: Rows, shape: str) -> list[report.Measurement]:
    return sorted((row for row in rows if _shape(row) == shape), key=_tokens)


def _best(rows: Rows) -> list[report.Measurement]:
    """Return the fastest row of the whole operator by this package for each number of tokens."""
    best: dict[int, report.Measurement] = {}
    for row in rows:
        if row.provider.startswith("ours:") and row.provider != "ours:int8":
            best[_tokens(row)] = min(best.get(_tokens(row), row), row, key=lambda each: each.p50_ms)
    return list(best.values())


def _draw_shapes(shapes: dict[str, list[report.Measurement]], title: str, path: Path) -> None:
    """Draw a column per shape: times above, speed over the peers below."""
    plt = pyplot()
    size = (max(4.5, 3.4 * len(shapes)), 6.4)
    figure, axes = plt.subplots(2, len(shapes), figsize=size, sharey="row", squeeze=False)
    for (above, below), (shape, rows) in zip(axes.T, shapes.items(), strict=True):
        _latency(above, rows)
        _speed(below, rows)
        above.set_title(shape, fontsize=9, color=TEXT)
    first = next(iter(shapes.values()))[0]
    where = ", ".join(filter(None, (first.device, first.on)))
    figure.suptitle(f"{title}; {where}", x=0.02, ha="left", fontweight="bold", fontsize=9)
    figure.tight_layout()
    for row, height in zip(axes, (0.72, 0.27), strict=True):
        lines: dict[str, Any] = {}
        for each in row:
            handles, labels = each.get_legend_handles_labels()
            lines.update(zip(labels, handles, strict=True))
        place = {"loc": "center left", "bbox_to_anchor": (1.0, height)}
        figure.legend(list(lines.values()), list(lines), **place)
    write(figure, path)


def _latency(axes: Any, rows: Rows) -> None:
    """Medians over tokens, both axes in powers; the roof is a dashed line below them all."""
    names = [name for name in dict.fromkeys(row.provider for row in rows) if name not in LEFT_OUT]
    for index, name in enumerate(sorted(names, key=lambda name: not name.startswith("ours"))):
        mine = [row for row in rows if row.provider == name]
        axes.plot(
            [_tokens(row) for row in mine],
            [row.p50_ms for row in mine],
            marker=MARKERS[index % len(MARKERS)],
            color=COLOURS[index % len(COLOURS)],
            markersize=5,
            linewidth=1,
            label=name,
        )
    roof = [(_tokens(row), row.p50_ms * row.roof) for row in _best(rows) if row.roof]
    if roof:
        axes.plot(*zip(*roof, strict=True), "--", color=TEXT, linewidth=1, label="roof")
    _token_axis(axes, rows)
    axes.set_yscale("log")
    axes.grid(color=TEXT, alpha=0.25, linewidth=0.6)
    if axes.get_subplotspec().is_first_col():
        axes.set_ylabel("median time, ms")


def _token_axis(axes: Any, rows: Rows) -> None:
    counts = sorted(set(map(_tokens, rows)))
    axes.set_xscale("log", base=2)
    axes.set_xticks(counts, [str(count) for count in counts])
    axes.minorticks_off()
    axes.set_xlabel("tokens")


def _speed(axes: Any, rows: Rows) -> None:
    """Peers' medians over ours as bars from 1; a tick where a kernel at the roof would be."""
    ours = _best(rows)
    peers = [peer for peer in RATIOS if any(row.provider == peer for row in rows)]
    width = 0.8 / max(len(peers), 1)
    for index, peer in enumerate(peers):
        theirs = {_tokens(row): row for row in rows if row.provider == peer}
        pairs = [(i, row, theirs.get(_tokens(row))) for i, row in enumerate(ours)]
        bars = [
            (i + (index - (len(peers) - 1) / 2) * width, other.p50_ms / row.p50_ms, row.roof)
            for i, row, other in pairs
            if other is not None
        ]
        places, values = [bar[0] for bar in bars], [bar[1] for bar in bars]
        heights = [value - 1 for value in values]
        colour = COLOURS[RATIOS.index(peer)]
        axes.bar(places, heights, 0.9 * width, 1, color=colour, label=f"speed over {peer}")
        for place, value in zip(places, values, strict=True):
            axes.annotate(
                f"{value:.1f}",
                (place, max(value, 1.0)),
                xytext=(0, 2),
                textcoords="offset points",
                ha="center",
                fontsize=7,
            )
        roofs = [value / roof if roof else value for _, value, roof in bars]
        axes.plot(places, roofs, "_", color=TEXT, markersize=9, label="at the roof")
    axes.axhline(1.0, color=TEXT, linewidth=1)
    axes.set_yscale("log")
    low, high = axes.get_ylim()
    marks = [mark for mark in SPEEDS if low <= mark <= high]
    axes.set_yticks(marks, [f"{mark:g}" for mark in marks])
    axes.minorticks_off()
    axes.set_xticks(range(len(ours)), [str(_tokens(row)) for row in ours])
    axes.set_xlabel("tokens")
    if axes.get_subplotspec().is_first_col():
        axes.set_ylabel("times as fast (1 = equal)")
