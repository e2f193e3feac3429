"""LLaVA's two stages with a real decoder: what it says of drawn scenes before and after."""

from __future__ import annotations

import copy
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from collavo import CollavoForConditionalGeneration, CollavoProcessor
from collavo.conversations import ConversationDataset
from collavo.conversion import build_llava
from collavo.demo.base import Patches
from collavo.demo.llava.captions import score_captions
from collavo.demo.llava.parts import PARTS, VISION
from collavo.demo.llava.stages import ADAPTER, for_stage, run_stage
from collavo.demo.llava.stages import PARTS as TRAINED
from collavo.demo.llava.talks import Talker, caption_questions, place_questions, write_records
from collavo.demo.scenes import make_scene
from collavo.demo.storage import Scenes, write_scenes
from collavo.evaluation import answer_questions, score
from collavo.train import CrayonCollator, PictureMaps

Row = dict[str, Any]
BATCH, RATE = 8, {"align": 2e-3, "instruct": 1e-3}


def stage_rows(
    decoder: Any, tokenizer: Any, *, align: int = 40, instruct: int = 30, held_out: int = 16
) -> Iterator[Row]:
    """Yield what ``align`` and ``instruct`` did to a LLaVA of the decoder and the demo's tower.

    Args:
        decoder: The language model; stays as it is.
        tokenizer: Its own.
        align: Steps of the projector alone.
        instruct: Steps of projector, adapter and crayon, the decoder in 4 bits.
        held_out: Scenes that are asked about.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        language = _dense(decoder)
        language.resize_token_embeddings(len(tokenizer))  # it has <image> already
        language.save_pretrained(folder / "language")
        tokenizer.save_pretrained(folder / "language")
        build_llava(folder / "language", PARTS / VISION, folder / "built")
        model = CollavoForConditionalGeneration.from_pretrained(
            folder / "built", dtype=torch.float32
        )
        course = _Course(model, CollavoProcessor.from_pretrained(folder / "built"), folder)
        course.draw(BATCH * max(align, instruct), held_out)
        yield course.measured("built", "on")
        yield course.trained("align", align)
        yield course.measured("aligned", "on")
        model.add_dual_qlora((ADAPTER,), rank=16, alpha=32.0, dropout=0.05)
        yield course.trained("instruct", instruct)
        for row, use in (("instructed", "on"), ("crayon left out", "off")):
            yield course.measured(row, use)


def _dense(decoder: Any) -> Any:
    """Return the same model without the mark that its file was packed, which cannot be saved."""
    config = copy.deepcopy(decoder.config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    made = type(decoder)(config)
    made.load_state_dict(decoder.state_dict())
    return made


class _Course:
    """The scenes, and what is asked about those held out."""

    def __init__(self, model: nn.Module, processor: CollavoProcessor, folder: Path) -> None:
        self.model, self.processor, self.folder = model, processor, folder

    def draw(self, train: int, held_out: int) -> None:
        rng = np.random.default_rng(0)
        for name, count in (("train", train), ("test", held_out)):
            write_scenes(self.folder / name, (make_scene(rng) for _ in range(count)))
        self.train, self.test = Scenes(self.folder / "train"), Scenes(self.folder / "test")
        patches = Patches.read(self.train, self.processor.image_processor)
        talker = Talker(self.train, patches.words(), seed=0)
        write_records(self.folder / "align.json", talker.captions())
        texts = round(0.4 * train)
        mixed = talker.about_images(range(train - texts)) + talker.about_words(range(texts))
        write_records(self.folder / "instruct.json", mixed)
        self.questions = [
            *caption_questions(self.test),
            *place_questions(self.test),
        ]

    def data(self, path: Path, images: Path, stage: str) -> ConversationDataset:
        processor = for_stage(self.processor, stage)
        data = ConversationDataset.from_llava_json(
            path, images=images / "images", processor=processor, workers=0
        )
        scenes = self.train if images.name == "train" else self.test
        data.panoptic = PictureMaps(scenes, data.pictures(), folder=images / "images")
        return data

    def trained(self, stage: str, steps: int) -> Row:
        start = time.process_time()
        made = run_stage(
            self.model,
            self.processor,
            self.data(self.folder / f"{stage}.json", self.folder / "train", stage),
            stage,
            folder=self.folder / "run",
            steps=steps,
            batch_size=BATCH,
            learning_rate=RATE[stage],
            seed=0,
            parts=TRAINED if stage == "instruct" else None,
            progress=False,
        )
        return {
            "what": f"{stage}: {steps} steps of {BATCH}",
            "losses": made.losses,
            "moved its parts alone": made.held,
            "CPU seconds": round(time.process_time() - start),
        }

    def measured(self, what: str, crayon: Any) -> Row:
        answers = answer_questions(
            self.model,
            self.processor,
            self.test,
            self.questions,
            crayon=crayon,
            batch_size=24,
            max_new_tokens=24,
        )
        count = len(self.test)
        rest = (self.questions[count:], answers[count:])
        captions = score_captions(self.questions[:count], answers[:count])
        return {
            "what": what,
            "crayon": crayon,
            "caption loss": self.loss(crayon),
            "captions": {
                "right": captions.right,
                "precision": captions.precision,
                "recall": captions.recall,
            },
            "places": score("b2c", *rest).accuracy,
            "says": answers[0],
            "true": self.questions[0].answer,
        }

    @torch.no_grad()
    def loss(self, crayon: Any) -> float:
        """Return the loss of the held-out scenes' captions."""
        from collavo.evaluation.answering import with_crayon

        talker = Talker(self.test, [""] * len(self.test), seed=0)
        path = self.folder / "held_out.json"
        write_records(path, talker.captions())
        data = self.data(path, self.folder / "test", "instruct")
        collate = CrayonCollator(self.processor, object_text=False)
        batch = with_crayon(collate([data[i] for i in range(len(data))]), crayon)
        return float(self.model.eval()(**batch).loss)
