"""Schema, checks of the flat operands, fake implementation and backends of the operator."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor

from collavo_kernels._backends import Backend, Operator, triton_reason
from collavo_kernels._validation import expect_choice, expect_int, expect_tensor
from collavo_kernels.ops.panoptic_lookup import cpu, cuda, reference
from collavo_kernels.ops.panoptic_lookup.inputs import (
    REDUCTIONS,
    LookupInputs,
    LookupResult,
    row_columns,
)

NAME = "panoptic_lookup"
# Coordinates, doubled cell products and areas then stay within int32 in every backend.
MAX_SIDE = 32767
SCHEMA = (
    "panoptic_lookup(Tensor[] maps, Tensor segment_ids, Tensor segment_classes, "
    "SymInt[] segment_counts, int grid_h, int grid_w, int num_classes, int max_number, "
    'str reduce, str backend="") -> (Tensor row_index, Tensor row_class, Tensor row_number, '
    "Tensor row_image, Tensor row_segment_id, Tensor row_box, Tensor row_area)"
)


def _triton_forward(inputs: LookupInputs) -> LookupResult:
    from collavo_kernels.ops.panoptic_lookup.triton.launch import forward

    return forward(inputs)


def _cuda_reason() -> str | None:
    return cuda.UNAVAILABLE


OPERATOR: Operator[LookupInputs] = Operator(
    NAME,
    (
        Backend("cpu", cpu.forward, devices=("cpu",), unavailable=cpu.reason_against),
        Backend("cuda", cuda.forward, devices=("cuda",), unavailable=_cuda_reason),
        Backend("triton", _triton_forward, devices=("cuda",), unavailable=triton_reason),
        Backend("reference", reference.forward),
    ),
)


def _check(
    maps: Sequence[Tensor],
    segment_ids: Tensor,
    segment_classes: Tensor,
    segment_counts: Sequence[int],
    grid_h: int,
    grid_w: int,
    num_classes: int,
    max_number: int,
    reduce: str,
) -> None:
    """Check the flat operands, which a direct call of the operator may bring in any shape."""
    images = 0
    for i, each in enumerate(maps):
        check_map(f"segment_maps[{i}]", each, maps[0].device)
        images += each.shape[0]
    if images != len(segment_counts):
        raise ValueError(
            f"segment_counts: expected one per image ({images}), got {len(segment_counts)}"
        )
    host = torch.device("cpu")
    total = sum(segment_counts)
    for name, each in (("segment_ids", segment_ids), ("segment_classes", segment_classes)):
        expect_tensor(name, each, shape=[total], dtypes=[torch.int32], device=host)
    for i, count in enumerate(segment_counts):
        if count < 0:
            expect_int(f"segment_counts[{i}]", count, minimum=0)
    expect_int("grid[0]", grid_h, minimum=1, maximum=MAX_SIDE)
    expect_int("grid[1]", grid_w, minimum=1, maximum=MAX_SIDE)
    expect_int("num_classes", num_classes, minimum=0, maximum=2**31 - 2)
    expect_int("max_number", max_number, minimum=0)
    expect_choice("reduce", reduce, REDUCTIONS)


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


def _forward(
    maps: Sequence[Tensor],
    segment_ids: Tensor,
    segment_classes: Tensor,
    segment_counts: Sequence[int],
    grid_h: int,
    grid_w: int,
    num_classes: int,
    max_number: int,
    reduce: str,
    backend: str = "",
) -> LookupResult:
    _check(
        maps,
        segment_ids,
        segment_classes,
        segment_counts,
        grid_h,
        grid_w,
        num_classes,
        max_number,
        reduce,
    )
    columns = row_columns(segment_ids, segment_classes, segment_counts, num_classes, max_number)
    counts = tuple(segment_counts)
    inputs = LookupInputs(tuple(maps), columns, counts, grid_h, grid_w, reduce)
    return OPERATOR.select(inputs, inputs.device.type, backend).forward(inputs)  # type: ignore[no-any-return]


def _fake(
    maps: Sequence[Tensor],
    segment_ids: Tensor,
    segment_classes: Tensor,
    segment_counts: Sequence[int],
    grid_h: int,
    grid_w: int,
    num_classes: int,
    max_number: int,
    reduce: str,
    backend: str = "",
) -> LookupResult:
    _check(
        maps,
        segment_ids,
        segment_classes,
        segment_counts,
        grid_h,
        grid_w,
        num_classes,
        max_number,
        reduce,
    )
    device = maps[0].device if maps else segment_ids.device
    images = len(segment_counts)
    rows = segment_ids.shape[0] + images

    def integers(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.int32, device=device)

    return LookupResult(
        row_index=integers(images, grid_h * grid_w),
        row_class=integers(rows),
        row_number=integers(rows),
        row_image=integers(rows),
        row_segment_id=integers(rows),
        row_box=torch.empty(rows, 4, dtype=torch.float32, device=device),
        row_area=integers(rows),
    )


_library: Any = cast(Any, torch.library).Library("collavo", "FRAGMENT")
_library.define(SCHEMA)
_library.impl(NAME, _forward, "CompositeExplicitAutograd")
torch.library.register_fake(f"collavo::{NAME}", _fake, lib=_library)
