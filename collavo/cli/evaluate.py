"""``collavo eval``: Class2Binary and Box2Class of a model folder on any COCO panoptic folder."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from collavo import writing
from collavo.cli import expect_text
from collavo.evaluation import (
    CRAYON_USES,
    ObjectQuestion,
    ObjectScore,
    answer_questions,
    box_questions,
    class_questions,
    score,
)
from collavo.panoptic import CocoPanopticDataset


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of ``collavo eval``."""
    parser.add_argument("--model", required=True, help="model folder: weights and processor")
    parser.add_argument("--images", type=Path, required=True, help="folder of the images")
    parser.add_argument("--panoptic", type=Path, required=True, help="folder of the panoptic PNGs")
    parser.add_argument("--annotations", type=Path, required=True, help="COCO panoptic JSON")
    parser.add_argument("--output", type=Path, help="JSON file for the scores (default: printed)")
    parser.add_argument("--limit", type=int, help="only the first so many images")
    parser.add_argument(
        "--tasks", nargs="+", choices=("c2b", "b2c"), default=["c2b", "b2c"], help="what to ask"
    )
    parser.add_argument(
        "--crayon",
        nargs="+",
        choices=CRAYON_USES,
        default=["on", "off"],
        help="with the crayon, without it, or with its rows shuffled",
    )
    parser.add_argument(
        "--object-text",
        action="store_true",
        help="name the objects in the prompt too, which gives the answers away",
    )
    parser.add_argument(
        "--suffix",
        default="",
        help="appended to every question, e.g. ' Answer with a single word or phrase.'",
    )
    parser.add_argument(
        "--candidates",
        nargs="+",
        metavar="NAME",
        help="classes that C2B's negatives are drawn from (default: all 80 things)",
    )
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--max-new-tokens", type=int, default=8)
    parser.add_argument("--device", default="cpu", help="where the model runs (default: cpu)")
    parser.add_argument("--seed", type=int, default=0, help="of negatives and shuffled rows")
    parser.add_argument("--no-progress", action="store_true", help="no progress bars")


def run(args: argparse.Namespace) -> int:
    """Ask, score, and write the scores as JSON; a table goes to the terminal."""
    for name in ("batch_size", "max_new_tokens"):
        if getattr(args, name) < 1:
            raise ValueError(f"--{name.replace('_', '-')}: expected at least 1")
    for name, words in (("--suffix", [args.suffix]), ("--candidates", args.candidates or [])):
        for word in words:
            expect_text(name, word)
    if args.output is not None:
        args.output.parent.mkdir(parents=True, exist_ok=True)
        writing.check_file(args.output)  # before the hours that the answers may take
    from collavo.loading import expect_model_folder

    expect_model_folder(args.model)  # before files that take minutes
    samples = CocoPanopticDataset(args.images, args.panoptic, args.annotations)
    questions = _questions(args, samples, "image")
    if not questions:
        raise ValueError(f"{args.annotations}: no image shows a countable object to ask about")
    model, processor = _load(args.model, args.device)
    if processor.box_frame != "image":
        questions = _questions(args, samples, processor.box_frame)
    results: dict[str, dict[str, ObjectScore]] = {}
    for use in args.crayon:
        answers = answer_questions(
            model,
            processor,
            samples,
            questions,
            crayon=use,
            object_text=args.object_text,
            suffix=args.suffix,
            batch_size=args.batch_size,
            max_new_tokens=args.max_new_tokens,
            seed=args.seed,
            progress=None if args.no_progress else f"crayon {use}",
        )
        results[use] = {task: score(task, questions, answers) for task in args.tasks}
    _write(args, results, len(samples))
    return 0


def _questions(
    args: argparse.Namespace, samples: CocoPanopticDataset, box_frame: str
) -> list[ObjectQuestion]:
    questions = []
    if "c2b" in args.tasks:
        questions += class_questions(
            samples, limit=args.limit, candidates=args.candidates, seed=args.seed
        )
    if "b2c" in args.tasks:
        questions += box_questions(samples, limit=args.limit, box_frame=box_frame)
    return questions


def _load(folder: str, device: str) -> tuple[Any, Any]:
    from collavo.loading import load_folder

    model, processor = load_folder(folder)
    moved: Any = model
    return moved.to(device), processor


def _write(
    args: argparse.Namespace, results: dict[str, dict[str, ObjectScore]], images: int
) -> None:
    content = {
        "model": args.model,
        "annotations": str(args.annotations),
        "images": images if args.limit is None else min(args.limit, images),
        "object_text": args.object_text,
        "suffix": args.suffix,
        "seed": args.seed,
        "crayon": {
            use: {task: one.as_dict() for task, one in scores.items()}
            for use, scores in results.items()
        },
    }
    text = json.dumps(content, indent=2) + "\n"
    if args.output is None:
        print(text, end="")
    else:
        try:
            writing.write_file(args.output, text.encode())
        except OSError:
            print(text, end="")  # the scores are not lost with the file
            raise
    # The table is for people: where JSON goes to the standard output, it goes beside it.
    print(table(results), file=sys.stdout if args.output else sys.stderr)


def table(results: dict[str, dict[str, ObjectScore]]) -> str:
    """Return the scores as a table of text, in percent.

    Args:
        results: Scores by crayon use and task.
    """
    heads = ("crayon", "task", "questions", "accuracy", "recall", "specificity", "class mean")
    lines = ["".join(f"{head:>12s}" for head in heads)]
    for use, scores in results.items():
        for task, one in scores.items():
            shares = (one.accuracy, one.recall, one.specificity, one.class_mean)
            cells = ["-" if value is None else f"{100 * value:.1f}" for value in shares]
            row = (use, task.upper(), str(one.questions), *cells)
            lines.append("".join(f"{cell:>12s}" for cell in row))
    return "\n".join(lines)
