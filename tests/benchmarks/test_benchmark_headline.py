"""The README's picture and the page of results: every number is one of the kept rows'."""

from __future__ import annotations

import dataclasses
import re
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

import pytest

from benchmarks import caches, headline, plots, report, results_page
from benchmarks.registry import BENCHMARKS
from benchmarks.results_tables import TABLES

KEPT = report.by_device()
SVG = "{http://www.w3.org/2000/svg}"


def row(op: str, case: str, mode: str, provider: str, ms: float, **changes: Any) -> Any:
    values: dict[str, Any] = {field.name: None for field in dataclasses.fields(report.Measurement)}
    values |= {"op": op, "case": case, "mode": mode, "provider": provider, "dtype": "bfloat16"}
    values |= {"p20_ms": ms, "p50_ms": ms, "p80_ms": ms, "threads": 1, "isa": "avx512"}
    values |= {"config_json": "{}", "device": "AMD EPYC 1", "date": "2026-01-01"} | changes
    return report.Measurement(**values)


def every_claim() -> dict[str, list[report.Measurement]]:
    """Rows for all bars, each of another speed: 1.25, 1.5, ..."""
    groups: dict[str, list[report.Measurement]] = {}
    for index, claim in enumerate(headline.CLAIMS):
        pair = claim.pairs[0]
        ours = "ours" if claim.op == "end_to_end" else f"ours:cpu{pair.ending}"
        rows = [row(claim.op, claim.case, claim.mode, ours, 4.0)]
        rows.append(row(claim.op, claim.case, claim.mode, pair.peer, 5.0 + index))
        groups.setdefault(claim.op, []).extend(rows)
    return groups


def texts(picture: Path) -> list[str]:
    return ["".join(node.itertext()) for node in ElementTree.parse(picture).iter(f"{SVG}text")]


def quotients(groups: dict[str, list[report.Measurement]]) -> set[str]:
    """What can be said at all: a peer's median over ours of the same case, mode and setting."""
    found = set()
    for rows in groups.values():
        for ours in (each for each in rows if re.match("ours(:|$)", each.provider)):
            for peer in rows:
                if (peer.case, peer.mode, peer.on) == (ours.case, ours.mode, ours.on):
                    ratio = peer.p50_ms / ours.p50_ms
                    found.add(f"{ratio:.1f}x" if ratio < 10 else f"{ratio:.0f}x")
    return found


def check_picture(picture: Path, groups: dict[str, list[report.Measurement]]) -> list[str]:
    """Hold every number in the picture against the rows; return the speeds it shows."""
    shown = texts(picture)
    bars = headline.bars(groups)
    labels = {bar.claim.what for bar in bars} | {headline.caption(bars), "1x: equal"}
    speeds = [text for text in shown if re.fullmatch(r"[\d.]+x", text)]
    times = {report.short_time(each.p50_ms) for rows in groups.values() for each in rows}
    for text in set(shown) - labels - set(speeds):
        assert set(re.findall(r"[\d.]+ m?s", text)) <= times, text
        assert re.fullmatch(r"[A-Za-z+ ]+ [\d.]+ m?s, here [\d.]+ m?s", text), text
    assert set(speeds) <= quotients(groups)
    assert speeds == [bar.number for bar in bars]
    return speeds


@pytest.mark.parametrize("device", [d for d, g in KEPT.items() if len(headline.bars(g)) >= 3])
def test_the_committed_picture_shows_the_committed_rows(device: str) -> None:
    """`python -m benchmarks.plots` was not forgotten, and nobody drew by hand."""
    assert check_picture(plots.PLOTS / device / "headline.svg", KEPT[device])


def test_a_picture_follows_its_rows(tmp_path: Path) -> None:
    """No bar without both rows, the spare one first to go, another number when a row changes."""
    pytest.importorskip("matplotlib")
    groups, picture = every_claim(), tmp_path / "headline.svg"
    assert headline.draw(groups, picture)
    speeds = check_picture(picture, groups)
    assert len(speeds) == headline.MOST
    spare = next(claim.what for claim in headline.CLAIMS if claim.spare)
    assert spare not in texts(picture)

    attention = groups["crayon_attention"]
    attention[1] = dataclasses.replace(attention[1], p50_ms=400.0)
    assert headline.draw(groups, picture)
    assert check_picture(picture, groups)[0] == "100x"

    del attention[1]  # nothing to hold ours against
    assert headline.draw(groups, picture)
    check_picture(picture, groups)
    assert headline.CLAIMS[0].what not in texts(picture)
    assert not headline.draw({"crayon_attention": attention}, tmp_path / "none.svg")
    assert not (tmp_path / "none.svg").exists()


