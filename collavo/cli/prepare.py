"""``collavo prepare``: turn a COCO panoptic folder into shards of crayon maps and instructions.

The exit status is 0 if all was prepared, 3 if something was skipped and the rest is done, 2 after
an error, 130 after Ctrl-C and 143 after SIGTERM. A run that was broken off goes on where it stopped
when it is started again.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from collavo.panoptic.coco_index import CocoFolder, find_coco_folder
from collavo.panoptic.instructions import TEMPLATES
from collavo.prepared.shards import PrepareSettings

SKIPPED_STATUS = 3


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    default = PrepareSettings()
    where = parser.add_argument_group("input: --root, or the three parts")
    where.add_argument("--root", type=Path, help="COCO's own folder layout, as it is unzipped")
    where.add_argument("--split", default="val2017", help="with --root (default val2017)")
    where.add_argument("--images", type=Path, help="folder of the images")
    where.add_argument("--panoptic", type=Path, help="folder of the panoptic PNGs")
    where.add_argument("--annotations", type=Path, help="COCO panoptic JSON")
    parser.add_argument("--output", type=Path, required=True, help="folder to write")
    parser.add_argument(
        "--grid", type=int, nargs="+", default=list(default.grid),
        help="crayon grid: cells per side, or H W (default 35)",
    )  # fmt: skip
    parser.add_argument(
        "--reduce", choices=("majority", "nearest"), default=default.reduce,
        help="how a cell gets its segment (default majority)",
    )  # fmt: skip
    parser.add_argument(
        "--image-mode", choices=("squash", "pad"), default=default.image_mode,
        help="what the model's processor makes of a picture (default squash)",
    )  # fmt: skip
    parser.add_argument(
        "--max-number", type=int, default=default.max_number,
        help="largest instance number (default 20)",
    )  # fmt: skip
    parser.add_argument(
        "--templates", nargs="+", choices=list(TEMPLATES), default=list(default.templates),
        help="instructions to make (default: all three)",
    )  # fmt: skip
    parser.add_argument(
        "--num-images-per-shard", type=int, default=default.images_per_shard,
        help="entries of the JSON that go into one shard (default 1024)",
    )  # fmt: skip
    parser.add_argument(
        "--verify-images", action="store_true",
        help="decode the images; otherwise only their sizes are read",
    )  # fmt: skip
    parser.add_argument("--limit", type=int, help="only the first entries of the JSON")
    parser.add_argument("--workers", type=int, default=1, help="decoding threads (default 1)")
    parser.add_argument(
        "--overwrite", action="store_true", help="remove what an earlier run made, begin again"
    )
    parser.add_argument("--no-progress", action="store_true", help="show no bar")


def run(args: argparse.Namespace) -> int:
    """Prepare, print the report and return the exit status that says whether it is complete."""
    from collavo.prepared.write import prepare_folder

    if len(args.grid) not in (1, 2):
        raise ValueError(f"--grid: expected one or two sizes, got {args.grid}")
    settings = PrepareSettings(
        grid=(args.grid[0], args.grid[-1]),
        reduce=args.reduce,
        image_mode=args.image_mode,
        max_number=args.max_number,
        templates=tuple(args.templates),
        images_per_shard=args.num_images_per_shard,
        verify_images=args.verify_images,
        limit=args.limit,
    )
    try:
        report = prepare_folder(
            coco_folder(args),
            args.output,
            settings,
            workers=args.workers,
            overwrite=args.overwrite,
            progress=not args.no_progress,
        )
    except KeyboardInterrupt:
        again = "without --overwrite " if args.overwrite else ""
        hint = f"run it again {again}to go on where it stopped"
        raise KeyboardInterrupt(hint) from None
    print(report.summary())
    return SKIPPED_STATUS if report.skipped else 0


def coco_folder(args: argparse.Namespace) -> CocoFolder:
    """Return the input's parts.

    Raises:
        FileNotFoundError: naming the part that --root lacks.
        ValueError: if the parts are not all named, or named beside --root.
    """
    parts = {
        "--images": args.images,
        "--panoptic": args.panoptic,
        "--annotations": args.annotations,
    }
    named = [name for name, path in parts.items() if path is not None]
    if args.root is not None:
        if named:
            raise ValueError(f"{named[0]}: expected without --root, got both")
        return find_coco_folder(args.root, args.split)
    if len(named) < len(parts):
        missing = next(name for name in parts if name not in named)
        raise ValueError(f"{missing}: expected with {', '.join(parts)}, or --root, got none")
    return CocoFolder(args.images, args.panoptic, args.annotations)
