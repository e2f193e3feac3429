"""Which data set an optimizer step trains on: a pure function of the seed and the global step."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Literal

StepKind = Literal["image", "vl"]
STEP_KINDS: tuple[StepKind, ...] = ("image", "vl")


def stable_hash(*parts: int | str) -> int:
    """Return a 63-bit integer that depends on the parts alone, on every machine and version.

    Example:
        >>> stable_hash(0, "draw") == stable_hash(0, "draw") != stable_hash(1, "draw")
        True
    """
    text = ":".join(map(str, parts)).encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "big") >> 1


@dataclass(frozen=True)
class StepSchedule:
    r"""Draws Image-CIT or VL-CIT for every optimizer step.

    Step :math:`s` is a VL-CIT step if :math:`u(seed, s) < p`, with :math:`u` uniform in
    :math:`[0, 1)`. Nothing is remembered between steps, so all ranks draw alike and a resumed run
    draws what the uninterrupted one would have drawn (CoLLaVO, section 3: the choice is random per
    step; the paper does not give the probability).

    Args:
        seed: Any integer.
        vl_probability: p, from 0 (Image-CIT only, as in crayon prompt tuning) to 1.

    Raises:
        ValueError: for a probability outside 0 to 1.

    Example:
        >>> schedule = StepSchedule(seed=0, vl_probability=0.5)
        >>> [schedule.kind(step) for step in range(4)] == [schedule.kind(step) for step in range(4)]
        True
        >>> {StepSchedule(0, 0.0).kind(step) for step in range(9)}
        {'image'}
    """

    seed: int
    vl_probability: float = 0.5

    def __post_init__(self) -> None:
        if not 0.0 <= self.vl_probability <= 1.0:
            raise ValueError(f"vl_probability: expected 0 to 1, got {self.vl_probability}")

    def kind(self, step: int) -> StepKind:
        """Return ``"image"`` or ``"vl"`` for a global optimizer step, counted from 0."""
        uniform = stable_hash(self.seed, "step kind", step) / 2**63
        return "vl" if uniform < self.vl_probability else "image"

    def counts(self, first: int, last: int) -> dict[str, int]:
        """Return how many steps of each kind there are in ``range(first, last)``."""
        vl = sum(self.kind(step) == "vl" for step in range(first, last))
        return {"image": last - first - vl, "vl": vl}
