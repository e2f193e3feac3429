"""One held-out scene, and under it what the model said of it at each point of the experiment."""

from __future__ import annotations

from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from collavo import writing
from collavo.demo.answers import clear_scene
from collavo.demo.llava.captions import classes_named
from collavo.demo.llava.course import Course
from collavo.demo.llava.parts import GRID
from collavo.demo.llava.talks import DESCRIBE
from collavo.evaluation import ObjectQuestion, is_right
from collavo.pictures.canvas import INK, PAPER, SOFT
from collavo.pictures.drawing import draw_scene

SHOWN = (
    ("built", "as built"),
    ("aligned", "align"),
    ("instructed", "instruct + crayon"),
    ("crayon left out", "crayon left out"),
)
_RIGHT, _WRONG = (20, 120, 50), (180, 40, 30)
_LINE, _MARGIN, _LABEL = 26, 20, 170


def said_right(question: ObjectQuestion, answer: str) -> bool:
    """Say whether an answer is right; a description, if it names the classes that are there.

    Args:
        question: With its answer.
        answer: The model's.
    """
    if question.text == DESCRIBE:
        return classes_named(question.answer) == classes_named(answer)
    return is_right(question, answer)


def scene_of(course: Course) -> int:
    """Return the first scene that the crayon tells whole and that has questions of both kinds.

    Args:
        course: After it has run.
    """
    first = clear_scene(course.test)
    asked = {question.image for question in course.questions if question.kind == "b2c"}
    return first if first in asked else min(asked)


def lines_of(course: Course, image: int) -> list[tuple[ObjectQuestion, list[tuple[str, str]]]]:
    """Return a scene's questions, each with what was said at each point.

    Args:
        course: After it has run.
        image: Position of the scene.
    """
    return [
        (question, [(label, course.results.answers[name][i]) for name, label in SHOWN])
        for i, question in enumerate(course.questions)
        if question.image == image
    ]


def scene_text(course: Course, image: int) -> str:
    """Return a scene's questions and answers as lines of text.

    Args:
        course: After it has run.
        image: Position of the scene.
    """
    lines = []
    for question, said in lines_of(course, image):
        lines.append(f"  {question.text}")
        for label, answer in said:
            lines.append(f"      {label + ':':20s}{_verdict(question, answer)}")
    return "\n".join(lines)


def draw(course: Course, image: int, path: Path) -> None:
    """Draw a scene, and under it its questions with what was said, right or wrong by colour.

    Args:
        course: After it has run.
        image: Position of the scene.
        path: Where the PNG goes.
    """
    sample = course.test[image]
    scene = draw_scene(
        sample.image, sample.panoptic, grid=(GRID, GRID), panel=480, title="A held-out scene"
    )
    asked = lines_of(course, image)
    rows = sum(1 + len(said) if question.text == DESCRIBE else 1 for question, said in asked) + 1
    height = scene.height + _LINE * rows + 2 * _MARGIN
    canvas = Image.new("RGB", (max(scene.width, 900), height), PAPER)
    canvas.paste(scene, (0, 0))
    pen = _Pen(canvas, scene.height)
    for question, said in asked:
        if question.text == DESCRIBE:
            pen.write([(_MARGIN, question.text, INK)])
            for label, answer in said:
                pen.write([
                    (_MARGIN, label, SOFT),
                    (_MARGIN + _LABEL, _verdict(question, answer), _colour(question, answer)),
                ])  # fmt: skip
    columns = [canvas.width * (0.42 + 0.145 * k) for k in range(len(SHOWN))]
    heads = [(x, label, SOFT) for x, (_, label) in zip(columns, SHOWN, strict=True)]
    pen.write([(_MARGIN, "Question", SOFT), *heads])
    for question, said in asked:
        if question.text != DESCRIBE:
            cells = [
                (x, _verdict(question, answer), _colour(question, answer))
                for x, (_, answer) in zip(columns, said, strict=True)
            ]
            pen.write([(_MARGIN, question.text, INK), *cells])
    with writing.written_file(path) as temporary:
        canvas.save(temporary, "PNG")


class _Pen:
    """Writes line under line."""

    def __init__(self, canvas: Image.Image, top: int) -> None:
        self.draw = ImageDraw.Draw(canvas)
        self.font = ImageFont.load_default(size=15)
        self.y = top

    def write(self, cells: list[tuple[float, str, tuple[int, int, int]]]) -> None:
        for x, text, colour in cells:
            self.draw.text((x, self.y), text, fill=colour, font=self.font)
        self.y += _LINE


def _verdict(question: ObjectQuestion, answer: str) -> str:
    """Say in words what the colour says."""
    most = 90 if question.text == DESCRIBE else 10
    short = " ".join(answer.split())
    short = short if len(short) <= most else short[: most - 4] + " ..."
    return short if said_right(question, answer) else f"{short} (wrong)"


def _colour(question: ObjectQuestion, answer: str) -> tuple[int, int, int]:
    return _RIGHT if said_right(question, answer) else _WRONG
