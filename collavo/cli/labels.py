"""``collavo labels``: see and check what of conversations is trained on."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from collavo.conversations.llava import IMAGE_ORDERS


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument(
        "--model",
        type=Path,
        required=True,
        help="folder of any model with its processor or tokenizer; weights are not read",
    )
    parser.add_argument(
        "--data",
        type=Path,
        nargs="+",
        required=True,
        help="conversations in LLaVA's format: JSON, JSON lines or YAML of a mixture",
    )
    parser.add_argument(
        "--images",
        type=Path,
        help="folder of the images, whose sizes are read (none: blank squares stand in for them)",
    )
    parser.add_argument("--template", help="name of a chat template in place of the folder's own")
    which = parser.add_mutually_exclusive_group()
    which.add_argument(
        "--sample", type=int, default=0, help="print the record of this number (default 0)"
    )
    which.add_argument(
        "--all", action="store_true", help="check all records; status 1 if one is labelled wrongly"
    )
    parser.add_argument(
        "--image-order",
        choices=IMAGE_ORDERS,
        default="first",
        help="where images stand in their turn (default first, as LLaVA's code has it)",
    )
    parser.add_argument(
        "--max-length", type=int, help="longest conversation in tokens, images included"
    )
    parser.add_argument("--no-progress", action="store_true", help="show no bar")


def run(args: argparse.Namespace) -> int:
    """Print one conversation, or what was found in all; return whether all is as it should be."""
    from collavo.loss_masks.inspection import LabelInspector, inspect_labels
    from collavo.loss_masks.printing import format_report
    from collavo.loss_masks.processors import load_processor
    from collavo.loss_masks.records import read_records
    from collavo.processing.chat_templates import chat_template

    template = None if args.template is None else chat_template(args.template)
    if args.images is not None and not args.images.is_dir():
        raise FileNotFoundError(f"--images: there is no folder {args.images}")
    options = {"template": template, "max_length": args.max_length, "images": args.images}
    processor = load_processor(args.model)
    records = read_records(args.data, image_order=args.image_order)
    colour = _takes_colours()
    if not args.all:
        return _print_one(LabelInspector(processor, **options), records, args.sample, colour)
    progress = sys.stderr.isatty() and not args.no_progress
    report = inspect_labels(processor, records, progress=progress, **options)
    print(format_report(report, template=args.template or "", colour=colour))
    return 0 if report.passed else 1


def _print_one(inspector: Any, records: Iterator[Any], number: int, colour: bool) -> int:
    from collavo.loss_masks.inspection import LabelReport
    from collavo.loss_masks.printing import format_sample
    from collavo.panoptic.coco_index import Skipped

    if number < 0:
        raise ValueError(f"--sample: expected a number from 0, got {number}")
    seen = sum(1 for _ in islice(records, number))
    record = next(records, None)
    if record is None:
        raise ValueError(f"--sample: expected the number of one of {seen} records, got {number}")
    if isinstance(record, Skipped):
        raise ValueError(f"{record.name}: it is left out: {record.reason}")
    one = inspector.inspect(record, record["name"])
    report = LabelReport(inspector.source.name, inspector.source.finder.asks)
    report.add(one, inspector.source.decode)
    print(format_sample(one, report, inspector.source, colour=colour))
    return 0 if report.passed else 1


def _takes_colours() -> bool:
    return (
        sys.stdout.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"
    )
