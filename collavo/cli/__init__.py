"""The ``collavo`` command: one file per subcommand, loaded only when it is asked for.

A subcommand's module has ``add_arguments(parser)`` and ``run(args) -> int`` (the exit status), and
``parents()`` if it takes the options of other parsers too.
What a user did wrong (``ValueError``, a missing file, a package that is too old) is printed as one
line with status 2, an interrupt with 130 or 143; anything else keeps its traceback.
``collavo_kernels``, and torch with it, is imported where it is needed: that takes seconds, in which
Ctrl-C is one line too.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import logging
import os
import re
import signal
import sys
from collections.abc import Sequence
from functools import partial
from types import FrameType
from typing import Any

DESCRIPTION = "CoLLaVO: a vision-language model that sees objects, on kernels of its own."
COMMANDS = {
    "demo": "train and measure a tiny CoLLaVO on drawn scenes, in minutes on a CPU",
    "prepare": "turn a COCO panoptic folder into shards of crayon maps and instructions",
    "build": "put a LLaVA together from a language model and a CLIP tower",
    "convert": "turn the official CoLLaVO or a LLaVA into a CoLLaVO folder, or a folder back",
    "train": "train a stage: the crayon (cpt), adapters (cit), LLaVA's two (align, instruct)",
    "labels": "see and check what of conversations is trained on, with any processor",
    "chat": "answer questions about an image with its panoptic map",
    "eval": "measure Class2Binary and Box2Class on a COCO panoptic folder",
    "show": "draw an image's segments, crayon grid and numbered boxes",
    "info": "print versions, devices and the backend of every operator, with reasons",
    "bench": "run the benchmarks and write their tables and plots",
}
_MODULES = {"eval": "evaluate"}
_NEED_A_MODEL = ("demo", "build", "convert", "train", "labels", "chat", "eval")
_READ_PICTURES = ("prepare", "train", "labels", "chat", "eval", "show")


def build_parser(command: str | None = None) -> argparse.ArgumentParser:
    """Build the parser; only the named subcommand's module is imported."""
    from collavo_kernels import __version__

    parser = argparse.ArgumentParser(prog="collavo", description=DESCRIPTION)
    parser.add_argument("--version", action="version", version=f"collavo {__version__}")
    subparsers = parser.add_subparsers(dest="command", metavar="command", required=True)
    for name, summary in COMMANDS.items():
        module: Any = None
        if name == command:
            if name in _NEED_A_MODEL:
                importlib.import_module("collavo._requirements")
            module = importlib.import_module(f"collavo.cli.{_MODULES.get(name, name)}")
        parents = module.parents() if hasattr(module, "parents") else ()
        sub = subparsers.add_parser(name, help=summary, description=summary, parents=parents)
        if module is not None:
            module.add_arguments(sub)
            if name in _READ_PICTURES:
                sub.add_argument(
                    "--max-pixels",
                    type=int,
                    help="most pixels of a picture or map, read or drawn (default 89478485)",
                )
            sub.set_defaults(run=module.run)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run one subcommand and return its exit status.

    Args:
        argv: The command line without the program's name; None takes ``sys.argv`` and ends the
            process's work: signals that come later are ignored.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    command = next((word for word in arguments if not word.startswith("-")), None)
    program = f"collavo {command}" if command in COMMANDS else "collavo"
    if argv is None:
        _leave_while_loading(program)
    from collavo_kernels.info import RequirementError, run_command

    return run_command(
        program,
        lambda: _run(arguments, command),
        own_process=argv is None,
        mistakes=(ValueError, OSError, RequirementError),
    )


def _leave_while_loading(program: str) -> None:
    """Let a signal end the process until ``run_command``, which torch comes with, takes over.

    An exception would not do: modules that are being loaded swallow some.
    """

    def leave(word: str, number: int, _: FrameType | None) -> None:
        with contextlib.suppress(OSError, ValueError):
            print(f"{program}: {word}", file=sys.stderr, flush=True)
        os._exit(128 + number)

    for signum, word in ((signal.SIGINT, "interrupted"), (signal.SIGTERM, "terminated")):
        if signal.getsignal(signum) is not signal.SIG_IGN:
            signal.signal(signum, partial(leave, word))


def _run(arguments: list[str], command: str | None) -> int:
    # transformers imports PEFT, that imports bitsandbytes, and that warns about kernels of its own
    # which no command runs.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    args = build_parser(command).parse_args(arguments)
    if getattr(args, "max_pixels", None) is not None:
        _allow_pixels(args.max_pixels)
    return int(args.run(args))


def _allow_pixels(count: int) -> None:
    from PIL import Image

    if count < 1:
        raise ValueError(f"--max-pixels: expected at least 1, got {count}")
    # Pillow's own limit, in this process and those that it forks.
    Image.MAX_IMAGE_PIXELS = count


def expect_text(argument: str, text: str) -> str:
    """Check that words from a command line or a terminal are text and return them.

    Raises:
        ValueError: if they hold bytes that are no text in the encoding of the surroundings.
    """
    odd = re.search("[\ud800-\udfff]", text)
    if odd is None:
        return text
    raise ValueError(
        f"{argument}: expected UTF-8 text, got {text!r}; character {odd.start() + 1} is no text: "
        "write it in UTF-8, in a locale that has it"
    )
