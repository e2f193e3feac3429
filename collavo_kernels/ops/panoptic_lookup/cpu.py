"""C++ on the CPU: one pass over every map, bands of cells in parallel."""

from __future__ import annotations

import torch

from collavo_kernels._native import native, native_reason
from collavo_kernels.ops.panoptic_lookup.inputs import (
    LookupInputs,
    LookupResult,
    image_table,
    row_columns,
    with_packed_lines,
)

BEST_ISA = -1


def unavailable() -> str | None:
    """Say why the compiled kernel cannot run here, or None."""
    if native() is not None and not hasattr(native(), "panoptic_lookup"):
        return "the compiled module is older than this package; install the package again"
    return native_reason()


def forward(inputs: LookupInputs, isa: int = BEST_ISA) -> LookupResult:
    """Run the compiled kernel; ``isa`` is a code of ``_native.ISA_CODES``.

    Raises:
        RuntimeError: if there is no compiled module.
    """
    module = native()
    if module is None:
        raise RuntimeError(f"panoptic_lookup: {native_reason()}")
    maps = with_packed_lines(inputs.maps)
    images = image_table(maps, inputs.segment_counts)
    # Outputs with memory of their own; NumPy copies small columns in a third of torch's time.
    columns = row_columns(inputs)
    row_class, number, row_image, segment = (torch.from_numpy(each.copy()) for each in columns)
    cells = inputs.grid_h * inputs.grid_w
    index = torch.empty(len(inputs.segment_counts), cells, dtype=torch.int32)
    box = torch.empty(columns.shape[1], 4)
    area = torch.empty(columns.shape[1], dtype=torch.int32)
    module.panoptic_lookup(
        isa,
        images.data_ptr(),
        len(inputs.segment_counts),
        segment.data_ptr(),
        inputs.grid_h,
        inputs.grid_w,
        inputs.reduce == "majority",
        index.data_ptr(),
        box.data_ptr(),
        area.data_ptr(),
    )
    return LookupResult(index, row_class, number, row_image, segment, box, area)
