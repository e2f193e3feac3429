"""``collavo::panoptic_lookup``: its fake and its backends. All its results are integers' facts."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from collavo_kernels._backends import ForwardOnly, LazyModule, triton_reason
from collavo_kernels._register import Operator
from collavo_kernels.ops.panoptic_lookup import cpu, reference
from collavo_kernels.ops.panoptic_lookup.inputs import LookupInputs, LookupResult
from collavo_kernels.ops.panoptic_lookup.validation import validate

if TYPE_CHECKING:
    from collavo_kernels.ops.panoptic_lookup.triton import launch as triton
else:
    triton = LazyModule("collavo_kernels.ops.panoptic_lookup.triton.launch")

_Backend = ForwardOnly[LookupInputs, LookupResult]


def _fake(inputs: LookupInputs) -> LookupResult:
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


OPERATOR = Operator(
    "panoptic_lookup",
    inputs=LookupInputs,
    result=LookupResult,
    backends=(
        _Backend("cpu", cpu.forward, devices=("cpu",), unavailable=cpu.unavailable),
        _Backend("triton", triton.forward, devices=("cuda",), unavailable=triton_reason),
        _Backend("reference", reference.forward),
    ),
    validate=validate,
    fake=_fake,
)
