"""A COCO panoptic annotation: its own areas and boxes are what the operator finds."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from collavo_kernels import panoptic_lookup


@pytest.mark.parametrize("backend", ["reference", ""])
def test_areas_and_boxes_are_those_of_the_annotation(coco_sample: Any, backend: str) -> None:
    rgb = np.asarray(Image.open(coco_sample.png), np.int32)
    segmentation = torch.from_numpy(rgb @ np.array([1, 256, 65536], np.int32)).int()
    info = coco_sample.segments()
    ids = torch.tensor([each["id"] for each in info], dtype=torch.int32)
    crayon = panoptic_lookup(
        [segmentation], [ids], [torch.zeros_like(ids)], grid=(35, 35), backend=backend
    )
    height, width = segmentation.shape
    row_of = {segment: row for row, segment in enumerate(crayon.row_segment_id.tolist())}
    for each in info:
        row = row_of[each["id"]]
        assert int(crayon.row_area[row]) == each["area"]
        x, y, w, h = each["bbox"]
        expected = torch.tensor([x / width, y / height, (x + w) / width, (y + h) / height])
        torch.testing.assert_close(crayon.row_box[row], expected)
    assert int(crayon.row_area.sum()) == height * width
    assert set(crayon.row_index.unique().tolist()) <= set(range(len(info) + 1))
