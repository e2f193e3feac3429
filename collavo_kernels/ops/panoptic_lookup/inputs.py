"""The operator's arguments as one bundle, and the host side table that all backends share."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

REDUCTIONS = ("majority", "nearest")


class LookupInputs(NamedTuple):
    """What every backend takes.

    Attributes:
        maps: Each ``[n_i, H_i, W_i]`` int32 ids or ``[n_i, H_i, W_i, 3]`` uint8 colours on one
            device; their images in order are the batch.
        columns: ``[4, T]`` int32 on the CPU: class, number, image and segment id of each row.
        counts: S_i, the segments of each image.
        grid_h: Cells per column.
        grid_w: Cells per row.
        reduce: ``"majority"`` or ``"nearest"``.
    """

    maps: tuple[Tensor, ...]
    columns: Tensor
    counts: tuple[int, ...]
    grid_h: int
    grid_w: int
    reduce: str

    @property
    def device(self) -> torch.device:
        """Where the maps are and the results go."""
        return self.maps[0].device if self.maps else self.columns.device

    @property
    def num_rows(self) -> int:
        """T, the number of rows."""
        return self.columns.shape[1]


class LookupResult(NamedTuple):
    """What every backend returns: the fields of ``CrayonMap``, in its order."""

    row_index: Tensor
    row_class: Tensor
    row_number: Tensor
    row_image: Tensor
    row_segment_id: Tensor
    row_box: Tensor
    row_area: Tensor


def decode_colours(colours: Tensor) -> Tensor:
    """Return the segment ids of COCO's colours: ``R + 256 G + 65536 B``.

    Args:
        colours: ``[..., 3]`` uint8.

    Returns:
        ``[...]`` int32.
    """
    red, green, blue = colours.to(torch.int32).unbind(-1)
    return red | green << 8 | blue << 16


def row_columns(
    ids: Tensor, classes: Tensor, counts: Sequence[int], num_classes: int, max_number: int
) -> Tensor:
    """Sort the segments into rows and number the instances.

    Rows go by image, then ascending segment id, each image's unknown row (id 0) first; so the ids
    of an image's rows are sorted, which makes the search for a pixel's row a binary search.

    Args:
        ids: ``[sum S_i]`` int32 on the CPU.
        classes: The same.
        counts: S_i of each image.
        num_classes: Classes are -1 (unknown) to ``num_classes - 1``.
        max_number: Instances after this number get 0.

    Returns:
        ``[4, T]`` int32: class (0 = unknown, ``c + 1``), number, image, segment id.

    Raises:
        ValueError: for a class out of range, an id that is not positive, or an id listed twice.
    """
    images = torch.arange(len(counts))
    image = images.repeat_interleave(torch.tensor(counts, dtype=torch.int64), output_size=len(ids))
    _check_values(ids, classes, image, num_classes)
    # Ids are positive int32, so image and id fit side by side into one int64.
    key, order = ((image << 32) | ids).sort()
    _check_unique(key)
    sorted_classes = classes[order]
    columns = torch.zeros(4, len(ids) + len(counts), dtype=torch.int32)
    place = torch.arange(len(ids))
    row = place + image + 1
    columns[0, row] = sorted_classes + 1
    columns[1, row] = _numbers(image * (num_classes + 1) + sorted_classes + 1, max_number)
    columns[2, row] = image.to(torch.int32)
    columns[3, row] = ids[order]
    columns[2, first_rows(counts)] = images.to(torch.int32)
    return columns


def first_rows(counts: Sequence[int]) -> Tensor:
    """Return the first row of each image, ``[B]`` int64: its unknown row."""
    sizes = torch.tensor(counts, dtype=torch.int64) + 1
    return sizes.cumsum(0) - sizes


def image_table(maps: Sequence[Tensor], counts: Sequence[int]) -> Tensor:
    """Describe every image to a kernel that reads all maps in one launch.

    Args:
        maps: Each ``[n_i, H_i, W_i]`` int32 with ``stride(2) == 1``; the caller keeps them alive.
        counts: S_i of each image.

    Returns:
        ``[B, 6]`` int64 on the CPU: address, height, width, elements from one pixel row to the
        next, first row, number of rows.
    """
    table: list[tuple[int, ...]] = []
    row = 0
    for each in maps:
        height, width = each.shape[1:]
        address, step = each.data_ptr(), each.stride(0) * each.element_size()
        for k in range(each.shape[0]):
            rows = counts[len(table)] + 1
            table.append((address + k * step, height, width, each.stride(1), row, rows))
            row += rows
    return torch.tensor(table, dtype=torch.int64).reshape(-1, 6)


def _numbers(group: Tensor, max_number: int) -> Tensor:
    """Count 1, 2, ... within each group, in the order of the elements; 0 after ``max_number``."""
    ordered, order = group.sort(stable=True)
    rank = torch.arange(1, len(group) + 1) - torch.searchsorted(ordered, ordered)
    number = torch.empty(len(group), dtype=torch.int32)
    number[order] = torch.where(rank <= max_number, rank, 0).to(torch.int32)
    return number


def _check_values(ids: Tensor, classes: Tensor, image: Tensor, num_classes: int) -> None:
    for bad in (ids <= 0).nonzero()[:1, 0].tolist():
        raise ValueError(
            f"segment_ids[{int(image[bad])}]: expected ids above 0, got {int(ids[bad])}; "
            f"values <= 0 in a map mean that there is no segment"
        )
    for bad in ((classes < -1) | (classes >= num_classes)).nonzero()[:1, 0].tolist():
        raise ValueError(
            f"segment_classes[{int(image[bad])}]: expected classes from -1 (unknown) to "
            f"{num_classes - 1}, got {int(classes[bad])} for segment id {int(ids[bad])}"
        )


def _check_unique(key: Tensor) -> None:
    for bad in (key[1:] == key[:-1]).nonzero()[:1, 0].tolist():
        image, segment = int(key[bad]) >> 32, int(key[bad]) & 0xFFFFFFFF
        raise ValueError(
            f"segment_ids[{image}]: expected every id once, got id {segment} more than once; "
            f"merge the entries of a segment before the lookup"
        )
