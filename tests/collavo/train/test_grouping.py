"""Steps of one kind, of alike length, equal work for all devices: pure functions of the seed."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from collavo.train.grouping import GroupedSampler, GroupedSchedule, Place, deal

SIZES = {"image": 37, "text": 22}


def lengths(seed: int = 0) -> np.ndarray:
    """Image samples are longer, as they are in mix665k."""
    draw = np.random.default_rng(seed)
    return np.concatenate([600 + draw.integers(0, 200, 37), draw.integers(10, 400, 22)])


def schedule(batch: int = 8, seed: int = 1, **sizes: int) -> GroupedSchedule:
    if sizes:
        return GroupedSchedule(sizes, batch, seed)
    return GroupedSchedule(SIZES, batch, seed, lengths())


@pytest.mark.parametrize("batch", [1, 2, 8, 22, 37, 100])
def test_an_epoch_takes_every_sample_once_in_steps_of_one_kind(batch: int) -> None:
    """Each kind has ceil(n / batch) steps; its last in the epoch's order may be smaller."""
    order = schedule(batch)
    for epoch in range(2):
        steps = range(epoch * order.steps_per_epoch, (epoch + 1) * order.steps_per_epoch)
        taken = [(order.kind(step), order.samples(step)) for step in steps]
        assert sorted(i for _, own in taken for i in own) == list(range(59))
        for kind, size in SIZES.items():
            own = [samples for one, samples in taken if one == kind]
            assert len(own) == -(-size // batch) == order.counts(steps[0], steps[-1] + 1)[kind]
            assert all((i < 37) == (kind == "image") for samples in own for i in samples)
            assert [len(samples) for samples in own[:-1]] == [batch] * (len(own) - 1)


def test_the_order_follows_from_seed_and_step_alone() -> None:
    """Asked in any order, by any process; other seeds and epochs have other orders."""
    one, other = schedule(), schedule()
    forwards = [one.samples(step) for step in range(20)]
    assert [other.samples(step) for step in reversed(range(20))] == forwards[::-1]
    assert [schedule(seed=2).samples(step) for step in range(20)] != forwards
    epoch = one.steps_per_epoch
    assert sorted(map(sorted, forwards[:epoch])) != sorted(map(sorted, forwards[epoch : 2 * epoch]))
    kinds = [[one.kind(e * epoch + i) for i in range(epoch)] for e in range(6)]
    assert len({tuple(own) for own in kinds}) > 1


def test_draws_are_the_recorded_ones() -> None:
    """A changed order would silently change every resumed run: these were recorded once."""
    order = GroupedSchedule({"image": 7, "text": 3}, 2, seed=42)
    assert [order.samples(step) for step in range(6)] == RECORDED


RECORDED = [[9, 7], [6, 5], [1, 4], [2, 3], [0], [8]]


def test_samples_of_alike_length_come_together() -> None:
    """Padding of micro-batches at most a quarter of what it is in an order drawn at random."""
    draw = np.random.default_rng(0)
    known = np.concatenate([600 + draw.integers(0, 200, 600), draw.integers(10, 400, 400)])

    def padded(lengths: np.ndarray | None) -> float:
        order = GroupedSchedule({"image": 600, "text": 400}, 16, 1, lengths)
        steps = [order.samples(step) for step in range(order.steps_per_epoch)]
        dealt = [own for step in steps for own in deal(step, order.lengths, 2, 2) if own]
        return sum(len(own) * known[own].max() - known[own].sum() for own in dealt) / known.sum()

    assert padded(known) <= padded(None) / 4


def test_one_kind_alone_works() -> None:
    for kind in ("image", "text"):
        order = schedule(**{kind: 5})
        assert order.kinds == (kind,) and order.steps_per_epoch == 1
    with pytest.raises(ValueError, match="train_dataset: expected at least one record"):
        schedule(image=0, text=0)
    with pytest.raises(ValueError, match="lengths: expected one for each of 3, got 2"):
        GroupedSchedule({"image": 3}, 2, 0, [1, 2])


@pytest.mark.parametrize(("devices", "micro_batches"), [(1, 1), (2, 4), (4, 2), (8, 1), (3, 5)])
def test_devices_get_equal_work(devices: int, micro_batches: int) -> None:
    """Their totals differ by less than two of the longest samples, their counts by one at most."""
    known = lengths()
    for count in (1, 2, 7, 15, 37):
        samples = sorted(range(count), key=lambda i: -known[i])
        dealt = deal(samples, known, devices, micro_batches)
        assert sorted(i for batch in dealt for i in batch) == list(range(count))
        assert len(dealt) == devices * micro_batches
        sizes = [len(batch) for batch in dealt]
        assert max(sizes) - min(sizes) <= 1
        own = [[i for batch in dealt[d::devices] for i in batch] for d in range(devices)]
        if count >= devices * micro_batches:
            work = [sum(known[i] for i in mine) for mine in own]
            assert max(work) - min(work) < 2 * known.max()
        assert max(map(len, own)) - min(map(len, own)) <= 1


@pytest.mark.parametrize(("devices", "micro_batches", "size"), [(1, 1, 8), (2, 2, 2), (8, 1, 1)])
def test_no_micro_batch_is_empty(devices: int, micro_batches: int, size: int) -> None:
    """Of a step smaller than devices x micro-batches, some hold a sample that does not count."""
    order = schedule(image=11, text=1)
    places = list(GroupedSampler(order, devices, micro_batches, size))
    assert len(places) == len(GroupedSampler(order, devices, micro_batches, size)) == 3 * 8
    batches = [places[start : start + size] for start in range(0, len(places), size)]
    for step in range(3):
        own = batches[step * devices * micro_batches : (step + 1) * devices * micro_batches]
        assert all(isinstance(batch[0], Place) for batch in own)
        counted = [p.sample for batch in own for p in batch if p is not None and p.counted]
        assert sorted(counted) == sorted(order.samples(step))
        idle = [batch for batch in own if not batch[0].counted]  # type: ignore[union-attr]
        assert all(batch[1:] == [None] * (size - 1) for batch in idle)
        kinds = {p.sample < 11 for batch in own for p in batch if p is not None}
        assert kinds == {order.kind(step) == "image"}


def test_a_resumed_epoch_begins_where_the_order_stands() -> None:
    """Trainer skips what was done of the epoch that a step lies in."""
    order = schedule()
    whole = order.steps_per_epoch

    def at(step: int) -> list[Place | None]:
        return list(GroupedSampler(order, 2, 2, 2, lambda: step))

    assert at(whole) == at(whole + 1) != at(0) == at(whole - 1)


def test_batch_and_devices_have_to_fit() -> None:
    with pytest.raises(ValueError, match="global batch 8, got 3"):
        GroupedSampler(schedule(), 2, 1, 3)


def test_the_fingerprint_knows_lengths_and_kinds() -> None:
    """Another template has other lengths, and so another order: not to be resumed in silence."""
    known = lengths()
    prints = [GroupedSchedule(SIZES, 8, 0, own).fingerprint() for own in (known, known, known + 1)]
    prints.append(GroupedSchedule({"image": 36, "text": 23}, 8, 0, known).fingerprint())
    assert prints[0] == prints[1] and Counter(prints) == {prints[0]: 2, prints[2]: 1, prints[3]: 1}
