"""CrayonMap as a batch: move, pin, join, pad, scatter, and as a pytree."""

from __future__ import annotations

from dataclasses import FrozenInstanceError, fields

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils import _pytree as pytree
from torch.utils.data import DataLoader

from collavo_kernels import CrayonMap, panoptic_lookup
from collavo_kernels.testing.cases.panoptic_lookup import CASES

NAMES = [field.name for field in fields(CrayonMap)]


def lookup(name: str) -> CrayonMap:
    case = CASES[name]
    return panoptic_lookup(case.maps(), case.ids(), case.classes(), grid=case.grid)


def assert_equal(actual: CrayonMap, expected: CrayonMap) -> None:
    for name in NAMES:
        assert torch.equal(getattr(actual, name), getattr(expected, name)), name


def single(segments: int, seed: int) -> CrayonMap:
    maps = torch.randint(0, 9, (1, 7, 8), generator=torch.Generator().manual_seed(seed))
    ids = torch.arange(1, 1 + segments, dtype=torch.int32)
    return panoptic_lookup(maps.int(), [ids], [ids % 3], grid=(3, 4))


def test_it_is_frozen_and_knows_its_sizes() -> None:
    crayon = lookup("mixed-sizes")
    assert (crayon.num_images, crayon.num_cells, crayon.num_rows) == (3, 30, 8)
    assert crayon.device == torch.device("cpu")
    with pytest.raises(FrozenInstanceError):
        crayon.row_index = crayon.row_area  # type: ignore[misc]


def test_pytree_round_trip_keeps_the_order_of_the_fields() -> None:
    crayon = lookup("ties")
    leaves, spec = pytree.tree_flatten(crayon)
    assert len(leaves) == len(NAMES)
    assert all(leaf is getattr(crayon, name) for leaf, name in zip(leaves, NAMES, strict=True))
    doubled = pytree.tree_map(lambda leaf: leaf * 2, crayon)
    assert isinstance(doubled, CrayonMap)
    assert torch.equal(doubled.row_area, crayon.row_area * 2)
    assert isinstance(pytree.tree_unflatten(leaves, spec), CrayonMap)


def test_to_moves_every_field() -> None:
    moved = lookup("ties").to("meta", non_blocking=True)
    assert all(getattr(moved, name).device.type == "meta" for name in NAMES)


@pytest.mark.gpu
def test_pinned_maps_travel_asynchronously() -> None:
    pinned = lookup("ties").pin_memory()
    assert all(getattr(pinned, name).is_pinned() for name in NAMES)
    assert_equal(pinned.to("cuda", non_blocking=True).to("cpu"), lookup("ties"))


def test_cat_of_single_images_is_the_lookup_of_all() -> None:
    case = CASES["mixed-sizes"]
    parts = [
        panoptic_lookup([m], [i], [c], grid=case.grid)
        for m, i, c in zip(case.maps(), case.ids(), case.classes(), strict=True)
    ]
    assert_equal(CrayonMap.cat(parts), lookup("mixed-sizes"))
    assert_equal(CrayonMap.cat([CrayonMap.cat(parts[:2]), parts[2]]), lookup("mixed-sizes"))
    assert_equal(CrayonMap.cat(parts[:1]), parts[0])


def test_it_collates_in_a_data_loader() -> None:
    data = [single(k % 4, k) for k in range(6)]
    loader = DataLoader(data, batch_size=3, collate_fn=CrayonMap.cat)  # type: ignore[arg-type]
    batches = list(loader)
    assert [each.num_images for each in batches] == [3, 3]
    assert_equal(batches[1], CrayonMap.cat(data[3:]))


