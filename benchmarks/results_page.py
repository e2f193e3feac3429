"""Write ``RESULTS.md`` from the kept results: ``python -m benchmarks.results_page``.

Every number of the page is one of a row of ``results/<device>/<op>.csv``, or the quotient of two,
or comes from a run of the demo that is kept beside them. A sentence that compares is worked out
like the tables, and left out where its rows are absent.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from benchmarks import headline, report
from benchmarks.ops.qlora_linear_cases import FLOAT32_ADAPTERS
from benchmarks.results_tables import OURS, TABLES, Rows, Table, fastest
from collavo.demo import seeds
from collavo.demo.llava import seeds as llava_seeds
from collavo.demo.report import ROWS

PAGE = Path(__file__).parent / "RESULTS.md"
INTRODUCTION = """\
# Results

Written by `python -m benchmarks.results_page` from the [results kept here](results), where every
row has its percentiles, its error against float64, its peak memory, its commit and its date. What
the benchmarks do is in their [README](README.md). Times are medians; the *roof* is the least time
by the read bandwidth and the matmul peak measured in the same run.
"""
DEMO = """\
`collavo demo`, questions about held-out scenes: which object is in a box (B2C), and whether there
is any object of a class (C2B, as many wrong as right). Runs without another name took the best
instruction set and one thread; those with ablations took longer. Scores differ with the
instruction set and the threads by how torch's own products round, which train the base.
"""
LLAVA = """\
`collavo demo --llava`: a LLaVA built of a tiny language model and a tiny vision tower learns to
describe drawn scenes (`align`, the projector alone) and to answer (`instruct`, projector, adapter
over 4 bits and crayon). Captions are right if they name all classes of a scene and no other.
"""
SEED = re.compile(r"demo_seed\d")
NAMES = {"avx512": "AVX-512", "avx2": "AVX2"}


def setting(row: report.Measurement) -> str:
    """Say in words on how many threads and with what instruction set a row was measured."""
    if not row.isa:
        return "GPU"
    threads = "One thread" if row.threads == 1 else f"{row.threads} threads"
    return f"{threads}, {NAMES.get(row.isa, row.isa)}"


def page(results: Path = report.RESULTS) -> str:
    """Return the whole page."""
    parts = [INTRODUCTION]
    for device, groups in report.by_device(results).items():
        demos = sorted((results / device).glob("demo*.json"))
        rows = next(iter(groups.values()), [])
        parts.append(f"## {rows[0].device if rows else device}\n")
        if len(headline.bars(groups)) >= headline.LEAST:
            parts.append(f"![Speed over what is replaced](plots/{device}/headline.svg)\n")
        for table in TABLES:
            if table.op in groups:
                parts += _section(device, table, groups[table.op])
        if demos:
            parts += _demo(device, demos)
        runs = sorted((results / device).glob("llava_seed*.json"))
        if runs:
            parts += _llava(device, runs)
    return "\n".join(parts)


def _section(device: str, table: Table, rows: Rows) -> Iterator[str]:
    """Yield an operator's heading, its tables, and what has to be said with them."""
    dates = sorted({row.date for row in rows})
    when = dates[0] if len(dates) == 1 else f"{dates[0]} to {dates[-1]}"
    op, place = table.op, f"results/{device}/{table.op}"
    yield f"### {op}\n\n{table.about} [CSV]({place}.csv), [every row]({place}.md), {when}.\n"
    for on in dict.fromkeys(row.on for row in rows):
        here = [row for row in rows if row.on == on]
        body = table.markdown(here)
        if body:
            yield f"{setting(here[0])}:\n\n{body}\n"
            if op in NOTES:
                yield from (f"{note}\n" for note in NOTES[op](here))


def _layer_notes(rows: Rows) -> Iterator[str]:
    """Yield where the layer does not win, and what its options cost."""

    def time(m: int, provider: str, rank: int = 64) -> float | None:
        row = fastest(rows, f"4096x4096/m{m}/r{rank}", "fwd", provider)
        return None if row is None else row.p50_ms

    ours, base = time(1, OURS), time(1, "bitsandbytes")
    if ours and base and ours >= base:
        yield (
            f"With one token we do not beat bitsandbytes' base alone: {report.short_time(ours)} "
            f"with both adapters (bfloat16), {report.short_time(base)} without any."
        )
    wide, narrow = time(1, OURS + FLOAT32_ADAPTERS), ours
    if wide and narrow:
        yield f"Float32 adapters take {wide / narrow:.2f}x the time of bfloat16 ones at one token."
    by_host = [fastest(rows, "4096x4096/m1/r64", "fwd", each) for each in (OURS, "peft")]
    if by_host[0] and by_host[1] and by_host[0].wall_ms and by_host[1].wall_ms:
        mine, theirs = (report.short_time(row.wall_ms) for row in by_host)  # type: ignore[union-attr]
        yield (
            "The table has the device's times, of calls in a CUDA graph. Without a graph the host "
            f"is the slower: {mine} for a call of ours with one token, {theirs} for PEFT's."
        )
    eight = [(m, found) for m in (1, 4, 16) if (found := time(m, "ours:int8"))]
    if eight:
        times = ", ".join(f"{report.short_time(found)} at {m}" for m, found in eight)
        yield f"8-bit activations, asked for by name, bring the base alone to (tokens): {times}."
    configs = [json.loads(row.config_json) for row in rows if row.provider == "bitsandbytes"]
    if rows[0].isa and configs and not any(config.get("hub_kernel") for config in configs):
        yield (
            "bitsandbytes, here and under PEFT, is without the CPU kernel that it loads from the "
            "Hugging Face hub where the package `kernels` is installed."
        )


