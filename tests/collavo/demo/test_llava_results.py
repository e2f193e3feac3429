"""The kept runs of ``collavo demo --llava``: today's settings, every margin, nothing broken."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from collavo.demo.llava.report import accuracies, differences
from collavo.demo.llava.seeds import (
    captions_in_words,
    markdown_table,
    read_reports,
    smallest_gains,
)
from collavo.demo.llava.settings import FULL

ROOT = Path(__file__).resolve().parents[3]
RESULTS = ROOT / "benchmarks" / "results"
PATHS = sorted(RESULTS.glob("*/llava_seed?.json"))
REPORTS = read_reports(PATHS)
kept = pytest.mark.skipif(not PATHS, reason="no run is kept beside the benchmarks' results")


@kept
def test_three_seeds_are_kept_and_their_least_gain_in_captions_is_thirty_points() -> None:
    assert [path.stem for path in PATHS] == [f"llava_seed{seed}" for seed in range(3)]
    least = smallest_gains(REPORTS)
    assert least["captions_built"] >= 30.0
    for name, margin in dataclasses.asdict(FULL.margins).items():
        assert least[name] >= margin, name


@kept
@pytest.mark.parametrize("report", REPORTS, ids=[path.stem for path in PATHS])
def test_a_kept_run_has_todays_settings_and_broke_nothing(report: dict[str, Any]) -> None:
    # Settings that change make old runs worthless: they have to be made again.
    today = json.loads(json.dumps(dataclasses.asdict(FULL)))
    assert {k: v for k, v in report["settings"].items() if k != "margins"} == {
        k: v for k, v in today.items() if k != "margins"
    }
    assert all(check["passed"] for check in report["checks"] if check["exact"])
    assert report["seconds"]["total"] < 360


@kept
def test_the_front_page_says_what_the_kept_runs_say() -> None:
    text = " ".join((ROOT / "README.md").read_text(encoding="utf-8").split())
    assert captions_in_words(REPORTS) in text


@kept
def test_a_gain_is_the_difference_of_what_is_right() -> None:
    scores = accuracies(REPORTS[0]["measurements"])
    gained = differences(scores)["places_shuffled"]
    exact = 100.0 * (scores["instructed"]["places"] - scores["crayon shuffled"]["places"])
    assert abs(gained - exact) <= 0.005, "rounded to two places"
    assert "after instruct, with the crayon" in markdown_table(REPORTS)


def test_another_report_is_named(tmp_path: Path) -> None:
    (tmp_path / "other.json").write_text('{"measurements": {"cit": {}}}')
    with pytest.raises(ValueError, match="collavo demo --llava"):
        read_reports([tmp_path / "other.json"])
