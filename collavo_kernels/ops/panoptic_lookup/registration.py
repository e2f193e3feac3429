"""``collavo::panoptic_lookup``: its bundles and its backends; it has no derivative."""

from __future__ import annotations

from typing import TYPE_CHECKING

from collavo_kernels._backends import ForwardOnly, LazyModule, triton_reason
from collavo_kernels._register import Operator
from collavo_kernels.ops.panoptic_lookup import cpu, reference
from collavo_kernels.ops.panoptic_lookup.inputs import LookupInputs, LookupResult, fake
from collavo_kernels.ops.panoptic_lookup.validation import validate

if TYPE_CHECKING:
    from collavo_kernels.ops.panoptic_lookup.triton import launch as triton
else:
    triton = LazyModule("collavo_kernels.ops.panoptic_lookup.triton.launch", triton_reason)

_Backend = ForwardOnly[LookupInputs, LookupResult]


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
    fake=fake,
    integral=True,
)