def _map_notes(rows: Rows) -> Iterator[str]:
    """Yield what a single map costs warm and cold."""
    case = "480x640/s15/b1"
    warm, cold = (fastest(rows, case, mode, OURS) for mode in ("majority", "majority-cold"))
    if warm and cold:
        yield (
            f"One map takes {report.short_time(warm.p50_ms)} back to back and "
            f"{report.short_time(cold.p50_ms)} between other work."
        )


def _stage_notes(rows: Rows) -> Iterator[str]:
    """Yield tokens per second, and the memory of a step with its model."""
    for row in rows:
        config = json.loads(row.config_json)
        rate = config["tokens"] / row.p50_ms * 1e3
        memory = f", {config['model_mb'] + row.peak_mb:.0f} MB" if row.peak_mb is not None else ""
        yield f"- {row.mode}, {row.case}, {row.provider}: {rate:.0f} tokens a second{memory}"


def _order_notes(rows: Rows) -> Iterator[str]:
    """Yield tokens per second, and how many are padding."""
    for row in rows:
        config = json.loads(row.config_json)
        rate = config["tokens"] / row.p50_ms * 1e3
        yield (
            f"- {row.case}, {row.provider}: {rate:.0f} tokens a second that are no padding; of all "
            f"{config['padded']:.0%} are"
        )


NOTES: dict[str, Callable[[Rows], Iterator[str]]] = {
    "qlora_linear": _layer_notes,
    "panoptic_lookup": _map_notes,
    "llava_training": _stage_notes,
    "llava_order": _order_notes,
}


def _demo(device: str, paths: Sequence[Path]) -> Iterator[str]:
    """Yield the demo's tables: over the seeds, and a column per run."""
    reports = dict(zip(paths, seeds.read_reports(paths), strict=True))
    plain = [report for path, report in reports.items() if SEED.fullmatch(path.stem)]
    yield f"### The demo\n\n{DEMO}\n"
    if len(plain) > 1:
        yield f"{len(plain)} seeds:\n\n{seeds.markdown_table(plain)}\n"
        yield (
            "Gained by CIT in points, box to class / class to yes or no, with the standard "
            f"deviation over the seeds: {seeds.gains_in_words(plain)}.\n"
        )
    heads = [path.stem.removeprefix("demo_").replace("_", " ") for path in paths]
    links = [f"[{head}](results/{device}/{p.name})" for head, p in zip(heads, paths, strict=True)]
    lines = [["each run", *links], ["---"] * (1 + len(paths))]
    for name, label in ROWS:
        cells = [_accuracy(report["measurements"].get(name)) for report in reports.values()]
        if any(cells):
            lines.append([label.strip().removeprefix("... "), *cells])
    lines.append(["seconds, threads", *(_effort(report) for report in reports.values())])
    yield "\n".join(f"| {' | '.join(cells)} |" for cells in lines)
    yield ""


def _llava(device: str, paths: Sequence[Path]) -> Iterator[str]:
    """Yield the table of the runs of LLaVA's two stages."""
    links = ", ".join(f"[{path.stem}](results/{device}/{path.name})" for path in paths)
    table = llava_seeds.markdown_table(llava_seeds.read_reports(paths))
    yield f"### LLaVA's two stages\n\n{LLAVA}\n{table}\n\nEach run: {links}.\n"


def _accuracy(measured: dict[str, Any] | None) -> str:
    """Return both kinds of question's accuracy; nothing where a run has not asked them."""
    if measured is None:
        return ""
    return " / ".join(f"{100 * measured[kind]['accuracy']:.1f}" for kind in ("b2c", "c2b"))


def _effort(report: dict[str, Any]) -> str:
    return f"{report['seconds']['total']:.0f}, {report['threads']}"


def main() -> int:
    """Write the page."""
    PAGE.write_text(page())
    print(PAGE)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