@settings(max_examples=25, deadline=None, derandomize=True)
@given(counts=st.lists(st.integers(0, 5), min_size=1, max_size=5), extra=st.integers(0, 3))
def test_joined_rows_stay_those_of_their_cells(counts: list[int], extra: int) -> None:
    parts = [single(count, seed) for seed, count in enumerate(counts)]
    parts[0] = parts[0].pad(parts[0].num_rows + extra)  # dead rows in the middle change nothing
    joined = CrayonMap.cat(parts)
    assert joined.num_rows == sum(part.num_rows for part in parts)
    for image, part in enumerate(parts):
        ours, theirs = joined.row_index[image].long(), part.row_index[0].long()
        for name in ("row_class", "row_number", "row_segment_id", "row_box", "row_area"):
            assert torch.equal(getattr(joined, name)[ours], getattr(part, name)[theirs]), name
        assert set(joined.row_image[ours].tolist()) == {image}


def test_cat_refuses_nothing_and_other_grids() -> None:
    with pytest.raises(ValueError, match="maps: expected at least one"):
        CrayonMap.cat([])
    with pytest.raises(
        ValueError, match=r"maps\[1\].row_index: expected shape \[B, 12\].*same grid"
    ):
        CrayonMap.cat([single(1, 0), lookup("ties")])
    with pytest.raises(ValueError, match=r"maps\[1\].row_index: expected a tensor on cpu"):
        CrayonMap.cat([single(1, 0), single(1, 0).to("meta")])


def test_pad_adds_dead_rows_that_no_cell_has() -> None:
    crayon = single(2, 0)
    padded = crayon.pad(7)
    assert padded.num_rows == 7 and torch.equal(padded.row_index, crayon.row_index)
    assert padded.row_image.tolist() == [0, 0, 0, -1, -1, -1, -1]
    assert padded.row_class[3:].tolist() == [-1] * 4
    for name in ("row_number", "row_segment_id", "row_box", "row_area"):
        assert not getattr(padded, name)[3:].any()
        assert torch.equal(getattr(padded, name)[:3], getattr(crayon, name))
    assert_equal(crayon.pad(3), crayon)
    with pytest.raises(ValueError, match="rows: expected at least 3, got 2"):
        crayon.pad(2)


def test_scatter_places_rows_at_image_tokens() -> None:
    crayon = CrayonMap.cat([single(2, 0), single(3, 1)])
    # Left padding moves the second image's tokens; tokens need not be contiguous.
    positions = torch.stack([torch.arange(12), torch.arange(12) * 2 + 1])
    placed = crayon.scatter(positions, 30)
    assert placed.shape == (2, 30) and placed.dtype == torch.int32 and placed.is_contiguous()
    for image in range(2):
        assert torch.equal(placed[image, positions[image]], crayon.row_index[image])
        rest = torch.ones(30, dtype=torch.bool)
        rest[positions[image]] = False
        assert (placed[image, rest] == -1).all()
    assert torch.equal(crayon.scatter(positions.int(), 30), placed)


def test_scatter_leaves_out_cells_with_a_negative_position() -> None:
    crayon = single(2, 0)
    positions = torch.arange(12)[None].clone()
    positions[0, 4:] = -1  # a truncated sequence has lost these tokens
    placed = crayon.scatter(positions, 6)
    assert placed[0].tolist() == [*crayon.row_index[0, :4].tolist(), -1, -1]


def test_scatter_names_what_is_wrong() -> None:
    crayon = single(2, 0)
    with pytest.raises(ValueError, match=r"below sequence_length 6, got 6 for cell 6 of image 0"):
        crayon.scatter(torch.arange(12)[None], 6)
    with pytest.raises(ValueError, match=r"image_positions: expected shape \[1, 12\]"):
        crayon.scatter(torch.arange(12), 20)
    with pytest.raises(TypeError, match=r"image_positions: expected dtype int32 or int64"):
        crayon.scatter(torch.zeros(1, 12), 20)


def test_an_empty_batch_joins_and_pads() -> None:
    empty = panoptic_lookup(torch.zeros(0, 4, 4, dtype=torch.int32), [], [], grid=(3, 4))
    assert_equal(CrayonMap.cat([empty, single(2, 0)]), single(2, 0))
    assert empty.pad(2).row_class.tolist() == [-1, -1]
    assert empty.scatter(torch.zeros(0, 12, dtype=torch.int64), 5).shape == (0, 5)
