"""What a run measured: one row per measurement, printed as a table and kept as CSV and markdown."""

from __future__ import annotations

import argparse
import csv
import json
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path

RESULTS = Path(__file__).parent / "results"
HEADERS = (
    "case",
    "mode",
    "dtype",
    "on",
    "provider",
    "median",
    "p20-p80",
    "GB/s",
    "GFLOP/s",
    "roof",
)
HEADERS_END = ("error", "peak MB")
HEADER_GPU = "by the host's clock"
# What a row says in place of its device where a stand-in took a GPU's place.
DRY_RUN = "dry run: nothing was measured"


@dataclass(frozen=True)
class Measurement:
    """One measured call; also the columns of the CSV files, in order.

    Times are milliseconds, rates are per second in units of 1e9, ``roof`` is the least time
    possible on this machine (measured in the same run) over the median, ``error`` is relative to
    float64, ``peak_mb`` is what the call allocated beyond its inputs in 1e6 bytes, ``isa`` is the
    instruction set of a CPU run (avx512, avx2). On a GPU the times are the device's, by a CUDA
    graph or by events as ``timed`` says, and ``wall_ms`` is the host's time per call without a
    graph. An empty field was not measured.
    """

    op: str
    provider: str
    mode: str
    case: str
    dtype: str
    p20_ms: float
    p50_ms: float
    p80_ms: float
    gb_per_s: float | None
    gflop_per_s: float | None
    roof: float | None
    peak_mb: float | None
    error: float | None
    config_json: str
    device: str
    threads: int
    isa: str
    torch: str
    triton: str
    commit: str
    date: str
    wall_ms: float | None = None
    timed: str = ""

    @property
    def key(self) -> tuple[str, ...]:
        """What a later run of the same measurement replaces."""
        facts = {"threads": self.threads, "isa": self.isa}
        return key(self.case, self.mode, self.dtype, self.provider, facts)

    @property
    def on(self) -> str:
        """Threads and instruction set in words; empty for a GPU."""
        return f"{self.threads} x {self.isa}" if self.isa else ""


def key(
    case: str, mode: str, dtype: str, provider: str, facts: Mapping[str, object]
) -> tuple[str, ...]:
    """Return what tells one measurement of an operator on one device from another."""
    threads = str(facts["threads"]) if facts["isa"] else ""  # of no meaning on a GPU
    return (case, mode, dtype, str(facts["isa"]), threads, provider)


COLUMNS = tuple(field.name for field in fields(Measurement))
# Columns that files of earlier runs lack.
LATER_COLUMNS = ("wall_ms", "timed")


def format_time(milliseconds: float) -> str:
    """Return the time with the unit that reads best: us, ms or s."""
    if milliseconds < 1:
        return f"{milliseconds * 1e3:.3g} us"
    return f"{milliseconds:.4g} ms" if milliseconds < 1e4 else f"{milliseconds / 1e3:.4g} s"


def short_time(milliseconds: float) -> str:
    """Return three digits in ms, or in s from one second on: for pages that people read."""
    if milliseconds < 999.5:
        return f"{milliseconds:.3g} ms"
    return f"{milliseconds / 1e3:.3g} s"


def _cells(row: Measurement) -> list[str]:
    def number(value: float | None, pattern: str) -> str:
        return "" if value is None else format(value, pattern)

    return [
        row.case,
        row.mode,
        row.dtype,
        row.on,
        row.provider,
        format_time(row.p50_ms),
        f"{format_time(row.p20_ms)} - {format_time(row.p80_ms)}",
        number(row.gb_per_s, ".4g"),
        number(row.gflop_per_s, ".4g"),
        number(row.roof, ".0%"),
        number(row.error, ".1e"),
        number(row.peak_mb, ".4g"),
    ]


def markdown_table(rows: Sequence[Measurement]) -> str:
    """Lay the rows out as a table for page and terminal: by case, the fastest provider first.

    Rows of a GPU have a last column more: the host's time per call without a graph.
    """
    order = list(dict.fromkeys(row.key[:-1] for row in rows))
    ranked = sorted(rows, key=lambda row: (order.index(row.key[:-1]), row.p50_ms))
    lines: list[list[str]] = [[*HEADERS, *HEADERS_END], *(_cells(row) for row in ranked)]
    if any(row.wall_ms is not None for row in rows):
        walls = ("" if row.wall_ms is None else format_time(row.wall_ms) for row in ranked)
        lines = [[*line, end] for line, end in zip(lines, (HEADER_GPU, *walls), strict=True)]
    return aligned(lines)


def aligned(lines: Sequence[Sequence[str]]) -> str:
    """Return lines of cells as a markdown table whose columns stand below each other."""
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]

    def join(cells: Iterable[str]) -> str:
        return "| " + " | ".join(f"{c:<{w}}" for c, w in zip(cells, widths, strict=True)) + " |"

    rule = "|" + "|".join("-" * (width + 2) for width in widths) + "|"
    return "\n".join([join(lines[0]), rule, *(join(line) for line in lines[1:])])


