"""Sizes, steps and margins of the demo: the full run, and a quick one for automatic checks."""

from __future__ import annotations

from dataclasses import dataclass, field

from collavo.demo.scenes import SceneStyle


@dataclass(frozen=True)
class Margins:
    """Differences that a run is expected to reach, in percentage points if not said otherwise.

    None is not asked for. They were set after the committed runs and lie below all of them: they
    show that a later run is like those, and are no evidence of their own.

    Args:
        b2c_base: B2C after CIT minus the base.
        c2b_base: C2B after CIT minus the base.
        b2c_control: B2C after CIT, with the Crayon Prompt minus the same steps without.
        c2b_control: The same for C2B.
        b2c_shuffled: B2C after CIT, true crayon minus shuffled rows.
        c2b_shuffled: The same for C2B.
    """

    b2c_base: float | None = None
    c2b_base: float | None = None
    b2c_control: float | None = None
    c2b_control: float | None = None
    b2c_shuffled: float | None = None
    c2b_shuffled: float | None = None


@dataclass(frozen=True)
class Settings:
    """One size of the demo.

    Args:
        train_scenes: Scenes to learn from.
        test_scenes: Held-out scenes.
        style: How hard they are to see.
        batch_size: Conversations per step.
        shipped_base: Whether to start from the base that comes with the package (a full run's of
            seed 0, in bfloat16) in place of training one; the scenes are then others than its own.
        vision_steps: Steps of the vision tower and the projector.
        base_steps: Steps of projector and language model.
        base_rate: Their peak learning rate.
        cpt_steps: Steps of crayon prompt tuning.
        cpt_rate: Their peak learning rate.
        cit_steps: Steps of instruction tuning, Image-CIT and VL-CIT together.
        cit_rate: Their peak learning rate.
        vl_probability: Of a VL-CIT step.
        rank: Of the adapters; alpha is the same.
        control: Whether to train the control without crayon.
        ablations: Whether to train one adapter in place of two, and two phases in place of the
            alternation.
        margins: What the run is expected to reach.
    """

    train_scenes: int = 4000
    test_scenes: int = 300
    style: SceneStyle = field(default_factory=SceneStyle)
    batch_size: int = 32
    shipped_base: bool = False
    vision_steps: int = 250
    base_steps: int = 420
    base_rate: float = 2e-3
    cpt_steps: int = 120
    cpt_rate: float = 2e-3
    cit_steps: int = 270
    cit_rate: float = 2e-3
    vl_probability: float = 0.5
    rank: int = 16
    control: bool = True
    ablations: bool = False
    margins: Margins = field(default_factory=Margins)


FULL = Settings(margins=Margins(15.0, 5.0, 15.0, 1.0, 20.0, 2.5))
QUICK = Settings(
    train_scenes=1000,
    test_scenes=200,
    batch_size=16,
    shipped_base=True,
    cpt_steps=60,
    cit_steps=240,
    margins=Margins(10.0, 1.0, 10.0, 1.0, 20.0, 1.0),
)
