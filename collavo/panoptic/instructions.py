"""Crayon instructions: three questions about an image's objects, with answers made from its map."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

from collavo.panoptic.text import Detection, format_names, format_objects

ANSWER_START = "Sure, it is "

TEMPLATES: dict[str, str] = {
    "names": "Provide multiple object names with their numbering index in the image.",
    "boxes": (
        "Provide multiple object names with their numbering index and the objects' bounding box "
        "coordinates in this image."
    ),
    "class": "Provide multiple bounding box coordinates for {select_class} in the image.",
}
"""The paper's questions by template name (figure 5)."""


@dataclass(frozen=True)
class Instruction:
    """A question with its answer.

    Args:
        question: What the user asks.
        answer: What the model has to say, without a stop token.
        template: The template's name.
    """

    question: str
    answer: str
    template: str

    def conversation(self) -> list[dict[str, str]]:
        """Return the two turns as chat messages."""
        return [
            {"role": "user", "content": self.question},
            {"role": "assistant", "content": self.answer},
        ]


def build_instruction(
    detections: Sequence[Detection],
    template: str | None = None,
    *,
    rng: random.Random | None = None,
    select_class: str | None = None,
) -> Instruction:
    """Make one crayon instruction for an image.

    Args:
        detections: The image's objects, at least one.
        template: ``"names"``, ``"boxes"`` or ``"class"``; None draws one of the three.
        rng: Where random choices come from; needed for a drawn template and for the template
            ``"class"`` without ``select_class``.
        select_class: The class that the template ``"class"`` asks for; None draws one of the
            image's classes, each with the same probability.

    Returns:
        The question and an answer that starts with ``Sure, it is``.

    Raises:
        ValueError: if there is no object, the template is unknown, a choice needs ``rng``, or the
            image has no object of ``select_class``.

    Source: paper figure 5 (three questions; no full stop at the answer's end).

    Example:
        >>> horse = Detection("horse", 1, (0.06, 0.38, 0.27, 0.91))
        >>> build_instruction([horse], "names").answer
        'Sure, it is #1 horse'
        >>> build_instruction([horse], "class", select_class="horse").question
        'Provide multiple bounding box coordinates for horse in the image.'
    """
    if not detections:
        raise ValueError("detections: expected at least one object to ask about, got none")
    if template is None:
        template = _rng(rng, "template").choice(list(TEMPLATES))
    if template not in TEMPLATES:
        raise ValueError(f"template: expected one of {', '.join(TEMPLATES)}, got {template!r}")
    question = TEMPLATES[template]
    if template == "names":
        return Instruction(question, ANSWER_START + format_names(detections), template)
    if template == "boxes":
        return Instruction(question, ANSWER_START + format_objects(detections), template)
    names = list(dict.fromkeys(one.name for one in detections))
    if select_class is None:
        select_class = _rng(rng, "select_class").choice(names)
    if select_class not in names:
        raise ValueError(f"select_class: expected one of {', '.join(names)}, got {select_class!r}")
    answer = ANSWER_START + format_objects(detections, select_class)
    return Instruction(question.format(select_class=select_class), answer, template)


def _rng(rng: random.Random | None, argument: str) -> random.Random:
    if rng is None:
        raise ValueError(f"rng: expected a random.Random, because {argument} is to be drawn")
    return rng
