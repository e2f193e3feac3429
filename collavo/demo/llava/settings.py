"""Sizes, steps and margins of ``collavo demo --llava``: the full run, and a quick one."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Margins:
    """Differences that a run is expected to reach, in percentage points.

    They lie below what runs have shown: they show that a later run is like those, and are no
    evidence of their own.

    Args:
        captions_built: Captions right after ``instruct``, minus those of the model as built.
        captions_off: The same model's, with the crayon minus without.
        captions_shuffled: The same model's, true crayon minus shuffled rows.
        presence_off: Questions for classes, with the crayon minus without.
        places_off: Questions for places, with the crayon minus without.
    """

    captions_built: float = 40.0
    captions_off: float = 30.0
    captions_shuffled: float = 30.0
    presence_off: float = 12.0
    places_off: float = 5.0


@dataclass(frozen=True)
class Settings:
    """One size of the demo.

    Args:
        train_scenes: Scenes to learn from.
        test_scenes: Held-out scenes.
        batch_size: Conversations per step.
        align_steps: Steps of the projector alone.
        align_rate: Their peak learning rate.
        instruct_steps: Steps of projector, adapter and crayon.
        instruct_rate: Their peak learning rate.
        text_share: Share of the conversations of ``instruct`` that have no image.
        rank: Of the adapter; alpha is twice that, as LLaVA's.
        margins: What the run is expected to reach.
    """

    train_scenes: int = 3000
    test_scenes: int = 300
    batch_size: int = 32
    align_steps: int = 250
    align_rate: float = 4e-3
    instruct_steps: int = 300
    instruct_rate: float = 5e-3
    text_share: float = 0.4
    rank: int = 16
    margins: Margins = field(default_factory=Margins)


FULL = Settings()
QUICK = Settings(
    train_scenes=800,
    test_scenes=100,
    align_steps=80,
    instruct_steps=80,
    margins=Margins(15.0, 0.0, 5.0, 0.0, -10.0),
)
