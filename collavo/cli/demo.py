"""``collavo demo``: train and measure a tiny CoLLaVO on drawn scenes.

Scenes are written to disk in COCO panoptic format and read back, a tiny model gets a base training
that stands in for a pretrained LLaVA, then crayon prompt tuning (CPT) and instruction tuning (CIT)
with Dual QLoRA, its steps of both kinds in turn. Questions about objects of held-out scenes show
what the Crayon Prompt does, beside a control and, if asked for, ablations. A score below what is
expected is a line of the report; the exit status is 1 only if something moved that must not.
"""

from __future__ import annotations

import argparse
import logging
import sys
import time
import warnings
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from tqdm.auto import tqdm

from collavo import writing

if TYPE_CHECKING:
    from collavo.demo.report import Check


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of ``collavo demo``."""
    parser.add_argument(
        "--output", type=Path, default=Path("collavo-demo"), help="folder for scenes and report"
    )
    parser.add_argument("--seed", type=int, default=0, help="of everything random (default: 0)")
    parser.add_argument(
        "--quick", action="store_true", help="about a minute: fewer steps, no control training"
    )
    parser.add_argument(
        "--ablations",
        action="store_true",
        help="also train one adapter in place of two, and two phases in place of the alternation",
    )
    parser.add_argument(
        "--llava",
        action="store_true",
        help="LLaVA's two stages in place of CoLLaVO's: build, align, instruct with the crayon",
    )
    parser.add_argument("--no-progress", action="store_true", help="no progress bars")


def run(args: argparse.Namespace) -> int:
    """Run the experiment, print and write its report; return 1 if what must hold does not."""
    if args.seed < 0:
        raise ValueError(f"--seed: expected at least 0, got {args.seed}")
    if args.output.exists() and not args.output.is_dir():
        raise ValueError(f"--output: {args.output} is a file, expected a folder")
    if args.llava and args.ablations:
        raise ValueError("--ablations: expected without --llava, whose run has none")
    _quiet_libraries()
    return _run_llava(args) if args.llava else _run_crayon(args)


def _run_crayon(args: argparse.Namespace) -> int:
    from collavo.demo import answers, report
    from collavo.demo.estimate import estimate_seconds, in_words
    from collavo.demo.experiment import Experiment
    from collavo.demo.settings import FULL, QUICK
    from collavo.model.files import weight_patterns

    settings = replace(QUICK if args.quick else FULL, ablations=args.ablations)
    args.output.mkdir(parents=True, exist_ok=True)
    writing.check_file(args.output / "report.json")
    start = time.perf_counter()
    print(
        f"collavo demo, seed {args.seed}: {in_words(estimate_seconds(settings))} on this machine "
        f"({report.machine_in_words()})",
        flush=True,
    )
    # In a log file a progress bar is thousands of lines.
    progress = sys.stderr.isatty() and not args.no_progress
    experiment = Experiment(settings, args.seed, args.output, tqdm.write, progress=progress)
    results = experiment.run()
    found = report.checks(results, settings)
    shown = answers.clear_scene(experiment.test)
    answered = answers.ask_about_scene(experiment, shown)
    picture = args.output / "scene.png"
    answers.draw_answers(experiment.test, shown, answered, picture)
    results.seconds["total"] = round(time.perf_counter() - start, 1)
    report.write_json(args.output / "report.json", results, found, settings, args.seed)
    with writing.written_folder(args.output / "model", weight_patterns()) as partial:
        experiment.model.save_pretrained(partial)
        experiment.processor.save_pretrained(partial)
    print(f"\n{report.table(results)}\n")
    print(report.check_lines(found))
    print(f"\nheld-out scene, {picture}:\n{answers.scene_lines(answered)}")
    print(f"\n{results.seconds['total']:.0f} s; report, pictures and model: {args.output}")
    return _verdict(found, args)


def _run_llava(args: argparse.Namespace) -> int:
    from collavo.demo import report as common
    from collavo.demo.estimate import estimate_llava, in_words
    from collavo.demo.llava import report, sheet
    from collavo.demo.llava.course import Course
    from collavo.demo.llava.settings import FULL, QUICK

    settings = QUICK if args.quick else FULL
    args.output.mkdir(parents=True, exist_ok=True)
    writing.check_file(args.output / "report.json")
    start = time.perf_counter()
    print(
        f"collavo demo --llava, seed {args.seed}: {in_words(estimate_llava(settings))} on this "
        f"machine ({common.machine_in_words()})",
        flush=True,
    )
    progress = sys.stderr.isatty() and not args.no_progress
    course = Course(settings, args.seed, args.output, tqdm.write, progress=progress)
    results = course.run()
    found = report.checks(results, settings)
    shown, picture = sheet.scene_of(course), args.output / "scene.png"
    sheet.draw(course, shown, picture)
    course.save()
    results.seconds["total"] = round(time.perf_counter() - start, 1)
    made = report.content(results, found, settings, args.seed)
    report.write(args.output, made, found)
    print(f"\n{report.table(made['measurements'])}\n\n{report.STAND_INS}")
    print(common.check_lines(found))
    print(f"\nheld-out scene, {picture}:\n{sheet.scene_text(course, shown)}")
    print(f"\n{results.seconds['total']:.0f} s; report, picture and model: {args.output}")
    return _verdict(found, args)


def _verdict(found: list[Check], args: argparse.Namespace) -> int:
    broken = [check.name for check in found if check.exact and not check.passed]
    if broken:
        print(
            f"collavo demo: seed {args.seed}: does not hold: {'; '.join(broken)}", file=sys.stderr
        )
    return 1 if broken else 0


def _quiet_libraries() -> None:
    """Keep the libraries' notices and their own bars out of the report."""
    from transformers.utils import logging as transformers_logging

    warnings.filterwarnings("ignore", category=FutureWarning)
    for name in ("transformers", "accelerate", "bitsandbytes"):
        logging.getLogger(name).setLevel(logging.ERROR)
    transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
