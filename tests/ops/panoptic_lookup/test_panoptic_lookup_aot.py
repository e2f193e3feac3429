"""The Triton kernels compile ahead of time for every GPU target, without a spilled register."""

from __future__ import annotations

import pytest

from collavo_kernels.testing.aot import TARGETS, compile_ahead

pytest.importorskip("triton", reason="triton is not installed")


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize(("majority", "block"), [(True, 128), (True, 1024), (False, 512)])
def test_cells_compile(target: str, majority: bool, block: int) -> None:
    from collavo_kernels.ops.panoptic_lookup.triton import kernels, launch

    pointers = {"images": "*i64", "row_ids": "*i32", "row_index": "*i32", "facts": "*i32"}
    compiled = compile_ahead(
        kernels.lookup_cells,
        {**pointers, "grid_h": "i32", "grid_w": "i32"},
        {"STEPS": 6, "MAJORITY": majority, "BLOCK": block},
        target,
        num_warps=max(1, block // launch.PIXELS_PER_WARP),
    )
    assert compiled.spill_bytes == 0
    assert compiled.shared_bytes <= compiled.shared_limit


@pytest.mark.parametrize("target", TARGETS)
def test_rows_compile(target: str) -> None:
    from collavo_kernels.ops.panoptic_lookup.triton import kernels, launch

    outputs = ("row_class", "row_number", "row_image", "row_segment_id", "row_area")
    pointers = {name: "*i32" for name in ("columns", "facts", *outputs)}
    compiled = compile_ahead(
        kernels.finish_rows,
        {**pointers, "images": "*i64", "row_box": "*fp32", "total": "i32"},
        {"ROWS": launch.ROWS},
        target,
    )
    assert compiled.spill_bytes == 0
    assert compiled.shared_bytes <= compiled.shared_limit
