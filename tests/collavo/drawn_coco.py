"""A scene of drawn segments, and a COCO panoptic folder of such."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from collavo.panoptic import category_id_from_index, coco_categories, write_panoptic_png

Scene = tuple[torch.Tensor, dict[int, int]]


def draw_scene(height: int = 12, width: int = 16) -> Scene:
    """Sky over grass with two horses and a person; ids are not contiguous."""
    ids = torch.zeros(height, width, dtype=torch.int32)
    ids[: height // 2] = 900
    ids[height // 2 :] = 70000
    ids[2:8, 1:5] = 12
    ids[4:10, 9:15] = 256
    ids[3:9, 6:8] = 300
    return ids, {900: 119, 70000: 125, 12: 17, 256: 17, 300: 0}


def write_coco(folder: Path, scenes: Sequence[Scene]) -> Path:
    """Write scenes as a COCO panoptic folder with images, maps and a JSON."""
    (folder / "images").mkdir(parents=True)
    (folder / "panoptic").mkdir()
    images, annotations = [], []
    for number, (ids, classes) in enumerate(scenes, start=1):
        height, width = ids.shape
        colours = np.random.default_rng(number).integers(0, 256, (height, width, 3), dtype=np.uint8)
        Image.fromarray(colours).save(folder / "images" / f"{number:03d}.png")
        write_panoptic_png(folder / "panoptic" / f"{number:03d}.png", ids)
        name = {"file_name": f"{number:03d}.png"}
        images.append({"id": number, "height": height, "width": width, **name})
        infos = [{"id": i, "category_id": category_id_from_index(c)} for i, c in classes.items()]
        annotations.append({"image_id": number, "segments_info": infos, **name})
    content = {"images": images, "annotations": annotations, "categories": coco_categories()}
    (folder / "panoptic.json").write_text(json.dumps(content))
    return folder