def read_csv(path: Path) -> list[Measurement]:
    """Read a result file written by :func:`save`; raises ``ValueError`` on other columns."""
    with path.open(newline="") as stream:
        reader = csv.DictReader(stream)
        found = tuple(reader.fieldnames or ())
        if found not in (COLUMNS, COLUMNS[: -len(LATER_COLUMNS)]):
            raise ValueError(f"{path}: expected the columns {', '.join(COLUMNS)}")
        return [_parse(row) for row in reader]


def by_device(root: Path = RESULTS) -> dict[str, dict[str, list[Measurement]]]:
    """Read all kept results: rows by operator, by the device's folder."""
    found = {}
    for folder in sorted(path for path in root.glob("*") if path.is_dir()):
        groups = {path.stem: read_csv(path) for path in sorted(folder.glob("*.csv"))}
        found[folder.name] = {op: rows for op, rows in groups.items() if rows}
    return found


def _parse(row: Mapping[str, str]) -> Measurement:
    values: dict[str, object] = dict(row)
    for name in ("p20_ms", "p50_ms", "p80_ms"):
        values[name] = float(row[name])
    for name in ("gb_per_s", "gflop_per_s", "roof", "peak_mb", "error", "wall_ms"):
        values[name] = float(row[name]) if row.get(name) else None
    values["threads"] = int(row["threads"])
    return Measurement(**values)  # type: ignore[arg-type]


def save(rows: Sequence[Measurement], root: Path = RESULTS) -> list[Path]:
    """Merge rows into ``<root>/<device>/<op>.csv`` and write ``<op>.md`` beside each.

    A row replaces an older one of the same case, mode, dtype, provider, instruction set and number
    of threads.
    """
    written: list[Path] = []
    groups: dict[tuple[str, str], list[Measurement]] = {}
    for row in rows:
        groups.setdefault((row.device, row.op), []).append(row)
    for (device, op), fresh in groups.items():
        folder = root / slug(device)
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"{op}.csv"
        merged = {row.key: row for row in (read_csv(path) if path.exists() else [])}
        merged.update({row.key: row for row in fresh})
        ordered = list(merged.values())
        _write_csv(path, ordered)
        title = f"# {op} on {device}\n\n"
        _replace(path.with_suffix(".md"), title + markdown_table(ordered) + "\n")
        written.append(path)
    return written


def slug(name: str) -> str:
    """Return the name as a folder name: lower case, words joined by hyphens."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-") or "unknown"


def append_jsonl(path: Path, row: Measurement) -> None:
    """Add a row to a file of one JSON object per line, at once: a run that is killed keeps it."""
    with path.open("a") as stream:
        stream.write(json.dumps(asdict(row)) + "\n")


def read_jsonl(path: Path) -> list[Measurement]:
    """Read a file of :func:`append_jsonl`; a last line that was cut off is left out."""
    rows = []
    for line in path.read_text().splitlines(keepends=True):
        if line.endswith("\n"):
            rows.append(Measurement(**json.loads(line)))
    return rows


def _write_csv(path: Path, rows: Sequence[Measurement]) -> None:
    temporary = path.with_suffix(".csv.tmp")
    with temporary.open("w", newline="") as stream:
        writer = csv.DictWriter(stream, COLUMNS, lineterminator="\n")
        writer.writeheader()
        for row in rows:
            values = asdict(row)
            for name, value in values.items():
                if isinstance(value, float):
                    values[name] = f"{value:.5g}"
            writer.writerow(values)
    os.replace(temporary, path)


def _replace(path: Path, text: str) -> None:
    temporary = path.with_suffix(path.suffix + ".tmp")
    temporary.write_text(text)
    os.replace(temporary, path)


def config_json(config: Mapping[str, object] | None) -> str:
    """Return the configuration as one compact, sorted JSON object."""
    return json.dumps(dict(config or {}), sort_keys=True, separators=(",", ":"), default=str)


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the rows of a file of :func:`append_jsonl` as tables; ``--save`` keeps them."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.report", description=main.__doc__)
    parser.add_argument("rows", type=Path, help="a file that pytest --rows has written")
    parser.add_argument("--save", action="store_true", help="merge them into results/<device>/")
    given = parser.parse_args(arguments)
    # A benchmark in turns writes a row after each: the last one pools them.
    rows = {(row.op, row.key): row for row in read_jsonl(given.rows)}
    for op in dict.fromkeys(op for op, _ in rows):
        mine = [row for row in rows.values() if row.op == op]
        print(f"# {op} on {mine[0].device}\n\n{markdown_table(mine)}\n")
    if given.save:
        if any(row.device == DRY_RUN for row in rows.values()):
            parser.error(f"--save: {given.rows} is of a dry run")
        save(list(rows.values()))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
