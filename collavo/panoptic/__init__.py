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
from collavo.panoptic.coco import (
    CocoPanopticDataset,
    PanopticSample,
    find_panoptic_map,
    read_image,
)
from collavo.panoptic.coco_index import Skipped, find_coco_folder
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
from collavo.panoptic.segmenter_cache import CachedSegmenter
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
from collavo.pictures.drawing import draw_scene, save_scene
from collavo.prepared.read import PreparedDataset, PreparedSample
from collavo.prepared.shards import PrepareSettings
from collavo.prepared.streaming import SampleStream, SkipLog
from collavo.prepared.write import PrepareReport, prepare_folder

__all__ = [
    "CATEGORY_IDS",
    "CLASS_NAMES",
    "DISPLAY_NAMES",
    "NUM_CLASSES",
    "NUM_THINGS",
    "TEMPLATES",
    "BoxPrompt",
    "CachedSegmenter",
    "ClickPrompt",
    "CocoPanopticDataset",
    "Detection",
    "Instruction",
    "MaskPrompt",
    "PanopticMap",
    "PanopticSample",
    "ParsedInstruction",
    "PrepareReport",
    "PrepareSettings",
    "PreparedDataset",
    "PreparedSample",
    "SampleStream",
    "ScribblePrompt",
    "SkipLog",
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
    "draw_scene",
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
    "prepare_folder",
    "rasterize_prompts",
    "read_image",
    "read_panoptic_colours",
    "read_panoptic_png",
    "save_scene",
    "split_prefix",
    "write_panoptic_png",
]
