"""Object-level understanding: Class2Binary and Box2Class on COCO panoptic folders."""

from collavo.evaluation.answering import CRAYON_USES, answer_questions
from collavo.evaluation.metrics import ClassRow, ObjectScore, is_right, normalise_answer, score
from collavo.evaluation.questions import (
    ObjectQuestion,
    ask_class,
    ask_presence,
    box_questions,
    class_questions,
)

__all__ = [
    "CRAYON_USES",
    "ClassRow",
    "ObjectQuestion",
    "ObjectScore",
    "answer_questions",
    "ask_class",
    "ask_presence",
    "box_questions",
    "class_questions",
    "is_right",
    "normalise_answer",
    "score",
]
