"""Streams: nothing lost or doubled over ranks and workers, and what happens at unreadable files."""

from __future__ import annotations

import copy
import itertools
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from collavo.panoptic import CocoPanopticDataset, SampleStream, SkipLog, Skipped


class Numbers:
    """Samples that are their own index; some cannot be read."""

    def __init__(self, count, bad=()):
        self.count, self.bad = count, set(bad)

    def __len__(self):
        return self.count

    def __getitem__(self, index):
        if index in self.bad:
            raise ValueError(f"{index}.png: truncated")
        return index

    def file_name(self, index):
        return f"{index}.jpg"


def gather(stream, workers):
    return list(DataLoader(stream, batch_size=None, num_workers=workers))


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
@pytest.mark.parametrize("workers", [0, 1, 3])
@pytest.mark.parametrize("shuffle", [False, True])
def test_every_sample_once_over_two_ranks_and_their_workers(workers, shuffle):
    """Eleven samples divide by neither: ranks and workers have shares of different sizes."""
    shares = []
    for rank in range(2):
        stream = SampleStream(Numbers(11), shuffle=shuffle, rank=rank, world_size=2)
        shares.append(gather(stream, workers))
        assert len(shares[-1]) == len(stream)
    assert sorted(itertools.chain(*shares)) == list(range(11))


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
def test_order_of_a_rank_does_not_depend_on_its_workers():
    stream = SampleStream(Numbers(10), rank=1, world_size=2)
    assert gather(stream, 0) == gather(stream, 3) == [1, 3, 5, 7, 9]


@given(st.integers(0, 40), st.integers(1, 7), st.booleans(), st.integers(0, 3))
@settings(max_examples=60, deadline=None, derandomize=True)
def test_any_number_of_ranks_shares_out_all_samples(count, world_size, shuffle, epoch):
    found = []
    for rank in range(world_size):
        stream = SampleStream(Numbers(count), shuffle=shuffle, rank=rank, world_size=world_size)
        stream.set_epoch(epoch)
        found += list(stream)
    assert sorted(found) == list(range(count))


def test_epochs_and_seeds_have_orders_of_their_own():
    orders = {}
    for seed, epoch in itertools.product(range(3), range(3)):
        stream = SampleStream(Numbers(30), shuffle=True, seed=seed)
        stream.set_epoch(epoch)
        assert list(stream) == list(stream)
        orders[seed, epoch] = tuple(stream)
    assert len(set(orders.values())) == 9


def test_workers_that_live_on_see_a_new_epoch():
    stream = SampleStream(Numbers(20), shuffle=True)
    loader = DataLoader(stream, batch_size=None, num_workers=2, persistent_workers=True)
    first, stream_epochs = list(loader), []
    for epoch in range(3):
        stream.set_epoch(epoch)
        stream_epochs.append(list(loader))
    assert stream_epochs[0] == first
    assert len(set(map(tuple, stream_epochs))) == 3


@pytest.mark.parametrize("workers", [0, 2])
def test_goes_on_past_unreadable_samples_and_names_them(tmp_path, workers):
    """With workers the report is a file, since a list would stay in the process that reads."""
    log = SkipLog(tmp_path / "skipped.jsonl")
    assert log.entries() == []
    stream = SampleStream(Numbers(9, bad=(2, 3, 8)), on_unreadable=log)
    assert sorted(gather(stream, workers)) == [0, 1, 4, 5, 6, 7]
    assert sorted(log.entries(), key=lambda one: one.name) == [
        Skipped(f"{i}.jpg", f"{i}.png: truncated") for i in (2, 3, 8)
    ]


def test_unreadable_samples_stop_a_stream_that_was_not_told_otherwise():
    iterator = iter(SampleStream(Numbers(3, bad=[1])))
    assert next(iterator) == 0
    with pytest.raises(ValueError, match=r"1\.png: truncated"):
        next(iterator)


def test_coco_files_that_break_while_training(coco_folder):
    """One map is cut, one image has gone after the folder was opened; the third sample comes."""
    data = CocoPanopticDataset(
        coco_folder / "images", coco_folder / "panoptic", coco_folder / "panoptic.json"
    )
    png = coco_folder / "panoptic" / "001.png"
    png.write_bytes(png.read_bytes()[:60])
    (coco_folder / "images" / "002.png").unlink()
    skipped = []
    (sample,) = SampleStream(data, on_unreadable=skipped.append)
    assert sample.image_id == 3
    assert [one.name for one in skipped] == ["001.png", "002.png"]
    assert "panoptic/001.png: the panoptic PNG is truncated" in skipped[0].reason
    assert "images/002.png: there is no such image" in skipped[1].reason


def test_pickles(coco_dataset):
    copied = pickle.loads(pickle.dumps(SampleStream(coco_dataset, shuffle=True, seed=3)))
    again = SampleStream(coco_dataset, shuffle=True, seed=3)
    assert [one.image_id for one in copied] == [one.image_id for one in again]


@pytest.mark.parametrize("context", ["fork", "spawn"])
def test_rank_of_a_running_process_group_reaches_the_workers(monkeypatch, context):
    """A spawned worker knows nothing of the group; without its rank every rank would read all."""
    for name, value in (("is_initialized", True), ("get_rank", 1), ("get_world_size", 3)):
        monkeypatch.setattr(torch.distributed, name, lambda value=value: value)
    stream = SampleStream(Numbers(8))
    assert list(stream) == [1, 4, 7] and len(stream) == 3
    loader = DataLoader(stream, batch_size=None, num_workers=1, multiprocessing_context=context)
    assert list(loader) == [1, 4, 7]


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda one: pickle.loads(pickle.dumps(one))])
def test_a_copy_asks_for_its_rank_and_shares_its_epoch(monkeypatch, copied):
    """It may have been made before the processes knew of each other, as data sets often are."""
    stream = copied(SampleStream(Numbers(8)))
    for name, value in (("is_initialized", True), ("get_rank", 1), ("get_world_size", 3)):
        monkeypatch.setattr(torch.distributed, name, lambda value=value: value)
    assert list(stream) == [1, 4, 7]
    assert stream._epoch.is_shared()


@pytest.mark.parametrize(
    ("place", "message"),
    [
        ({"rank": 1}, "rank, world_size: expected both or neither, got 1 and None"),
        ({"rank": 2, "world_size": 2}, r"rank: expected 0\.\.1 of 2, got 2"),
    ],
)
def test_places_that_do_not_exist(place, message):
    with pytest.raises(ValueError, match=message):
        SampleStream(Numbers(3), **place)


def test_reports_that_are_none(tmp_path):
    path = tmp_path / "skipped.jsonl"
    path.write_text('{"file": "a", "reason": "b"}\n{"file": "a"}\n')
    with pytest.raises(ValueError, match=r"skipped\.jsonl: line 2: expected 'file' and 'reason'"):
        SkipLog(path).entries()
