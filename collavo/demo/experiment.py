"""The demo's experiment: base, CPT, CIT with Dual QLoRA, a control, ablations, and their scores."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from collavo import writing
from collavo.demo import base
from collavo.demo.construction import Before, base_state, same_state
from collavo.demo.conversations import Talk, Talks, base_talk, image_talk, list_talk, vl_talk
from collavo.demo.language import build_tokenizer
from collavo.demo.model import build_model, build_processor
from collavo.demo.scenes import THING_NAMES, make_scene
from collavo.demo.settings import Settings
from collavo.demo.storage import Scenes, write_scenes
from collavo.demo.tuning import Phase, PhaseCollator, run_phase
from collavo.evaluation import (
    CRAYON_USES,
    ObjectQuestion,
    ObjectScore,
    answer_questions,
    box_questions,
    class_questions,
    score,
)
from collavo.evaluation.answering import CrayonUse, with_crayon
from collavo.model.files import weight_patterns
from collavo.model.llava import CollavoForConditionalGeneration
from collavo.processing.processor import CollavoProcessor

Say = Callable[[str], None]
BASE = Path(__file__).parent / "base_model"


@dataclass(frozen=True)
class Measurement:
    """How a model answered the held-out questions at one point of the experiment."""

    name: str
    crayon: CrayonUse
    b2c: ObjectScore
    c2b: ObjectScore


@dataclass
class Results:
    """Everything the report tells."""

    measurements: dict[str, Measurement] = field(default_factory=dict)
    losses: dict[str, list[float]] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    phases: dict[str, dict[str, Any]] = field(default_factory=dict)
    facts: dict[str, Any] = field(default_factory=dict)


class Experiment:
    """One run of the demo.

    Args:
        settings: Sizes and steps.
        seed: Of everything random.
        folder: Where scenes, model and report go.
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
        self.write_data()
        if self.settings.shipped_base:
            self.load_base()
        else:
            self.train_base()
        self.measure("base", "off")
        base = copy.deepcopy(self.model) if self.settings.control else None
        self.train_crayon()
        tuned = copy.deepcopy(self.model) if self.settings.ablations else None
        self.train_both()
        if base is not None:
            self.train_control(base)
        if tuned is not None:
            self.train_one_adapter(copy.deepcopy(tuned))
            self.train_phases(tuned)
        return self.results

    @contextmanager
    def timed(self, name: str) -> Iterator[None]:
        """Note how long a part took, in seconds of wall time."""
        start = time.perf_counter()
        yield
        self.results.seconds[name] = round(time.perf_counter() - start, 1)

    def write_data(self) -> None:
        """Draw the scenes, write them in COCO panoptic format and open them again."""
        settings = self.settings
        with self.timed("scenes"):
            # A base that comes with the package must not have seen the scenes.
            rng = np.random.default_rng([self.seed, 1] if settings.shipped_base else self.seed)
            for name, count in (("train", settings.train_scenes), ("test", settings.test_scenes)):
                scenes = (make_scene(rng, settings.style) for _ in range(count))
                write_scenes(self.folder / "scenes" / name, scenes)
            self.train = Scenes(self.folder / "scenes" / "train")
            self.test = Scenes(self.folder / "scenes" / "test")
            self.questions = [
                *box_questions(self.test),
                *class_questions(self.test, candidates=THING_NAMES, seed=self.seed),
            ]
        self.say(
            f"{settings.train_scenes} training and {settings.test_scenes} held-out scenes in COCO "
            f"panoptic format: {self.folder / 'scenes'}"
        )

    def train_base(self) -> None:
        """Build the tiny model and train what stands in for a pretrained LLaVA."""
        settings, seed = self.settings, self.seed
        torch.manual_seed(seed)
        tokenizer = build_tokenizer(self._texts())
        self.processor = build_processor(tokenizer)
        self.model = build_model(tokenizer)
        with self.timed("base"):
            patches = base.Patches.read(self.train, self.processor.image_processor)
            seen = base.align_vision(
                self.model,
                self.processor,
                patches,
                steps=settings.vision_steps,
                seed=seed,
                progress=self.progress,
            )
            self.results.losses["base"] = base.train_language(
                self.model,
                self.processor,
                self.train,
                steps=settings.base_steps,
                seed=seed,
                batch_size=settings.batch_size,
                learning_rate=settings.base_rate,
                progress=self.progress,
            )
        self.save_base(self.folder / "base_model")
        self.results.facts["object_patches_named"] = seen
        weights = sum(parameter.numel() for parameter in self.model.parameters())
        self.results.facts["weights"] = weights
        self.say(
            f"base model: {weights / 1e6:.2f} M weights, vision tower names {seen:.0%} of the "
            "objects' patches, then frozen"
        )

    def load_base(self) -> None:
        """Load the base that comes with the package."""
        with self.timed("base"):
            self.model = CollavoForConditionalGeneration.from_pretrained(BASE, dtype=torch.float32)
            self.model.model.vision_tower.requires_grad_(False)
            self.processor = CollavoProcessor.from_pretrained(BASE)
        self.say("base model: comes with the package, trained by the full demo of seed 0")

    def save_base(self, folder: Path) -> None:
        """Write the base as it comes with the package: weights in bfloat16, and the processor.

        Args:
            folder: Is made.
        """
        one: dict[int, torch.Tensor] = {}  # tied weights stay one
        halved = {
            name: one.setdefault(tensor.data_ptr(), tensor.to(torch.bfloat16))
            for name, tensor in self.model.state_dict().items()
        }
        with writing.written_folder(folder, weight_patterns()) as partial:
            self.model.save_pretrained(partial, state_dict=halved)
            self.processor.save_pretrained(partial)

    def _texts(self) -> Iterator[str]:
        for talk in (base_talk, list_talk, image_talk, vl_talk):
            talks = Talks(self.train, talk, self.seed)
            for index in range(min(len(talks), 1000)):
                for question, answer in talks.turns(index):
                    yield f" User: {question} Assistant: {answer}"

    def train_crayon(self) -> None:
        """CPT: the crayon alone, on the data of Image-CIT.

        Lists alone would lower both scores: the language model is frozen, and the crayon would
        learn what helps it to list, at the cost of what else it reads from the same tokens.
        """
        settings, model = self.settings, self.model
        base = base_state(model)
        self._train(model, Phase("CPT", "cpt", settings.cpt_steps, settings.cpt_rate, image_talk))
        self.results.facts["cpt_moved_only_the_crayon"] = same_state(base, base_state(model))
        self.measure("cpt", "on")

    def train_both(self) -> None:
        """CIT as in the paper: every step draws Image-CIT or VL-CIT, both adapters act in all."""
        model = self._with_adapters(self.model)
        base = base_state(model)
        self._train(model, self._cit("CIT"))
        self.results.facts["base_identical"] = same_state(base, base_state(model))
        self.measure("cit", "on")
        self.measure("cit, crayon shuffled", "shuffled")
        self.measure("cit, crayon left out", "off")
        self.results.facts["list_loss"] = self._list_losses()

    def _list_losses(self) -> dict[str, float]:
        """Return the loss of crayon instructions about held-out scenes, by use of the crayon."""
        talks = Talks(self.test, list_talk, self.seed)
        batch = PhaseCollator(self.processor)([talks[i] for i in range(len(talks))])
        self.model.train(False)
        losses: dict[str, float] = {}
        for use in CRAYON_USES:
            generator = torch.Generator().manual_seed(self.seed)
            with torch.no_grad():
                output = self.model(**with_crayon(batch, use, generator))
            losses[use] = round(float(output.loss), 4)
        return losses

    def train_control(self, model: CollavoForConditionalGeneration) -> None:
        """Train the same base on the same data without the Crayon Prompt.

        It has nothing to train in CPT; it gets those steps in CIT.
        """
        phase = self._cit("CIT, no crayon", self.settings.cpt_steps + self.settings.cit_steps)
        self._train(self._with_adapters(model), phase, crayon=False)
        self.measure("control", "off", model=model)

    def train_one_adapter(self, model: CollavoForConditionalGeneration) -> None:
        """Ablation: both kinds of steps train one adapter, of twice the rank."""
        phase = replace(self._cit("CIT, one adapter"), one_adapter=True)
        self._train(self._with_adapters(model, rank=2 * self.settings.rank), phase)
        self.measure("one adapter", "on", model=model)

    def train_phases(self, model: CollavoForConditionalGeneration) -> None:
        """Ablation: all Image-CIT steps, then all VL-CIT steps."""
        half = self.settings.cit_steps // 2
        self._with_adapters(model)
        self._train(model, self._cit("CIT, image phase", half, image_talk, None))
        self.measure("image phase", "on", model=model)
        before = Before(model, self.processor, self.test)
        rest = self.settings.cit_steps - half
        self._train(model, self._cit("CIT, vl phase", rest, None, vl_talk))
        self.measure("vl phase", "on", model=model)
        self.results.facts["phases"] = before.compare()

    def _with_adapters(
        self, model: CollavoForConditionalGeneration, rank: int | None = None
    ) -> CollavoForConditionalGeneration:
        rank = self.settings.rank if rank is None else rank
        return model.add_dual_qlora(rank=rank, alpha=float(rank))

    def _cit(
        self,
        name: str,
        steps: int | None = None,
        image: Talk | None = image_talk,
        vl: Talk | None = vl_talk,
    ) -> Phase:
        settings = self.settings
        steps = settings.cit_steps if steps is None else steps
        drawn = settings.vl_probability if image is not None else 1.0
        return Phase(name, "cit", steps, settings.cit_rate, image, vl, drawn if vl else 0.0)

    def _train(
        self, model: CollavoForConditionalGeneration, phase: Phase, crayon: bool = True
    ) -> None:
        with self.timed(phase.name):
            trained = run_phase(
                model,
                self.processor,
                self.train,
                phase,
                folder=self.folder / "trainer",
                seed=self.seed + 1,
                batch_size=self.settings.batch_size,
                crayon=crayon,
                progress=self.progress,
            )
        self.results.losses[phase.name] = trained.losses
        self.results.phases[phase.name] = {"steps": trained.steps, "idle_kept": trained.idle_kept}

    def measure(
        self,
        name: str,
        crayon: CrayonUse,
        *,
        model: CollavoForConditionalGeneration | None = None,
    ) -> None:
        """Ask the held-out questions and note the scores."""
        with self.timed(f"questions: {name}"):
            answers = answer_questions(
                model or self.model,
                self.processor,
                self.test,
                self.questions,
                crayon=crayon,
                batch_size=256,
                max_new_tokens=2,
                seed=self.seed,
                progress=f"questions: {name}" if self.progress else None,
            )
        b2c = score("b2c", self.questions, answers)
        c2b = score("c2b", self.questions, answers)
        self.results.measurements[name] = Measurement(name, crayon, b2c, c2b)
        self.say(
            f"{name:24s} B2C {100 * (b2c.accuracy or 0):5.1f} %   "
            f"C2B {100 * (c2b.accuracy or 0):5.1f} %"
        )
