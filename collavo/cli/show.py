"""``collavo show``: draw an image's segments, numbered boxes and crayon grid."""

from __future__ import annotations

import argparse
from pathlib import Path

from collavo.panoptic import detections_from_map, format_objects
from collavo.panoptic.coco import find_panoptic_map
from collavo.panoptic.images import read_image
from collavo.pictures.drawing import VIEWS, check_suffix, save_scene


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument("--image", type=Path, required=True, help="the image")
    parser.add_argument("--panoptic", type=Path, required=True, help="its panoptic PNG")
    parser.add_argument(
        "--annotations", type=Path, required=True, help="COCO panoptic JSON that lists the PNG"
    )
    parser.add_argument(
        "--grid", type=int, nargs="+", default=[24], help="crayon grid: cells per side, or H W"
    )
    parser.add_argument(
        "--max-number", type=int, default=20, help="largest instance number (default 20)"
    )
    parser.add_argument(
        "--panels",
        nargs="+",
        default=list(VIEWS),
        metavar="PANEL",
        help=f"what to draw, in this order: some of {', '.join(VIEWS)} (default: all)",
    )
    parser.add_argument(
        "--panel-size",
        type=int,
        default=760,
        help="longer side of the drawn image in pixels (default 760)",
    )
    parser.add_argument(
        "--output",
        type=Path,
        help="picture to write: .png, or .svg for vectors (default: IMAGE's name with -crayon.png)",
    )


def run(args: argparse.Namespace) -> int:
    """Draw the picture, save it and print the objects' text."""
    if len(args.grid) not in (1, 2) or min(args.grid) < 1:
        raise ValueError(f"--grid: expected one or two sizes of at least 1, got {args.grid}")
    if args.max_number < 0:
        raise ValueError(f"--max-number: expected at least 0, got {args.max_number}")
    output = check_suffix(args.output or f"{args.image.stem}-crayon.png")
    image = read_image(args.image)
    panoptic = find_panoptic_map(args.panoptic, args.annotations, image=args.image)
    save_scene(
        output,
        image,
        panoptic,
        grid=(args.grid[0], args.grid[-1]),
        max_number=args.max_number,
        panel=args.panel_size,
        title=f"{args.image.name}  {image.width} x {image.height}",
        panels=args.panels,
    )
    text = format_objects(detections_from_map(panoptic, max_number=args.max_number))
    print(text or "no object")
    print(f"saved {output}")
    return 0
