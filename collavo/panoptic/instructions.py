"""Crayon instructions: three questions about an image's objects, with answers made from its map."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

from collavo.panoptic.text import (
    NAME_PATTERN,
    Detection,
    format_names,
    format_objects,
    parse_names,
    parse_objects,
)

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


def build_instructions(
    detections: Sequence[Detection], templates: Sequence[str] = tuple(TEMPLATES)
) -> list[Instruction]:
    """Make every crayon instruction of an image, one for each class with the template ``"class"``.

    Args:
        detections: The image's objects; without any there is no instruction.
        templates: The templates to use, in this order.

    Raises:
        ValueError: if a template is unknown or there is none.

    Example:
        >>> cow, dog = Detection("cow", 1, (0, 0, 1, 1)), Detection("dog", 1, (0, 0, 1, 1))
        >>> [one.answer for one in build_instructions([cow, dog], ["class"])][1]
        'Sure, it is (#1 dog) [0.00, 0.00, 1.00, 1.00]'
    """
    check_templates(templates)
    if not detections:
        return []
    made = []
    for template in templates:
        names = list(dict.fromkeys(one.name for one in detections))
        for name in names if template == "class" else [None]:
            made.append(build_instruction(detections, template, select_class=name))
    return made


def draw_instruction(
    instructions: Sequence[Instruction], templates: Sequence[str], rng: random.Random
) -> Instruction:
    """Draw a template, each with the same probability, and then one of its instructions.

    Args:
        instructions: All of an image, as ``build_instructions`` makes them.
        templates: The templates to draw from.
        rng: Where the choices come from.

    Raises:
        ValueError: if there is no instruction of the drawn template.
    """
    template = rng.choice(list(templates))
    chosen = [one for one in instructions if one.template == template]
    if not chosen:
        raise ValueError(f"instructions: expected one with template {template!r}, got none")
    return rng.choice(chosen)


def check_templates(templates: Sequence[str]) -> None:
    """Raise unless these are templates, each named once.

    Args:
        templates: Their names.

    Raises:
        ValueError: if there is none, one is unknown or named twice.
    """
    known = all(name in TEMPLATES for name in templates)
    if not templates or not known or len(set(templates)) != len(templates):
        raise ValueError(
            f"templates: expected some of {', '.join(TEMPLATES)}, got {list(templates)}"
        )


@dataclass(frozen=True)
class ParsedInstruction:
    """What an instruction says.

    Args:
        template: The template's name.
        select_class: The class that is asked for; None but for the template ``"class"``.
        names: Name and number of every object of the answer.
        objects: The objects with their boxes; none for the template ``"names"``.
    """

    template: str
    select_class: str | None
    names: tuple[tuple[str, int], ...]
    objects: tuple[Detection, ...]


def parse_instruction(question: str, answer: str) -> ParsedInstruction:
    """Read what ``build_instruction`` writes; its exact inverse for boxes of two decimals.

    Args:
        question: The whole question.
        answer: The whole answer, without a stop token.

    Raises:
        ValueError: naming question or answer and the position, at anything that
            ``build_instruction`` would not write.

    Example:
        >>> question = "Provide multiple bounding box coordinates for cow in the image."
        >>> parse_instruction(question, "Sure, it is (#1 cow) [0.00, 0.00, 1.00, 1.00]").names
        (('cow', 1),)
    """
    template, select_class = _parse_question(question)
    start = len(ANSWER_START)
    if not answer.startswith(ANSWER_START):
        raise _unexpected("answer", answer, _agreement(answer, ANSWER_START), repr(ANSWER_START))
    if len(answer) == start:
        raise _unexpected("answer", answer, start, "at least one object")
    try:
        if template == "names":
            names = parse_names(answer, start=start)
            return ParsedInstruction(template, None, tuple(names), ())
        objects = parse_objects(answer, start=start)
    except ValueError as error:
        raise ValueError(f"answer: {str(error).removeprefix('text: ')}") from error
    for place, one in enumerate(objects):
        if select_class is not None and one.name != select_class:
            position = start + len(format_objects(objects[:place])) + (2 if place else 0)
            raise _unexpected("answer", answer, position, f"objects of class {select_class!r}")
    pairs = tuple((one.name, one.number) for one in objects)
    return ParsedInstruction(template, select_class, pairs, tuple(objects))


def _parse_question(question: str) -> tuple[str, str | None]:
    before, after = TEMPLATES["class"].split("{select_class}")
    starts = {**TEMPLATES, "class": before}
    for name in ("names", "boxes"):
        if question == TEMPLATES[name]:
            return name, None
    if question.startswith(before):
        match = NAME_PATTERN.match(question, len(before))
        name = question[len(before) : -len(after)]
        if question.endswith(after) and NAME_PATTERN.fullmatch(name):
            return "class", name
        position = len(before) if match is None else match.end()
        raise _unexpected("question", question, position, f"a class name and {after!r}")
    position = max(_agreement(question, start) for start in starts.values())
    raise _unexpected("question", question, position, "one of the questions of TEMPLATES")


def _agreement(text: str, other: str) -> int:
    """Return how many characters two texts have in common at their start."""
    pairs = enumerate(zip(text, other, strict=False))
    return next((i for i, (a, b) in pairs if a != b), min(len(text), len(other)))


def _unexpected(argument: str, text: str, position: int, wanted: str) -> ValueError:
    found = text[position : position + 40]
    return ValueError(f"{argument}: expected {wanted} at character {position}, got {found!r}")


def _rng(rng: random.Random | None, argument: str) -> random.Random:
    if rng is None:
        raise ValueError(f"rng: expected a random.Random, because {argument} is to be drawn")
    return rng
