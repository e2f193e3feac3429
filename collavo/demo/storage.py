"""Scenes on disk: images, panoptic PNGs and one JSON in COCO panoptic format."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from collavo import writing
from collavo.demo.scenes import SIZE, STUFF_NAMES, THING_NAMES, Scene
from collavo.panoptic import (
    CocoPanopticDataset,
    PanopticSample,
    category_id_from_index,
    class_index,
    coco_categories,
    write_panoptic_png,
)


class Scenes(CocoPanopticDataset):
    """A COCO panoptic data set whose samples stay in memory once they have been read.

    Args:
        folder: Written by :func:`write_scenes`.
    """

    def __init__(self, folder: Path) -> None:
        super().__init__(folder / "images", folder / "panoptic", folder / "panoptic.json")
        self._samples: dict[int, PanopticSample] = {}

    def __getitem__(self, index: int) -> PanopticSample:
        """Return one sample, read from disk the first time.

        Args:
            index: 0..len-1.
        """
        if index not in self._samples:
            self._samples[index] = super().__getitem__(index)
        return self._samples[index]


def write_scenes(folder: Path, scenes: Iterable[Scene]) -> None:
    """Write scenes as a COCO panoptic folder: ``images/``, ``panoptic/`` and ``panoptic.json``.

    Images are PNG, which keeps every pixel: JPEG would smear the hues of small pictures.

    Args:
        folder: Is made; files of the same names are written over.
        scenes: The scenes, numbered from 1.
    """
    for name in ("images", "panoptic"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    (folder / "panoptic.json").unlink(missing_ok=True)
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for number, scene in enumerate(scenes, start=1):
        name = f"{number:06d}.png"
        Image.fromarray(scene.image).save(folder / "images" / name, compress_level=1)
        write_panoptic_png(folder / "panoptic" / name, torch.from_numpy(scene.segmentation))
        images.append({"id": number, "file_name": name, "width": SIZE, "height": SIZE})
        infos = _segments_info(scene)
        annotations.append({"image_id": number, "file_name": name, "segments_info": infos})
    content = {
        "images": images,
        "annotations": annotations,
        "categories": coco_categories(class_index(n) for n in (*THING_NAMES, *STUFF_NAMES)),
    }
    # The last file: with it, the scenes are all there.
    writing.write_file(folder / "panoptic.json", json.dumps(content).encode())


def _segments_info(scene: Scene) -> list[dict[str, Any]]:
    """Return COCO's entries: ``bbox`` is x, y, width, height; ``area`` counts pixels."""
    infos = []
    for segment in scene.segments:
        x1, y1, x2, y2 = segment.box
        infos.append(
            {
                "id": segment.segment_id,
                "category_id": category_id_from_index(class_index(segment.name)),
                "iscrowd": 0,
                "bbox": [x1, y1, x2 - x1, y2 - y1],
                "area": int((scene.segmentation == segment.segment_id).sum()),
            }
        )
    return infos
