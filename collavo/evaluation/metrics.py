"""Scores of answers: accuracy, recall and specificity, over all questions and per class."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from collavo.evaluation.questions import Kind, ObjectQuestion

_ARTICLES = ("a ", "an ", "the ")


def normalise_answer(text: str) -> str:
    """Take from an answer what does not matter: case, blanks, an article, a full stop.

    Args:
        text: What the model said.

    Example:
        >>> normalise_answer(" The Hot  Dog. ")
        'hot dog'
    """
    words = " ".join(text.lower().split()).strip(" .!,\"'")
    for article in _ARTICLES:
        words = words.removeprefix(article)
    return words


def _yes_or_no(text: str) -> str | None:
    first = re.match(r"[a-z]+", normalise_answer(text))
    word = first.group(0) if first else ""
    return word if word in ("yes", "no") else None


def is_right(question: ObjectQuestion, answer: str) -> bool:
    """Say whether an answer is right: the first word for C2B, the whole answer for B2C.

    Args:
        question: What was asked.
        answer: What the model said.

    Example:
        >>> question = ObjectQuestion("c2b", 0, "dog", "Is there any dog in the image?", "yes")
        >>> is_right(question, "Yes, there is."), is_right(question, "I think so")
        (True, False)
    """
    if question.kind == "c2b":
        return _yes_or_no(answer) == question.answer
    return normalise_answer(answer) == normalise_answer(question.answer)


@dataclass(frozen=True)
class ClassRow:
    """How the questions about one class went: how many there were, and the share that was right."""

    name: str
    questions: int
    accuracy: float


@dataclass(frozen=True)
class ObjectScore:
    """The scores of one kind of question; shares are in 0..1, None where nothing was asked.

    Args:
        kind: ``"c2b"`` or ``"b2c"``.
        questions: How many there were.
        accuracy: Share of right answers.
        recall: Of the C2B questions whose answer is yes.
        specificity: Of the C2B questions whose answer is no.
        unreadable: C2B answers that are neither yes nor no; they count as wrong.
        class_mean: Mean of the classes' accuracies, each class with the same weight.
        top20: Mean accuracy of the 20 best classes.
        bottom20: Mean accuracy of the 20 worst classes.
        classes: One row per class that was asked for, by name.
    """

    kind: Kind
    questions: int
    accuracy: float | None
    recall: float | None
    specificity: float | None
    unreadable: int
    class_mean: float | None
    top20: float | None
    bottom20: float | None
    classes: tuple[ClassRow, ...]

    def as_dict(self) -> dict[str, Any]:
        """Return the scores as plain values for a JSON file."""
        return asdict(self)


def score(kind: Kind, questions: Sequence[ObjectQuestion], answers: Sequence[str]) -> ObjectScore:
    """Score the answers to the questions of one kind; questions of the other kind are passed over.

    Args:
        kind: ``"c2b"`` or ``"b2c"``.
        questions: What was asked.
        answers: What the model said, in the same order.

    Raises:
        ValueError: if there are not as many answers as questions.

    Source: paper section 1 and figure 7 (accuracy per class, then the mean over classes).

    Example:
        >>> asked = [
        ...     ObjectQuestion("c2b", 0, "dog", ask, answer)
        ...     for ask, answer in (("Is there any dog in the image?", "yes"), ("...", "no"))
        ... ]
        >>> result = score("c2b", asked, ["yes", "yes"])
        >>> result.accuracy, result.recall, result.specificity
        (0.5, 1.0, 0.0)
    """
    if len(questions) != len(answers):
        raise ValueError(f"answers: expected {len(questions)}, got {len(answers)}")
    pairs = [(q, a) for q, a in zip(questions, answers, strict=True) if q.kind == kind]
    right = [is_right(question, answer) for question, answer in pairs]
    rows = _per_class([question for question, _ in pairs], right)
    ranked = sorted((row.accuracy for row in rows), reverse=True)
    binary = kind == "c2b"
    return ObjectScore(
        kind=kind,
        questions=len(pairs),
        accuracy=_mean(right),
        recall=_mean([r for (q, _), r in zip(pairs, right, strict=True) if q.answer == "yes"]),
        specificity=_mean([r for (q, _), r in zip(pairs, right, strict=True) if q.answer == "no"]),
        unreadable=sum(binary and _yes_or_no(answer) is None for _, answer in pairs),
        class_mean=_mean(ranked),
        top20=_mean(ranked[:20]),
        bottom20=_mean(ranked[-20:]),
        classes=rows,
    )


def _per_class(questions: Sequence[ObjectQuestion], right: Sequence[bool]) -> tuple[ClassRow, ...]:
    by_name: dict[str, list[bool]] = {}
    for question, is_good in zip(questions, right, strict=True):
        by_name.setdefault(question.name, []).append(is_good)
    return tuple(
        ClassRow(name, len(results), sum(results) / len(results))
        for name, results in sorted(by_name.items())
    )


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None
