"""The draw of a step's kind and the order of samples: pure functions of seed and step."""

from __future__ import annotations

import pytest
import torch
from torch.utils.data import TensorDataset

from collavo.train.sampler import StepSampler, join
from collavo.train.schedule import StepSchedule


def test_draws_are_the_recorded_ones() -> None:
    """A changed draw would silently change every resumed run: these were recorded once."""
    kinds = [StepSchedule(42, 0.5).kind(step) for step in range(16)]
    assert "".join(kind[0] for kind in kinds) == "vviivvvviiiviviv"


@pytest.mark.parametrize("probability", [0.0, 0.2, 0.5, 1.0])
def test_share_of_vl_steps_follows_the_probability(probability: float) -> None:
    steps = 4000
    share = StepSchedule(0, probability).counts(0, steps)["vl"] / steps
    # Five standard deviations of a binomial share.
    assert abs(share - probability) <= 5 * (probability * (1 - probability) / steps) ** 0.5


def test_draws_of_neighbouring_seeds_differ() -> None:
    first, second = ([StepSchedule(s, 0.5).kind(i) for i in range(64)] for s in (0, 1))
    assert first != second


def test_a_probability_outside_its_range_is_refused() -> None:
    with pytest.raises(ValueError, match=r"vl_probability: expected 0 to 1, got 1\.5"):
        StepSchedule(0, 1.5)


def sampler(step: int = 0, vl: float = 0.5, **sizes: int) -> StepSampler:
    sizes = sizes or {"image": 7, "vl": 5}
    return StepSampler(StepSchedule(0, vl), sizes, 3, seed=1, global_step=lambda: step)  # type: ignore[arg-type]


def test_every_step_takes_its_samples_from_the_drawn_data_set() -> None:
    indices, schedule = list(sampler()), StepSchedule(0, 0.5)
    assert len(indices) == len(sampler()) == 12
    for step in range(4):
        of_step = indices[3 * step : 3 * step + 3]
        assert all((index >= 7) == (schedule.kind(step) == "vl") for index in of_step)


def test_each_kind_is_seen_once_before_it_is_seen_twice() -> None:
    """A data set shorter than its share starts over in a new order; no sample is preferred."""
    stream = [i for step in range(0, 40, 4) for i in sampler(step) if i < 7]
    passes = [stream[start : start + 7] for start in range(0, len(stream) - 6, 7)]
    assert all(sorted(one) == list(range(7)) for one in passes)
    assert len({tuple(one) for one in passes}) > 1


def test_a_resumed_epoch_begins_where_the_streams_stand() -> None:
    """Steps 5 and 6 lie in the epoch that began with step 4: Trainer skips what was done of it."""
    assert list(sampler(4)) == list(sampler(5)) == list(sampler(6)) != list(sampler(0))


def test_a_kind_that_can_be_drawn_needs_samples() -> None:
    with pytest.raises(
        ValueError, match=r"vl data set: it has no samples, and vl_probability=0\.5"
    ):
        sampler(image=3)
    with pytest.raises(ValueError, match="image data set"):
        sampler(image=0, vl_=3)
    sampler(vl=0.0, image=3)


def test_joined_data_sets_hold_image_samples_first() -> None:
    image, vl = (TensorDataset(torch.full((n,), float(n))) for n in (2, 3))
    assert [float(item[0]) for item in join(image, vl)] == [2, 2, 3, 3, 3]  # type: ignore[attr-defined]
    with pytest.raises(ValueError, match="train_dataset: expected a data set"):
        join(None, None)
    with pytest.raises(ValueError, match="vl_dataset: expected a data set with a length"):
        join(image, iter([1]))  # type: ignore[arg-type]
