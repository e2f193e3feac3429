"""The operator's bundles, and the host side table that all backends share."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from collavo_kernels._schema import SymInt
from collavo_kernels._validation import describe, expect_tensor

REDUCTIONS = ("majority", "nearest")
# What kernels are told of a map: the fields of Image in csrc/panoptic_lookup/panoptic_lookup.h,
# which says what they mean, in its order.
IMAGE_FIELDS = ("map", "coloured", "height", "width", "stride", "first_row", "rows")
IMAGE = np.dtype([(name, np.int64) for name in IMAGE_FIELDS])

Integers = npt.NDArray[Any]


class LookupInputs(NamedTuple):
    """What every backend takes.

    Attributes:
        maps: Each ``[n_i, H_i, W_i]`` int32 ids or ``[n_i, H_i, W_i, 3]`` uint8 colours on one
            device; their images in order are the batch.
        segment_ids: ``[sum S_i]`` int32 on the CPU: the ids of all images, one after the other.
        segment_classes: ``[sum S_i]`` int32 on the CPU: their classes.
        segment_counts: S_i, the segments of each image.
        grid_h: Cells per column.
        grid_w: Cells per row.
        num_classes: Classes are -1 (unknown) to ``num_classes - 1``.
        max_number: Last instance number.
        reduce: ``"majority"`` or ``"nearest"``.
    """

    maps: list[Tensor]
    segment_ids: Tensor
    segment_classes: Tensor
    segment_counts: list[SymInt]
    grid_h: int
    grid_w: int
    num_classes: int
    max_number: int
    reduce: str

    @property
    def device(self) -> torch.device:
        """Where the maps are and the results go."""
        return self.maps[0].device if self.maps else self.segment_ids.device

    @property
    def num_rows(self) -> int:
        """T: a row per segment, and one for what is unknown in each image."""
        return self.segment_ids.shape[0] + len(self.segment_counts)


class LookupResult(NamedTuple):
    """What every backend returns: the fields of ``CrayonMap``, in its order."""

    row_index: Tensor
    row_class: Tensor
    row_number: Tensor
    row_image: Tensor
    row_segment_id: Tensor
    row_box: Tensor
    row_area: Tensor


def fake(inputs: LookupInputs) -> LookupResult:
    """Return results that are not filled yet, on the maps' device."""
    images, rows = len(inputs.segment_counts), inputs.num_rows

    def integers(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.int32, device=inputs.device)

    return LookupResult(
        row_index=integers(images, inputs.grid_h * inputs.grid_w),
        row_class=integers(rows),
        row_number=integers(rows),
        row_image=integers(rows),
        row_segment_id=integers(rows),
        row_box=torch.empty(rows, 4, dtype=torch.float32, device=inputs.device),
        row_area=integers(rows),
    )


def decode_colours(colours: Tensor) -> Tensor:
    """Return the segment ids of COCO's colours: ``R + 256 G + 65536 B``.

    Args:
        colours: ``[..., 3]`` uint8.

    Returns:
        ``[...]`` int32.

    Raises:
        TypeError: if it is no uint8 tensor.
        ValueError: if its last side is not 3.

    Example:
        >>> import torch
        >>> decode_colours(torch.tensor([1, 2, 0], dtype=torch.uint8)).item()
        513
    """
    expect_tensor("colours", colours, dtypes=[torch.uint8])
    if colours.dim() == 0 or colours.shape[-1] != 3:
        raise ValueError(f"colours: expected shape [..., 3], got {describe(colours)}")
    red, green, blue = colours.to(torch.int32).unbind(-1)
    return red | green << 8 | blue << 16


