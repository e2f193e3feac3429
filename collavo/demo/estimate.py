"""How long the demo will take on this machine: a few real steps, counted up."""

from __future__ import annotations

import contextlib
import random
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch

from collavo.demo import base
from collavo.demo.conversations import Talks, base_talk, image_talk, vl_talk
from collavo.demo.language import build_tokenizer
from collavo.demo.llava.settings import Settings as LlavaSettings
from collavo.demo.model import build_model, build_processor
from collavo.demo.scenes import make_scene
from collavo.demo.settings import QUICK, Settings
from collavo.demo.storage import Scenes, write_scenes
from collavo.demo.tuning import Phase, run_phase

_STEPS = 3
# Of a step of the base's language training: drawing and asking, beside training, in full runs.
_SCENE = 0.006
_VISION_STEP = 0.32
_QUESTIONS = 11.0
# The same of --llava, of a language step of the quick run's batch.
_ALIGN_STEP = 0.6
_INSTRUCT_STEP = 2.0
_LLAVA_QUESTIONS = 0.6


def estimate_seconds(settings: Settings) -> float:
    """Return about how long a run takes here, from three steps of its two kinds of training.

    Everything else is in proportion to them. What other programs do in the meantime is not known.

    Args:
        settings: Of the run.
    """
    with TemporaryDirectory() as name, _random_state_kept():
        language, tuning = _step_seconds(settings, Path(name))
    tuned = settings.cpt_steps + settings.cit_steps
    runs = 1 + settings.control + 2 * settings.ablations
    measured = 5 + settings.control + 3 * settings.ablations
    scenes = settings.train_scenes + settings.test_scenes
    shown = settings.test_scenes / 300
    trained = settings.base_steps + _VISION_STEP * settings.vision_steps
    beside = _SCENE * scenes + _QUESTIONS * shown * measured
    in_language_steps = beside + (0.0 if settings.shipped_base else trained)
    return language * in_language_steps + tuning * tuned * runs


def estimate_llava(settings: LlavaSettings) -> float:
    """Return about how long a run of ``collavo demo --llava`` takes here, as the other's.

    Args:
        settings: Of the run.
    """
    with TemporaryDirectory() as name, _random_state_kept():
        step, _ = _step_seconds(QUICK, Path(name))
    share = settings.batch_size / QUICK.batch_size
    trained = _ALIGN_STEP * settings.align_steps + _INSTRUCT_STEP * settings.instruct_steps
    scenes = settings.train_scenes + settings.test_scenes
    asked = _LLAVA_QUESTIONS * settings.test_scenes
    return step * (share * trained + _SCENE * scenes + asked)


def in_words(seconds: float) -> str:
    """Return a duration as a person says it.

    Args:
        seconds: At least 0.

    Example:
        >>> in_words(20), in_words(70), in_words(335)
        ('less than a minute', 'about a minute', 'about 6 minutes')
    """
    minutes = round(seconds / 60)
    if seconds < 45:
        return "less than a minute"
    return "about a minute" if minutes <= 1 else f"about {minutes} minutes"


def _step_seconds(settings: Settings, folder: Path) -> tuple[float, float]:
    """Return the seconds of a step of language training and of one of tuning."""
    rng = np.random.default_rng(0)
    count = 2 * settings.batch_size
    write_scenes(folder, (make_scene(rng, settings.style) for _ in range(count)))
    scenes = Scenes(folder)
    texts = (
        f" User: {question} Assistant: {answer}"
        for talk in (base_talk, image_talk, vl_talk)
        for index in range(count)
        for question, answer in Talks(scenes, talk, 0).turns(index)
    )
    tokenizer = build_tokenizer(texts)
    processor, model = build_processor(tokenizer), build_model(tokenizer)

    def language(steps: int) -> None:
        base.train_language(
            model,
            processor,
            scenes,
            steps=steps,
            seed=0,
            batch_size=settings.batch_size,
            learning_rate=1e-4,
            progress=False,
        )

    def tuning(steps: int) -> None:
        phase = Phase("", "cit", steps, 1e-4, image_talk, vl_talk, settings.vl_probability)
        run_phase(
            model,
            processor,
            scenes,
            phase,
            folder=folder,
            seed=0,
            batch_size=settings.batch_size,
            progress=False,
        )

    language_step = _seconds_per_step(language)
    model.add_dual_qlora(rank=settings.rank, alpha=float(settings.rank))
    return language_step, _seconds_per_step(tuning)


def _seconds_per_step(train: Callable[[int], None]) -> float:
    """Time a step as the difference of two runs: what a run costs by itself drops out."""
    train(1)
    taken = []
    for steps in (1, 1 + _STEPS):
        start = time.perf_counter()
        train(steps)
        taken.append(time.perf_counter() - start)
    return max(taken[1] - taken[0], 1e-3) / _STEPS


@contextlib.contextmanager
def _random_state_kept() -> Iterator[None]:
    """Leave the global generators as they were: the run's numbers do not depend on the estimate."""
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()
    try:
        yield
    finally:
        torch.set_rng_state(states[0])
        random.setstate(states[1])
        np.random.set_state(states[2])
