"""Checks of the operator's arguments: made where the operator runs, so native code can trust them.

Values (ids, classes) are checked where the rows are made of them.
"""

from __future__ import annotations

import torch
from torch import Tensor

from collavo_kernels._validation import expect_choice, expect_int, expect_tensor
from collavo_kernels.ops.panoptic_lookup.inputs import REDUCTIONS, LookupInputs

# Coordinates, doubled cell products and areas then stay within int32 in every backend.
MAX_SIDE = 32767
_HOST = torch.device("cpu")


def validate(inputs: LookupInputs) -> None:
    """Check shapes, dtypes, devices and options of the operator's inputs.

    Raises:
        TypeError: if a dtype is wrong.
        ValueError: if a shape, device, number or option is wrong.
    """
    images, device = 0, inputs.device
    for i, each in enumerate(inputs.maps):
        check_map(f"segment_maps[{i}]", each, device)
        images += each.shape[0]
    counts = inputs.segment_counts
    if images != len(counts):
        raise ValueError(f"segment_counts: expected one per image ({images}), got {len(counts)}")
    total = sum(counts)
    lists = (("segment_ids", inputs.segment_ids), ("segment_classes", inputs.segment_classes))
    for name, each in lists:
        expect_tensor(name, each, shape=[total], dtypes=[torch.int32], device=_HOST)
    for i, count in enumerate(counts):
        if count < 0:
            expect_int(f"segment_counts[{i}]", count, minimum=0)
    for name, value, minimum, maximum in (
        ("grid[0]", inputs.grid_h, 1, MAX_SIDE),
        ("grid[1]", inputs.grid_w, 1, MAX_SIDE),
        ("num_classes", inputs.num_classes, 0, 2**31 - 2),
        ("max_number", inputs.max_number, 0, None),
    ):
        if value < minimum or (maximum is not None and value > maximum):
            expect_int(name, value, minimum=minimum, maximum=maximum)
    if inputs.reduce not in REDUCTIONS:
        expect_choice("reduce", inputs.reduce, REDUCTIONS)


def check_map(name: str, value: Tensor, device: torch.device) -> None:
    """Check one batch of maps: ids ``[n, H, W]`` int32, or colours ``[n, H, W, 3]`` uint8.

    Raises:
        TypeError: if it is no int32 or uint8 tensor.
        ValueError: if its shape or device is another, or its images have no pixel or too many.
    """
    hint = "a map is int32 ids or uint8 colours in COCO's encoding, all maps on one device"
    expect_tensor(name, value, dtypes=[torch.int32, torch.uint8], device=device, hint=hint)
    shape = ("B", "H", "W") if value.dtype == torch.int32 else ("B", "H", "W", 3)
    expect_tensor(name, value, shape=shape, hint=hint)
    for axis, size in (("height", value.shape[1]), ("width", value.shape[2])):
        if size < 1 or size > MAX_SIDE:
            raise ValueError(
                f"{name}: expected a {axis} of 1 to {MAX_SIDE} pixels, got shape "
                f"{list(value.shape)}; an image without a map takes a map of zeros"
            )