def test_cold_rows_count_before_warm_ones_and_settings_do_not_mix() -> None:
    groups = every_claim()
    claim = next(claim for claim in headline.CLAIMS if claim.op == "panoptic_lookup")
    warm = groups["panoptic_lookup"]
    mode = claim.mode + caches.COLD
    other = [dataclasses.replace(warm[0], mode=mode, p50_ms=40.0)]
    bar = headline.find(claim, warm + other)
    assert bar is not None and bar.ours is warm[0], "a cold row of ours alone says nothing"
    other.append(dataclasses.replace(warm[1], mode=mode, p50_ms=80.0))
    bar = headline.find(claim, warm + other)
    assert bar is not None and bar.number == "2.0x"
    # Two threads of ours beside one of the peer's: no bar, and the caption stays true.
    groups["panoptic_lookup"] = [dataclasses.replace(warm[0], threads=2), warm[1]]
    found = headline.bars(groups)
    assert {bar.ours.threads for bar in found} == {bar.peer.threads for bar in found} == {1}
    assert claim not in [bar.claim for bar in found]


def test_float32_adapters_are_held_against_float32_adapters() -> None:
    """Both sides' default comes first; the dtypes of the two sides never differ."""
    claim = next(claim for claim in headline.CLAIMS if claim.op == "qlora_linear")
    times = {"ours:cpu": 1.0, "ours:cpu-fp32-adapters": 2.0, "peft": 3.0}
    rows = [row(claim.op, claim.case, "fwd", name, ms) for name, ms in times.items()]
    bar = headline.find(claim, rows)
    assert bar is not None and bar.number == "3.0x"
    bar = headline.find(claim, [*rows, row(claim.op, claim.case, "fwd", "peft-fp32-adapters", 5.0)])
    assert bar is not None and bar.number == "2.5x"


def test_claims_name_cases_that_the_benchmarks_have() -> None:
    cases = {
        op: {row.case for kind in ("cpu", "cuda") for row in benchmark.rows(kind)}
        for op, benchmark in BENCHMARKS.items()
    }
    assert headline.MODEL in cases["end_to_end"]
    lines = [(table.op, line.case) for table in TABLES for line in table.lines]
    for op, case in [*lines, *((claim.op, claim.case) for claim in headline.CLAIMS)]:
        assert case in cases[op], f"{op}: no case {case}"


def test_the_committed_page_is_what_the_committed_rows_say() -> None:
    """`python -m benchmarks.results_page` was not forgotten."""
    assert results_page.PAGE.read_text() == results_page.page()


def test_the_page_says_warm_and_cold_and_where_the_layer_does_not_win(tmp_path: Path) -> None:
    case = "4096x4096/m1/r64"
    rows = [
        row("panoptic_lookup", "480x640/s15/b1", "majority", "ours:cpu", 0.21),
        row("panoptic_lookup", "480x640/s15/b1", "majority-cold", "ours:cpu", 0.62),
        row("qlora_linear", case, "fwd", "ours:cpu", 0.525),
        row("qlora_linear", case, "fwd", "ours:cpu-fp32-adapters", 0.87),
        row("qlora_linear", case, "fwd", "bitsandbytes", 0.5, config_json='{"hub_kernel":false}'),
    ]
    report.save(rows, tmp_path)
    text = results_page.page(tmp_path)
    assert "One map takes 0.21 ms back to back and 0.62 ms between other work." in text
    assert "we do not beat bitsandbytes' base alone: 0.525 ms" in text
    assert "Float32 adapters take 1.66x the time of bfloat16 ones at one token." in text
    assert "is without the CPU kernel" in text and "peft" not in text
    rows[4] = dataclasses.replace(rows[4], p50_ms=0.6, config_json='{"hub_kernel":true}')
    report.save(rows, tmp_path)
    text = results_page.page(tmp_path)
    assert "do not beat" not in text and "is without the CPU kernel" not in text
