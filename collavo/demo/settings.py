"""Sizes, steps and margins of the demo: the full run, and a quick one for automatic checks."""

from __future__ import annotations

from dataclasses import dataclass, field

from collavo.demo.scenes import SceneStyle


@dataclass(frozen=True)
class Margins:
    """Differences that a run must reach, in percentage points if not said otherwise.

    None is not asked for.

    Args:
        b2c_control: B2C after the image phase, crayon minus the control without crayon.
        c2b_control: C2B after the vl phase, crayon minus control.
        b2c_shuffled: B2C after the vl phase, true minus shuffled crayon.
        c2b_shuffled: C2B after the vl phase, true minus shuffled crayon.
        list_loss: Loss of crayon instructions about held-out scenes after the image phase, in nats:
            crayon shuffled or left out minus true crayon.
    """

    b2c_control: float | None = 4.0
    c2b_control: float | None = 2.5
    b2c_shuffled: float | None = 10.0
    c2b_shuffled: float | None = 5.0
    list_loss: float | None = None


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
        image_rate: Peak learning rate of the image phase.
        vl_rate: Peak learning rate of the vl phase.
        rank: Of the adapters; alpha is the same.
        control: Whether to train the control without crayon.
        margins: What the run must reach.
    """

    train_scenes: int = 4000
    test_scenes: int = 300
    style: SceneStyle = field(default_factory=SceneStyle)
    batch_size: int = 32
    vision_steps: int = 250
    base_steps: int = 420
    base_rate: float = 2e-3
    cpt_steps: int = 120
    cpt_rate: float = 2e-3
    image_steps: int = 150
    image_rate: float = 2e-3
    vl_steps: int = 120
    vl_rate: float = 2e-3
    rank: int = 16
    control: bool = True
    margins: Margins = field(default_factory=Margins)


FULL = Settings()
QUICK = Settings(
    train_scenes=1000,
    test_scenes=100,
    batch_size=16,
    vision_steps=100,
    base_steps=200,
    base_rate=3e-3,
    cpt_steps=40,
    image_steps=120,
    vl_steps=20,
    control=False,
    margins=Margins(None, None, None, None, list_loss=0.02),
)
