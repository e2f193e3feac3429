"""From panoptic maps to crayon rows; the mathematics is in this folder's README.md."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from collavo_kernels._validation import describe, expect_list, expect_tensor, is_dense
from collavo_kernels.ops.panoptic_lookup.crayon_map import CrayonMap
from collavo_kernels.ops.panoptic_lookup.inputs import LookupInputs, decode_colours
from collavo_kernels.ops.panoptic_lookup.registration import OPERATOR
from collavo_kernels.ops.panoptic_lookup.validation import check_map

_HOST = torch.device("cpu")

__all__ = ["OPERATOR", "CrayonMap", "decode_colours", "panoptic_lookup"]


def panoptic_lookup(
    segment_maps: Tensor | Sequence[Tensor],
    segment_ids: Sequence[Tensor],
    segment_classes: Sequence[Tensor],
    *,
    grid: tuple[int, int],
    num_classes: int = 133,
    max_number: int = 20,
    reduce: str = "majority",
    backend: str = "",
) -> CrayonMap:
    """Turn a batch of panoptic maps into crayon rows and the row of every grid cell.

    Cell ``(i, j)`` covers the pixels from ``floor(i H / grid_h)`` to
    ``ceil((i + 1) H / grid_h)`` (exclusive), columns alike; a map that has the grid's size is
    taken cell by cell. The instance number of a segment is its place, from 1, among the segments
    of its class in its image in ascending id.

    Values <= 0 in a map, and ids that are not listed, are "no segment": they belong to the image's
    unknown row. A listed segment that covers no pixel keeps its row and its number.

    Source: the Crayon Prompt of CoLLaVO, arXiv 2402.11248 section 3; numbering as in its
    released code.

    Args:
        segment_maps: ``[B, H, W]`` int32 segment ids (values <= 0 mean "no segment"), or
            ``[B, H, W, 3]`` uint8 colours as COCO's panoptic PNGs have them, ``id = R + 256 G +
            65536 B``; or a list with one map ``[H_i, W_i]`` or ``[H_i, W_i, 3]`` per image, of
            any sizes and kinds.
        segment_ids: One ``[S_i]`` int32 per image, on the CPU: the ids, above 0, in any order.
        segment_classes: One ``[S_i]`` int32 per image, on the CPU: each segment's class, 0 to
            ``num_classes - 1``, or -1 for a segment of unknown class.
        grid: ``(grid_h, grid_w)``, e.g. ``(24, 24)`` or ``(35, 35)``; ``P = grid_h * grid_w``.
        num_classes: Number of classes.
        max_number: Last instance number; instances after it get number 0.
        reduce: ``"majority"``: the row with most pixels in the cell, the unknown row being a
            candidate, ties to the lower id (unknown lowest). ``"nearest"``: the row of the pixel
            at ``floor((i + 1/2) H / grid_h)``.
        backend: Ask for a backend by name; empty lets the device decide.

    Returns:
        The rows (per image its unknown row, then one row per segment in ascending id) and
        ``row_index`` ``[B, P]``, on the maps' device.

    Raises:
        TypeError: if a map is neither int32 nor uint8, or a list no int32 tensor.
        ValueError: if shapes, devices or numbers of images do not fit, a map has no pixel, a class
            is out of range, or an id is <= 0 or listed twice; the message names image and id.

    Example:
        >>> import torch
        >>> maps = torch.tensor([[[5, 5, 0], [5, 9, 9]]], dtype=torch.int32)
        >>> ids = torch.tensor([9, 5], dtype=torch.int32)
        >>> classes = torch.tensor([17, 17], dtype=torch.int32)
        >>> crayon = panoptic_lookup(maps, [ids], [classes], grid=(2, 3))
        >>> crayon.row_index.tolist()
        [[1, 1, 0, 1, 2, 2]]
        >>> crayon.row_class.tolist(), crayon.row_number.tolist()
        ([0, 18, 18], [0, 1, 2])
    """
    maps = _as_batches(segment_maps)
    images = sum(each.shape[0] for each in maps)
    ids = _flat("segment_ids", segment_ids, images)
    classes = _flat("segment_classes", segment_classes, images)
    counts = [each.shape[0] for each in segment_ids]
    for i, each in enumerate(segment_classes):
        if each.shape[0] != counts[i]:
            expect_tensor(f"segment_classes[{i}]", each, shape=[counts[i]], hint="one class per id")
    grid_h, grid_w = _grid(grid)
    inputs = LookupInputs(
        maps=maps,
        segment_ids=ids,
        segment_classes=classes,
        segment_counts=counts,
        grid_h=grid_h,
        grid_w=grid_w,
        num_classes=num_classes,
        max_number=max_number,
        reduce=reduce,
    )
    return CrayonMap(*OPERATOR(inputs, backend))


def _as_batches(segment_maps: Tensor | Sequence[Tensor]) -> list[Tensor]:
    if isinstance(segment_maps, Tensor):
        check_map("segment_maps", segment_maps, segment_maps.device)
        return [segment_maps]
    expect_list("segment_maps", segment_maps, "maps, or one tensor of them")
    batches = []
    for i, each in enumerate(segment_maps):
        name = f"segment_maps[{i}]"
        expect_tensor(name, each, dtypes=[torch.int32, torch.uint8])
        shape = ("H", "W") if each.dtype == torch.int32 else ("H", "W", 3)
        expect_tensor(name, each, shape=shape, hint="a list has one map per image")
        check_map(name, each[None], segment_maps[0].device)
        batches.append(each[None])
    return batches


def _flat(name: str, tensors: Sequence[Tensor], images: int) -> Tensor:
    """Check one CPU tensor per image and join them."""
    if not isinstance(tensors, Tensor):
        expect_list(name, tensors, "int32 tensors, one per image")
    if isinstance(tensors, Tensor) or len(tensors) != images:
        came = describe(tensors) if isinstance(tensors, Tensor) else f"{len(tensors)} entries"
        raise ValueError(f"{name}: expected a list of one tensor per image ({images}), got {came}")
    for i, each in enumerate(tensors):
        # There is one for every image of a batch: messages are made only where they are needed.
        if _is_list(each):
            continue
        expect_tensor(
            f"{name}[{i}]",
            each,
            shape=("S",),
            dtypes=[torch.int32],
            device=_HOST,
            hint="the lists stay on the CPU, where T is known without waiting for a GPU",
        )
    return torch.cat(list(tensors)) if tensors else torch.empty(0, dtype=torch.int32)


def _is_list(value: object) -> bool:
    return (
        isinstance(value, Tensor)
        and is_dense(value)
        and value.dtype == torch.int32
        and value.dim() == 1
        and value.device == _HOST
    )


def _grid(grid: tuple[int, int]) -> tuple[int, int]:
    if not isinstance(grid, (tuple, list)) or len(grid) != 2:
        raise ValueError(f"grid: expected (grid_h, grid_w), got {grid!r}")
    return int(grid[0]), int(grid[1])