def row_columns(inputs: LookupInputs) -> Integers:
    """Sort the segments into rows and number the instances.

    Rows go by image, then ascending segment id, each image's unknown row (id 0) first; so the ids
    of an image's rows are sorted, which makes the search for a pixel's row a binary search.

    Returns:
        ``[4, T]`` int32: class (0 = unknown, ``c + 1``), number, image, segment id.

    Raises:
        ValueError: for a class out of range, an id that is not positive, or an id listed twice.
    """
    counts, num_classes = inputs.segment_counts, inputs.num_classes
    # NumPy: these are small arrays, over which torch's operators take several times as long.
    images = np.arange(len(counts))
    image = images.repeat(counts)
    own_ids, own_classes = inputs.segment_ids.numpy(), inputs.segment_classes.numpy()
    _check_values(own_ids, own_classes, image, num_classes)
    # Ids are positive int32, so image and id fit side by side into one int64.
    key = image << 32 | own_ids
    order = key.argsort(kind="stable")
    _check_unique(key[order])
    sorted_classes = own_classes[order].astype(np.int64)
    columns = np.zeros((4, len(own_ids) + len(counts)), dtype=np.int32)
    row = np.arange(len(own_ids)) + image + 1
    columns[0, row] = sorted_classes + 1
    columns[1, row] = _numbers(image * (num_classes + 1) + sorted_classes + 1, inputs.max_number)
    columns[2, row] = image
    columns[3, row] = own_ids[order]
    columns[2, _before(_rows_of(counts))] = images
    return columns


def first_rows(counts: Sequence[int]) -> Tensor:
    """Return the first row of each image, ``[B]`` int64: its unknown row."""
    return torch.from_numpy(_before(_rows_of(counts)))


def _rows_of(counts: Sequence[int]) -> Integers:
    return np.asarray(counts, dtype=np.int64) + 1


def _before(rows: Integers) -> Integers:
    return rows.cumsum() - rows


def image_table(maps: Sequence[Tensor], counts: Sequence[int]) -> Tensor:
    """Describe every image to a kernel that reads all maps in one launch.

    Args:
        maps: As :class:`LookupInputs` has them, the pixels of a line side by side (see
            :func:`with_packed_lines`); the caller keeps them alive.
        counts: S_i of each image.

    Returns:
        ``[B, 7]`` int64 on the CPU: :data:`IMAGE_FIELDS` of each.
    """
    table = np.empty(len(counts), dtype=IMAGE)
    image = 0
    for each in maps:
        images, height, width = each.shape[:3]
        size = each.element_size()
        own = table[image : image + images]
        own["map"] = each.data_ptr() + np.arange(images) * (each.stride(0) * size)
        own["coloured"] = each.dtype == torch.uint8
        own["height"] = height
        own["width"] = width
        own["stride"] = each.stride(1) * size
        image += images
    table["rows"] = rows = _rows_of(counts)
    table["first_row"] = _before(rows)
    return torch.from_numpy(table.view(np.int64).reshape(len(counts), len(IMAGE_FIELDS)))


def with_packed_lines(maps: Sequence[Tensor]) -> list[Tensor]:
    """Return the maps, copied where the pixels of a line do not follow each other.

    Args:
        maps: As :class:`LookupInputs` has them; lines and images may lie anywhere.
    """
    return [each if _packed(each) else each.contiguous() for each in maps]


def _packed(maps: Tensor) -> bool:
    if maps.dtype == torch.uint8:
        return maps.stride(2) == 3 and maps.stride(3) == 1
    return maps.stride(2) == 1


def _numbers(group: Integers, max_number: int) -> Integers:
    """Count 1, 2, ... within each group, in the order of the elements; 0 after ``max_number``."""
    order = group.argsort(kind="stable")
    ordered = group[order]
    rank = np.arange(1, len(group) + 1) - ordered.searchsorted(ordered)
    number = np.empty(len(group), dtype=np.int64)
    number[order] = np.where(rank <= max_number, rank, 0)
    return number


def _check_values(ids: Integers, classes: Integers, image: Integers, num_classes: int) -> None:
    for bad in (ids <= 0).nonzero()[0][:1]:
        raise ValueError(
            f"segment_ids[{image[bad]}]: expected ids above 0, got {ids[bad]}; "
            f"values <= 0 in a map mean that there is no segment"
        )
    for bad in ((classes < -1) | (classes >= num_classes)).nonzero()[0][:1]:
        raise ValueError(
            f"segment_classes[{image[bad]}]: expected classes from -1 (unknown) to "
            f"{num_classes - 1}, got {classes[bad]} for segment id {ids[bad]}"
        )


def _check_unique(key: Integers) -> None:
    for bad in (key[1:] == key[:-1]).nonzero()[0][:1]:
        image, segment = int(key[bad]) >> 32, int(key[bad]) & 0xFFFFFFFF
        raise ValueError(
            f"segment_ids[{image}]: expected every id once, got id {segment} more than once; "
            f"merge the entries of a segment before the lookup"
        )
