"""The trained model's answers about one held-out scene, as text and as a picture."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from collavo import writing
from collavo.demo.experiment import Experiment
from collavo.demo.model import GRID
from collavo.demo.storage import Scenes
from collavo.evaluation import ObjectQuestion, answer_questions, is_right
from collavo.pictures.drawing import draw_scene
from collavo_kernels import panoptic_lookup


@dataclass(frozen=True)
class Answered:
    """A question with the trained model's answers, with its crayon and without."""

    question: ObjectQuestion
    crayon: str
    without: str


def clear_scene(scenes: Scenes) -> int:
    """Return the position of the first scene whose every segment has a cell of the crayon's grid.

    A segment that is the majority of no cell has no token, so the crayon cannot tell of it.

    Args:
        scenes: The held-out scenes.
    """
    for position in range(len(scenes)):
        panoptic = scenes[position].panoptic
        crayon = panoptic_lookup(
            [panoptic.segmentation],
            [panoptic.segment_ids],
            [panoptic.segment_classes],
            grid=(GRID, GRID),
        )
        # Row 0 is what no segment covers.
        if len({*crayon.row_index.flatten().tolist()} - {0}) == len(panoptic.segment_ids):
            return position
    return 0


def ask_about_scene(experiment: Experiment, image: int) -> list[Answered]:
    """Ask the trained model about one held-out scene.

    Args:
        experiment: After it has run.
        image: Position of the scene.
    """
    asked = [question for question in experiment.questions if question.image == image]
    asked.append(ObjectQuestion("b2c", image, "", "Describe the image.", ""))
    answers = [
        answer_questions(
            experiment.model,
            experiment.processor,
            experiment.test,
            asked,
            crayon=use,
            max_new_tokens=24,
        )
        for use in ("on", "off")
    ]
    return [Answered(*row) for row in zip(asked, *answers, strict=True)]


def draw_answers(scenes: Scenes, image: int, answered: list[Answered], path: Path) -> None:
    """Draw a scene's segments and boxes, and under them the questions with their answers.

    Args:
        scenes: The held-out scenes.
        image: Position of the scene.
        answered: Its questions.
        path: Where the PNG goes.
    """
    sample = scenes[image]
    picture = draw_scene(
        sample.image,
        sample.panoptic,
        grid=(GRID, GRID),
        panel=480,
        title=f"Held-out scene {sample.image_id}",
    )
    font = ImageFont.load_default(size=16)
    line, margin = 26, 20
    height = picture.height + line * (len(answered) + 2) + margin
    sheet = Image.new("RGB", (picture.width, height), (255, 255, 255))
    sheet.paste(picture, (0, 0))
    draw = ImageDraw.Draw(sheet)
    columns = (margin, margin + round(picture.width * 0.46), margin + round(picture.width * 0.72))
    y = picture.height
    for x, head in zip(columns, ("Question", "with crayon", "crayon left out"), strict=True):
        draw.text((x, y), head, fill=(30, 30, 30), font=font)
    y += line
    draw.line((margin, y - 3, picture.width - margin, y - 3), fill=(160, 160, 160))
    for row in answered:
        draw.text((columns[0], y), row.question.text, fill=(30, 30, 30), font=font)
        for x, answer in zip(columns[1:], (row.crayon, row.without), strict=True):
            text = _short(answer) + _verdict(row.question, answer)
            draw.text((x, y), text, fill=_colour(row.question, answer), font=font)
        y += line
    with writing.written_file(path) as temporary:
        sheet.save(temporary, "PNG")


def _short(answer: str) -> str:
    return answer if len(answer) <= 32 else answer[:30] + " ..."


def _verdict(question: ObjectQuestion, answer: str) -> str:
    """Say in words what the colour says."""
    return " (wrong)" if question.answer and not is_right(question, answer) else ""


def _colour(question: ObjectQuestion, answer: str) -> tuple[int, int, int]:
    if not question.answer:
        return (30, 30, 30)
    return (20, 120, 50) if is_right(question, answer) else (180, 40, 30)


def scene_lines(answered: list[Answered]) -> str:
    """Return the questions about a scene with their answers as lines of text.

    Args:
        answered: The scene's questions.
    """
    lines = []
    for row in answered:
        lines.append(f"  {row.question.text}")
        crayon, without = (
            answer + _verdict(row.question, answer) for answer in (row.crayon, row.without)
        )
        lines.append(f"      with crayon: {crayon:24s} left out: {without}")
    return "\n".join(lines)
