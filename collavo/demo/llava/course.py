"""The experiment: build a LLaVA of two parts, align it, instruct it with the crayon, measure it."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch

from collavo import writing
from collavo.conversations import ConversationDataset
from collavo.conversion import build_llava
from collavo.demo.base import Patches
from collavo.demo.llava.captions import CaptionScore, score_captions
from collavo.demo.llava.parts import LANGUAGE, VISION
from collavo.demo.llava.parts import PARTS as SHIPPED
from collavo.demo.llava.settings import Settings
from collavo.demo.llava.stages import ADAPTER, PARTS, StageRun, for_stage, run_stage
from collavo.demo.llava.talks import Talker, caption_questions, place_questions, write_records
from collavo.demo.scenes import THING_NAMES, make_scene
from collavo.demo.storage import Scenes, write_scenes
from collavo.evaluation import ObjectQuestion, ObjectScore, answer_questions, class_questions, score
from collavo.evaluation.answering import CrayonUse
from collavo.model.files import weight_patterns
from collavo.model.llava import CollavoForConditionalGeneration
from collavo.processing.processor import CollavoProcessor
from collavo.train import PictureMaps

Say = Callable[[str], None]


@dataclass(frozen=True)
class Measurement:
    """How a model described and answered at one point of the experiment.

    Args:
        crayon: How the crayon was used.
        captions: Of held-out scenes.
        presence: Whether there is any object of a class.
        places: Which object is at the top, and at the bottom.
    """

    crayon: CrayonUse
    captions: CaptionScore
    presence: ObjectScore
    places: ObjectScore

    def as_dict(self) -> dict[str, Any]:
        """Return plain numbers."""
        return {
            "crayon": self.crayon,
            "captions": asdict(self.captions),
            "presence": self.presence.as_dict(),
            "places": self.places.as_dict(),
        }


@dataclass
class Results:
    """Everything the report tells."""

    measurements: dict[str, Measurement] = field(default_factory=dict)
    stages: dict[str, StageRun] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    answers: dict[str, list[str]] = field(default_factory=dict)
    facts: dict[str, Any] = field(default_factory=dict)


class Course:
    """One run of ``collavo demo --llava``.

    Args:
        settings: Sizes and steps.
        seed: Of everything random.
        folder: Where scenes, records, models and report go.
        say: Prints a line.
        progress: Whether to show progress bars.
    """

    def __init__(
        self, settings: Settings, seed: int, folder: Path, say: Say, progress: bool = True
    ) -> None:
        self.settings = settings
        self.seed = seed
        self.folder = folder
        self.say = say
        self.progress = progress
        self.results = Results()
        self.train: Scenes
        self.test: Scenes
        self.model: CollavoForConditionalGeneration
        self.processor: CollavoProcessor
        self.questions: list[ObjectQuestion]

    def run(self) -> Results:
        """Do all of it, in order."""
        self.draw()
        self.build()
        self.measure("built", "on")
        self.write_conversations()
        self.align()
        self.measure("aligned", "on")
        self.instruct()
        self.measure("instructed", "on")
        self.measure("crayon shuffled", "shuffled")
        self.measure("crayon left out", "off")
        return self.results

    @contextmanager
    def timed(self, name: str) -> Iterator[None]:
        """Note how long a part took, in seconds of wall time."""
        start = time.perf_counter()
        yield
        self.results.seconds[name] = round(time.perf_counter() - start, 1)

    def draw(self) -> None:
        """Draw the scenes and write them in COCO panoptic format; make the held-out questions."""
        settings = self.settings
        with self.timed("scenes"):
            rng = np.random.default_rng(self.seed)
            for name, count in (("train", settings.train_scenes), ("test", settings.test_scenes)):
                write_scenes(self.folder / "scenes" / name, (make_scene(rng) for _ in range(count)))
            self.train = Scenes(self.folder / "scenes" / "train")
            self.test = Scenes(self.folder / "scenes" / "test")
        self.questions = [
            *caption_questions(self.test),
            *class_questions(self.test, candidates=THING_NAMES, seed=self.seed),
            *place_questions(self.test),
        ]
        self.say(f"{len(self.train)} training and {len(self.test)} held-out scenes")

    def build(self) -> None:
        """Build the LLaVA of the two parts that come with the package."""
        with self.timed("build"), TemporaryDirectory(dir=self.folder) as name:
            build_llava(SHIPPED / LANGUAGE, SHIPPED / VISION, name, seed=self.seed)
            model = CollavoForConditionalGeneration.from_pretrained(name, dtype=torch.float32)
            self.model, self.processor = model, CollavoProcessor.from_pretrained(name)
        weights = sum(parameter.numel() for parameter in self.model.parameters())
        self.results.facts["weights"] = weights
        self.say(f"built: {weights / 1e6:.2f} M weights, projector and crayon untrained")

    def write_conversations(self) -> None:
        """Write what the stages learn from as LLaVA's JSON."""
        settings = self.settings
        patches = Patches.read(self.train, self.processor.image_processor)
        talker = Talker(self.train, patches.words(), self.seed)
        count = settings.instruct_steps * settings.batch_size
        texts = round(settings.text_share * count)
        write_records(self.folder / "captions.json", talker.captions())
        mixed = [*talker.about_images(range(count - texts)), *talker.about_words(range(texts))]
        write_records(self.folder / "conversations.json", mixed)
        self.say(
            f"{len(self.train)} captions for align; {count - texts} conversations about scenes "
            f"and {texts} about text for instruct, in LLaVA's JSON"
        )

    def align(self) -> None:
        """LLaVA's first stage: the projector alone, on captions."""
        settings = self.settings
        self._stage("align", "captions.json", settings.align_steps, settings.align_rate)

    def instruct(self) -> None:
        """LLaVA's second stage over 4 bits: projector, adapter and crayon, on conversations."""
        settings = self.settings
        rank = settings.rank
        self.model.add_dual_qlora((ADAPTER,), rank=rank, alpha=2.0 * rank, dropout=0.05)
        rate = settings.instruct_rate
        self._stage("instruct", "conversations.json", settings.instruct_steps, rate, PARTS)

    def _stage(
        self, stage: str, name: str, steps: int, rate: float, parts: Sequence[str] | None = None
    ) -> None:
        images = self.folder / "scenes" / "train" / "images"
        path = self.folder / name
        with self.timed(stage):
            data = ConversationDataset.from_llava_json(
                path, images=images, processor=for_stage(self.processor, stage), workers=0
            )
            if parts is not None and "crayon" in parts:
                data.panoptic = PictureMaps(self.train, data.pictures(), folder=images)
            self.results.stages[stage] = run_stage(
                self.model,
                self.processor,
                data,
                stage,
                folder=self.folder / "trainer",
                steps=steps,
                batch_size=self.settings.batch_size,
                learning_rate=rate,
                seed=self.seed,
                parts=parts,
                progress=self.progress,
            )

    def measure(self, name: str, crayon: CrayonUse) -> None:
        """Ask for the captions of held-out scenes and the questions, and note the scores."""
        with self.timed(f"questions: {name}"):
            answers = answer_questions(
                self.model,
                self.processor,
                self.test,
                self.questions,
                crayon=crayon,
                batch_size=128,
                max_new_tokens=24,
                seed=self.seed,
                progress=f"questions: {name}" if self.progress else None,
            )
        self.results.answers[name] = answers
        count = len(self.test)
        measured = Measurement(
            crayon,
            score_captions(self.questions[:count], answers[:count]),
            score("c2b", self.questions[count:], answers[count:]),
            score("b2c", self.questions[count:], answers[count:]),
        )
        self.results.measurements[name] = measured
        self.say(
            f"{name:16s} captions {100 * measured.captions.right:5.1f} %   "
            f"classes {100 * (measured.presence.accuracy or 0):5.1f} %   "
            f"places {100 * (measured.places.accuracy or 0):5.1f} %"
        )

    def save(self) -> None:
        """Write the trained model with its processor into ``model``."""
        with writing.written_folder(self.folder / "model", weight_patterns()) as partial:
            self.model.save_pretrained(partial)
            self.processor.save_pretrained(partial)
