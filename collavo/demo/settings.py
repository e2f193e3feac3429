"""Sizes, steps and margins of the demo: the full run, and a quick one for automatic checks."""

from __future__ import annotations

from dataclasses import dataclass, field

from collavo.demo.scenes import SceneStyle


@dataclass(frozen=True)
class Margins:
    """Differences in percentage points that a run must reach; None is not asked for.

    Args:
        b2c_control: B2C after the image phase, crayon minus the control without crayon.
        c2b_control: C2B after the vl phase, crayon minus control.
        b2c_shuffled: B2C after the vl phase, true minus shuffled crayon.
        c2b_shuffled: C2B after the vl phase, true minus shuffled crayon.
    """

    b2c_control: float | None = 4.0
    c2b_control: float | None = 2.5
    b2c_shuffled: float = 10.0
    c2b_shuffled: float = 5.0


@dataclass(frozen=True)
class Settings:
    """One size of the demo.

    Args:
        train_scenes: Scenes to learn from.
        test_scenes: Held-out scenes.
        style: How hard they are to see.
        batch_size: Conversations per step.
        vision_steps: Steps of the vision tower and the projector.
        base_steps: Steps of projector and language model.
        base_rate: Their peak learning rate.
        cpt_steps: Steps of crayon prompt tuning.
        cpt_rate: Their peak learning rate.
        image_steps: Steps of the image phase.
        vl_steps: Steps of the vl phase.
        cit_rate: Peak learning rate of both phases.
        rank: Of the adapters; alpha is the same.
        control: Whether to train the control without crayon.
        margins: What the run must reach.
    """

    train_scenes: int = 4000
    test_scenes: int = 300
    style: SceneStyle = field(default_factory=SceneStyle)
    batch_size: int = 32
    vision_steps: int = 250
    base_steps: int = 500
    base_rate: float = 2e-3
    cpt_steps: int = 150
    cpt_rate: float = 3e-3
    image_steps: int = 200
    vl_steps: int = 150
    cit_rate: float = 2e-3
    rank: int = 16
    control: bool = True
    margins: Margins = field(default_factory=Margins)


FULL = Settings()
QUICK = Settings(
    train_scenes=1000,
    test_scenes=100,
    batch_size=24,
    vision_steps=120,
    base_steps=150,
    cpt_steps=40,
    image_steps=50,
    vl_steps=40,
    control=False,
    margins=Margins(None, None, 3.0, 3.0),
)
