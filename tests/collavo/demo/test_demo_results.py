"""The committed runs of the demo: made with today's settings, and the claim stands out in them."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from collavo.demo.report import differences
from collavo.demo.seeds import accuracies, gains, read_reports
from collavo.demo.settings import FULL

RESULTS = Path(__file__).resolve().parents[3] / "benchmarks" / "results"
BEST = sorted(RESULTS.glob("*/demo_seed?.json"))
OTHER_SETS = sorted(RESULTS.glob("*/demo_seed?_*.json"))
REPORTS = read_reports([*BEST, *OTHER_SETS])


def test_five_seeds_and_runs_on_other_instruction_sets_are_kept():
    assert [path.stem for path in BEST] == [f"demo_seed{seed}" for seed in range(5)]
    found = {(report["seed"], report["isa"]) for report in REPORTS}
    assert found >= {(seed, "avx512") for seed in range(5)}
    assert found >= {(0, "avx2"), (1, "avx2"), (1, "baseline")}
    assert all(report["processor"] for report in REPORTS)


def test_two_threads_take_less_than_six_minutes():
    # As the first command runs it. The scores are others than with one thread: the kernels here
    # give the same bits, torch's own products, which train the base, do not.
    (path,) = RESULTS.glob("*/demo_seed0_two_threads.json")
    (report,) = read_reports([path])
    assert report["threads"] == 2
    assert report["seconds"]["total"] < 360


@pytest.mark.parametrize("report", REPORTS, ids=[path.stem for path in (*BEST, *OTHER_SETS)])
def test_a_kept_run_has_todays_settings_reaches_every_margin_and_broke_nothing(report):
    # Settings that change make old runs worthless: they have to be made again.
    today = json.loads(json.dumps(dataclasses.asdict(FULL)))
    kept = {k: v for k, v in report["settings"].items() if k not in ("margins", "ablations")}
    assert kept == {name: today.get(name) for name in kept}
    gained = differences(accuracies(report))
    for name, margin in today["margins"].items():
        assert gained[name] >= margin, name
    assert all(check["passed"] for check in report["checks"] if check["exact"])


def test_every_gain_is_above_two_standard_deviations_over_five_seeds():
    found = gains(read_reports(BEST))
    assert len(found) == 6
    for gain in found:
        assert gain.stands_out, f"{gain.name}: {gain.values}"


def test_the_ablations_are_told_beside_it():
    for path in BEST:
        assert {"one adapter", "image phase", "vl phase"} <= set(
            read_reports([path])[0]["measurements"]
        )


def test_a_gain_that_does_not_stand_out_is_not_called_one():
    base, cit = ({"b2c": {"accuracy": a}, "c2b": {"accuracy": 0.5}} for a in (0.5, 0.6))
    much = {"b2c": {"accuracy": 0.9}, "c2b": {"accuracy": 0.5}}
    runs = [{"measurements": {"base": base, "cit": one}} for one in (cit, much, base)]
    assert [gain.stands_out for gain in gains(runs)] == [False, False]
    assert gains(runs[:1])[0].stands_out
