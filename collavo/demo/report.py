"""What a person gets to see: a table in the terminal, ``report.json``, and pictures."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageDraw, ImageFont

from collavo.demo.experiment import Experiment, Results
from collavo.demo.model import GRID
from collavo.demo.settings import Settings
from collavo.demo.storage import Scenes
from collavo.evaluation import ObjectQuestion, answer_questions, is_right
from collavo.panoptic.drawing import draw_scene

_ROWS = (
    ("base", "base, before any crayon"),
    ("cpt", "after CPT (crayon only)"),
    ("image", "after image phase, crayon"),
    ("image, no crayon", "  control: no crayon, same steps"),
    ("image, crayon shuffled", "  same model, crayon rows shuffled"),
    ("vl", "after vl phase, crayon"),
    ("vl, no crayon", "  control: no crayon, same steps"),
    ("vl, crayon shuffled", "  same model, crayon rows shuffled"),
    ("vl, crayon left out", "  same model, crayon left out"),
)


@dataclass(frozen=True)
class Check:
    """One thing the run must show: what, the number, what it must reach, and whether it does."""

    name: str
    value: float
    required: float
    passed: bool


def checks(results: Results, settings: Settings) -> list[Check]:
    """Compare a run with the margins of its settings, in percentage points.

    Args:
        results: Of the experiment.
        settings: With the margins.
    """
    margins = settings.margins

    def difference(kind: str, first: str, second: str) -> float:
        pair = (results.measurements[first], results.measurements[second])
        a, b = (getattr(one, kind).accuracy or 0.0 for one in pair)
        return 100.0 * (a - b)

    wanted = [
        ("B2C after the image phase: crayon minus control", "b2c", "image", "image, no crayon",
         margins.b2c_control),
        ("C2B after the vl phase: crayon minus control", "c2b", "vl", "vl, no crayon",
         margins.c2b_control),
        ("B2C after the vl phase: true minus shuffled crayon", "b2c", "vl",
         "vl, crayon shuffled", margins.b2c_shuffled),
        ("C2B after the vl phase: true minus shuffled crayon", "c2b", "vl",
         "vl, crayon shuffled", margins.c2b_shuffled),
    ]  # fmt: skip
    found = []
    for name, kind, first, second, required in wanted:
        if required is not None:
            value = round(difference(kind, first, second), 2)
            found.append(Check(name, value, required, value >= required))
    losses = results.facts["list_loss"]
    drop = round(min(losses["off"], losses["shuffled"]) - losses["on"], 4)
    name = "loss of held-out crayon instructions: without or shuffled minus true crayon"
    if margins.list_loss is not None:
        found.append(Check(name, drop, margins.list_loss, drop >= margins.list_loss))
    facts = (
        ("CPT moved the crayon and nothing else", "cpt_moved_only_the_crayon"),
        ("vl phase left the image adapter as it was, bit for bit", "image_adapter_identical"),
        ("vl phase left the 4-bit base as it was, bit for bit", "base_identical"),
        (
            "vl adapter off, crayon put back: the image phase's outputs, bit for bit",
            "image_outputs_restored",
        ),
    )
    for name, key in facts:
        value = float(bool(results.facts[key]))
        found.append(Check(name, value, 1.0, value == 1.0))
    return found


def table(results: Results) -> str:
    """Return the scores as a table of text.

    Args:
        results: Of the experiment.
    """
    title = "accuracy on held-out scenes, %"
    head = f"{title:36s}{'B2C':>7s}{'C2B':>8s}{'recall':>9s}{'specif.':>9s}"
    lines = [head, "-" * len(head)]
    for key, label in _ROWS:
        if key in results.measurements:
            one = results.measurements[key]
            values = (one.b2c.accuracy, one.c2b.accuracy, one.c2b.recall, one.c2b.specificity)
            b2c, c2b, recall, specificity = (100.0 * (value or 0.0) for value in values)
            lines.append(f"{label:36s}{b2c:7.1f}{c2b:8.1f}{recall:9.1f}{specificity:9.1f}")
    return "\n".join(lines)


def check_lines(found: list[Check]) -> str:
    """Return the checks as lines of text.

    Args:
        found: From :func:`checks`.
    """
    lines = []
    for check in found:
        mark = "ok    " if check.passed else "FAILED"
        digits = 2 if "loss" in check.name else 1
        detail = f": {check.value:+.{digits}f} (needs {check.required:+.{digits}f})"
        is_fact = check.required == 1.0
        lines.append(f"  {mark} {check.name}{'' if is_fact else detail}")
    return "\n".join(lines)


def write_json(
    path: Path, results: Results, found: list[Check], settings: Settings, seed: int
) -> None:
    """Write everything that was measured.

    Args:
        path: The file.
        results: Of the experiment.
        found: The checks.
        settings: Of the run.
        seed: Of the run.
    """
    content: dict[str, Any] = {
        "seed": seed,
        "settings": asdict(settings),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "measurements": {
            name: {"crayon": one.crayon, "b2c": one.b2c.as_dict(), "c2b": one.c2b.as_dict()}
            for name, one in results.measurements.items()
        },
        "checks": [asdict(check) for check in found],
        "facts": results.facts,
        "seconds": results.seconds,
        "losses": results.losses,
    }
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


@dataclass(frozen=True)
class Answered:
    """A question with the trained model's answers, with its crayon and without."""

    question: ObjectQuestion
    crayon: str
    without: str


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
    sheet.save(path)


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
