"""How right descriptions are: which classes they name, beside those that are there."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from collavo.demo.scenes import STUFF_NAMES, THING_NAMES
from collavo.evaluation import ObjectQuestion

_NAME = re.compile(rf"\b({'|'.join((*THING_NAMES, *STUFF_NAMES))})\b")


@dataclass(frozen=True)
class CaptionScore:
    """Over all descriptions.

    Args:
        count: How many there are.
        right: Share that names all classes of the scene and no other.
        precision: Share of the named classes that are there.
        recall: Share of the classes that are named.
    """

    count: int
    right: float
    precision: float
    recall: float


def classes_named(text: str) -> set[str]:
    """Return the classes that a description names.

    Args:
        text: The description.

    Example:
        >>> sorted(classes_named("A picture of a dog and a horse in front of sky."))
        ['dog', 'horse', 'sky']
    """
    return set(_NAME.findall(text))


def score_captions(questions: Sequence[ObjectQuestion], answers: Sequence[str]) -> CaptionScore:
    """Compare descriptions with the scenes' captions by the classes that they name.

    Args:
        questions: With the captions as answers.
        answers: The descriptions.

    Raises:
        ValueError: if there are none, or not as many answers as questions.

    Example:
        >>> truth = "A picture of a dog in front of sky."
        >>> asked = [ObjectQuestion("b2c", 0, "", "Describe the image.", truth)]
        >>> score_captions(asked, ["A picture of a dog and a cat in front of sky."]).precision
        0.6666666666666666
    """
    if not questions or len(questions) != len(answers):
        raise ValueError(
            f"answers: expected one for each of at least one question, got {len(answers)} for "
            f"{len(questions)}"
        )
    pairs = [
        (classes_named(question.answer), classes_named(answer))
        for question, answer in zip(questions, answers, strict=True)
    ]
    found = sum(len(true & said) for true, said in pairs)
    return CaptionScore(
        count=len(pairs),
        right=sum(true == said for true, said in pairs) / len(pairs),
        precision=found / max(sum(len(said) for _, said in pairs), 1),
        recall=found / sum(len(true) for true, _ in pairs),
    )
