"""The benchmark of panoptic_lookup: its peers do the operator's work, and its goals are read."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import pytest
import torch

from benchmarks import goals, report
from benchmarks.ops import panoptic_lookup_providers as bench
from collavo_kernels import panoptic_lookup

# Where a grid divides the map no cells share a pixel, so that cutting them is the same.
DIVIDING = "480x640/s15/b1/g20"


@pytest.fixture(scope="module")
def batch() -> bench.Batch:
    return bench.Batch(DIVIDING)


def test_numpy_and_torch_do_the_same_work(batch: bench.Batch) -> None:
    crayon = panoptic_lookup(batch.maps, batch.ids, batch.classes, grid=batch.grid)
    index, area, box = bench.careful_numpy(batch)[0]
    assert torch.equal(torch.from_numpy(index).int(), crayon.row_index[0])
    assert torch.equal(torch.from_numpy(area).int(), crayon.row_area)
    # float64 quotients beside float32 ones: one rounding.
    assert (torch.from_numpy(box[1:]) - crayon.row_box[1:]).abs().max() <= 2**-24
    index, area, x0, y0, x1, y1 = bench.torch_operators(batch, batch.maps)[0]
    assert torch.equal(index.int(), crayon.row_index[0]) and torch.equal(
        area.int(), crayon.row_area
    )
    edges = torch.stack([x0 / 640, y0 / 480, (x1 + 1) / 640, (y1 + 1) / 480], 1)
    assert torch.equal(edges[1:].float(), crayon.row_box[1:])


def test_the_released_algorithm_does_the_same_work(batch: bench.Batch) -> None:
    crayon = panoptic_lookup(
        batch.maps, batch.ids, batch.classes, grid=batch.grid, reduce="nearest"
    )
    semantic, number, box = bench.released_algorithm(batch)[0]
    rows = crayon.row_index[0].long()
    assert torch.equal(semantic, crayon.row_class[rows])
    assert torch.equal(number, crayon.row_number[rows])
    size = torch.tensor([640.0, 480.0, 640.0, 480.0])
    assert torch.equal((box * 35).round(), (crayon.row_box[1:] * size).round())


def test_colours_are_the_same_maps(batch: bench.Batch) -> None:
    plain = panoptic_lookup(batch.maps, batch.ids, batch.classes, grid=batch.grid)
    coloured = panoptic_lookup(batch.in_colours(), batch.ids, batch.classes, grid=batch.grid)
    assert torch.equal(plain.row_index, coloured.row_index)


def row(provider: str, milliseconds: float, **changes: Any) -> report.Measurement:
    values: dict[str, Any] = {field.name: None for field in dataclasses.fields(report.Measurement)}
    values |= {"op": "panoptic_lookup", "provider": provider, "p50_ms": milliseconds}
    values |= {"threads": 1, "isa": "avx512", "config_json": "{}"} | changes
    return report.Measurement(**values)


def goal(op: str, metric: str) -> goals.Goal:
    return next(each for each in goals.GOALS[op] if each.metric == metric)


def test_two_threads_are_held_against_one_of_the_same_provider() -> None:
    wanted = goal("panoptic_lookup", "threads")
    case = {"case": wanted.case, "mode": wanted.mode}
    alone = row("ours:cpu", 9.0, **case)
    both = row("ours:cpu", 5.0, threads=2, **case)
    assert goals.check(wanted, [alone, both]).found == pytest.approx(1.8)
    assert "1.70x the speed of one thread" in goals.table([goals.check(wanted, [alone, both])])
    assert goals.check(wanted, [both]).state == goals.NOT_MEASURED
    assert goals.check(wanted, [alone]).state == goals.NOT_MEASURED


def test_the_share_of_decoding_and_the_saved_products() -> None:
    share = goal("panoptic_data", "share")
    case = {"case": share.case, "mode": share.mode}
    outcome = goals.check(share, [row("decoding-alone", 9.0, **case), row("ours", 10.0, **case)])
    assert outcome.found == pytest.approx(0.9) and outcome.state == "met"
    assert "90%" in goals.table([outcome])
    work = goal("crayon_prompt", "work")
    facts = {"case": work.case, "mode": work.mode}
    config = json.dumps({"rows": 100, "tokens": 1900})
    rows = [row("ours", 1.0, config_json=config, **facts), row("per-token", 9.0, **facts)]
    assert goals.check(work, rows).state == "not met"  # 19 times, where 20 are wanted
