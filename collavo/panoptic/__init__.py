"""Panoptic maps, what they are read from or drawn by, and what is said of them in words.

Pictures of maps (``collavo.pictures``) and prepared data sets (``collavo.prepared``) stand on this
package. Their public names are answered here too, loaded when they are asked for.
"""

from __future__ import annotations

import importlib
from typing import Any

from collavo.panoptic.categories import (
    CATEGORY_IDS,
    CLASS_NAMES,
    DISPLAY_NAMES,
    NUM_CLASSES,
    NUM_THINGS,
    category_id_from_index,
    class_index,
    coco_categories,
    display_name,
    index_from_category_id,
    is_thing,
)
from collavo.panoptic.coco import (
    CocoPanopticDataset,
    PanopticSample,
    find_panoptic_map,
)
from collavo.panoptic.coco_index import Skipped, find_coco_folder
from collavo.panoptic.images import read_image
from collavo.panoptic.instructions import (
    TEMPLATES,
    Instruction,
    ParsedInstruction,
    build_instruction,
    build_instructions,
    draw_instruction,
    parse_instruction,
)
from collavo.panoptic.maps import (
    PanopticMap,
    read_panoptic_colours,
    read_panoptic_png,
    write_panoptic_png,
)
from collavo.panoptic.prompts import (
    BoxPrompt,
    ClickPrompt,
    MaskPrompt,
    ScribblePrompt,
    VisualPrompt,
    rasterize_prompts,
)
from collavo.panoptic.segmenter_cache import CachedMaps, CachedSegmenter
from collavo.panoptic.segmenters import TransformersSegmenter
from collavo.panoptic.text import (
    Detection,
    detections_by_image,
    detections_from_crayon,
    detections_from_map,
    format_box,
    format_names,
    format_objects,
    object_prefix,
    parse_names,
    parse_objects,
    split_prefix,
)

# Names that lived here before their packages did, and where they are now.
_MOVED = {
    "PrepareReport": "collavo.prepared",
    "PrepareSettings": "collavo.prepared",
    "PreparedDataset": "collavo.prepared",
    "PreparedSample": "collavo.prepared",
    "SampleStream": "collavo.prepared",
    "SkipLog": "collavo.prepared",
    "draw_scene": "collavo.pictures",
    "prepare_folder": "collavo.prepared",
    "save_scene": "collavo.pictures",
}

__all__ = [
    "CATEGORY_IDS",
    "CLASS_NAMES",
    "DISPLAY_NAMES",
    "NUM_CLASSES",
    "NUM_THINGS",
    "TEMPLATES",
    "BoxPrompt",
    "CachedMaps",
    "CachedSegmenter",
    "ClickPrompt",
    "CocoPanopticDataset",
    "Detection",
    "Instruction",
    "MaskPrompt",
    "PanopticMap",
    "PanopticSample",
    "ParsedInstruction",
    "ScribblePrompt",
    "Skipped",
    "TransformersSegmenter",
    "VisualPrompt",
    "build_instruction",
    "build_instructions",
    "category_id_from_index",
    "class_index",
    "coco_categories",
    "detections_by_image",
    "detections_from_crayon",
    "detections_from_map",
    "display_name",
    "draw_instruction",
    "find_coco_folder",
    "find_panoptic_map",
    "format_box",
    "format_names",
    "format_objects",
    "index_from_category_id",
    "is_thing",
    "object_prefix",
    "parse_instruction",
    "parse_names",
    "parse_objects",
    "rasterize_prompts",
    "read_image",
    "read_panoptic_colours",
    "read_panoptic_png",
    "split_prefix",
    "write_panoptic_png",
]


def __getattr__(name: str) -> Any:
    if name not in _MOVED:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_MOVED[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_MOVED})
