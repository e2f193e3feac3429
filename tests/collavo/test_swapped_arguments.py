"""Arguments in the wrong place, and paths where an object is expected, are named."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from tiny import tiny_processor
from torch import nn

import collavo
from collavo import panoptic
from collavo.evaluation import answer_questions, box_questions, class_questions
from collavo.loading import load_folder
from collavo.pictures import draw_scene, save_scene
from collavo.prepared import PreparedDataset, prepare_folder
from collavo.processing import make_image_processor
from collavo.train import (
    CollavoTrainer,
    CollavoTrainingArguments,
    CrayonCollator,
    CrayonInstructionDataset,
)
from collavo.train.stages import prepare_stage

MODEL = nn.Linear(2, 2)
IMAGE = Image.new("RGB", (4, 4))
IDS = torch.ones(4, 4, dtype=torch.int32)
MAP = panoptic.PanopticMap.from_segments(IDS, [1], [3])
PATH = Path("somewhere")
PROCESSOR = tiny_processor()
CASES: list[tuple[Callable[..., Any], tuple[Any, ...], str]] = [
    (collavo.apply_to_llava, (PROCESSOR,), "model: expected a vision-language .* got CollavoPr"),
    (collavo.apply_to_llava, (PATH,), "model: .* got PosixPath; .*from_pretrained loads one"),
    (collavo.load_pretrained, (MODEL,), "folder: expected the path of a model folder, got Linear"),
    (collavo.load_pretrained, (None,), "folder: expected the path .* got NoneType"),
    (load_folder, (PROCESSOR,), "folder: expected the path of a model folder, got CollavoProc"),
    (collavo.convert_state_dict, (PATH, {}), "official_state_dict: .* got PosixPath; load the"),
    (collavo.convert_state_dict, ({}, MODEL), "official_config: expected a dictionary, got Linear"),
    (
        collavo.CollavoProcessor,
        (PROCESSOR.tokenizer, make_image_processor(16)),
        r"tokenizer: expected a tokenizer, got C.*CollavoProcessor\(image_processor, tokenizer",
    ),
    (collavo.CollavoProcessor, (None, "name"), "tokenizer: expected a tokenizer, got str"),
    (prepare_stage, (PROCESSOR, "cpt"), "model: expected a CoLLaVO model .* got CollavoProcessor"),
    (prepare_stage, ("cpt", MODEL), "stage: expected one of .* got Linear"),
    (CrayonCollator, (MODEL,), "processor: expected a CollavoProcessor, got Linear"),
    (CrayonInstructionDataset, (PATH,), "samples: expected a CocoPanopticDataset or .* got Posix"),
    (answer_questions, (PROCESSOR, MODEL, [], []), "model: expected a model, got CollavoProcessor"),
    (answer_questions, ("name", PROCESSOR, [], []), "model: expected a model, got str"),
    (class_questions, (PATH,), "samples: expected a CocoPanopticDataset, got PosixPath"),
    (box_questions, (MODEL,), "samples: expected a CocoPanopticDataset, got Linear"),
    (panoptic.CocoPanopticDataset, (None, PATH, PATH), "images: expected the path of a folder of"),
    (panoptic.CachedSegmenter, (PATH, lambda image: image), "segmenter: expected a segmenter, got"),
    (panoptic.detections_from_map, (PATH,), "panoptic: expected a PanopticMap, got PosixPath"),
    (panoptic.detections_from_crayon, (MAP,), "crayon: expected a CrayonMap, got PanopticMap"),
    (prepare_folder, (PATH, PATH), r"coco: expected a CocoFolder, got PosixPath; find_coco_folder"),
    (PreparedDataset, (MAP,), "folder: expected the path of a prepared folder, got PanopticMap"),
    (draw_scene, (MAP, IMAGE), r"image: expected a path, a PIL image or .*, got PanopticMap"),
    (draw_scene, (IMAGE, PATH), "panoptic: expected a PanopticMap, got PosixPath"),
    (save_scene, (IMAGE, "x.png", MAP), "path: expected the path of the picture to write, got Ima"),
]


@pytest.mark.parametrize(("function", "arguments", "message"), CASES)
def test_the_argument_is_named(
    function: Callable[..., Any], arguments: tuple[Any, ...], message: str
) -> None:
    with pytest.raises((TypeError, ValueError), match=f"^{message}"):
        function(*arguments)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ((PROCESSOR, None), "model: expected a CoLLaVO model"),
        ((MODEL, "data"), "train_dataset: expected a data set, got str"),
        ((MODEL, [1], None, PROCESSOR), r"data_collator: expected CrayonCollator\(processor\)"),
    ],
)
def test_the_trainer_names_them(given: tuple[Any, ...], message: str, tmp_path: Path) -> None:
    arguments = CollavoTrainingArguments(output_dir=str(tmp_path), stage="cpt", use_cpu=True)
    model, train, vl, collator = (*given, None, None, None)[:4]
    with pytest.raises((TypeError, ValueError), match=message):
        CollavoTrainer(model, arguments, train, vl, data_collator=collator)
    with pytest.raises(TypeError, match="args: expected CollavoTrainingArguments, got Linear"):
        CollavoTrainer(arguments, MODEL)  # type: ignore[arg-type]
