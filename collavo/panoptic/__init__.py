"""Panoptic maps and what is made from them: objects as text, instructions and pictures."""

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
from collavo.panoptic.coco import CocoPanopticDataset, PanopticSample, read_image
from collavo.panoptic.drawing import draw_scene, save_scene
from collavo.panoptic.instructions import TEMPLATES, Instruction, build_instruction
from collavo.panoptic.maps import (
    PanopticMap,
    read_panoptic_colours,
    read_panoptic_png,
    write_panoptic_png,
)
from collavo.panoptic.segmenters import Mask2FormerSegmenter
from collavo.panoptic.text import (
    Detection,
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

__all__ = [
    "CATEGORY_IDS",
    "CLASS_NAMES",
    "DISPLAY_NAMES",
    "NUM_CLASSES",
    "NUM_THINGS",
    "TEMPLATES",
    "CocoPanopticDataset",
    "Detection",
    "Instruction",
    "Mask2FormerSegmenter",
    "PanopticMap",
    "PanopticSample",
    "build_instruction",
    "category_id_from_index",
    "class_index",
    "coco_categories",
    "detections_from_crayon",
    "detections_from_map",
    "display_name",
    "draw_scene",
    "format_box",
    "format_names",
    "format_objects",
    "index_from_category_id",
    "is_thing",
    "object_prefix",
    "parse_names",
    "parse_objects",
    "read_image",
    "read_panoptic_colours",
    "read_panoptic_png",
    "save_scene",
    "split_prefix",
    "write_panoptic_png",
]
