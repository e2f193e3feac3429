"""The ``collavo`` command: one file per subcommand, loaded only when it is asked for.

A subcommand's module has ``add_arguments(parser)`` and ``run(args) -> int`` (the exit status), and
``parents()`` if it takes the options of other parsers too.
What a user did wrong (``ValueError``, a missing file, a package that is too old) is printed as one
line; anything else keeps its traceback.
"""

from __future__ import annotations

import argparse
import importlib
import logging
import sys
from collections.abc import Sequence
from typing import Any

from collavo_kernels import __version__
from collavo_kernels.info import RequirementError

DESCRIPTION = "CoLLaVO: a vision-language model that sees objects, on kernels of its own."
COMMANDS = {
    "demo": "train and measure a tiny CoLLaVO on drawn scenes, in minutes on a CPU",
    "prepare": "turn a COCO panoptic folder into shards of crayon maps and instructions",
    "train": "train a model: crayon prompt tuning (cpt) or instruction tuning (cit)",
    "chat": "answer questions about an image with its panoptic map",
    "eval": "measure Class2Binary and Box2Class on a COCO panoptic folder",
    "show": "draw an image's segments, crayon grid and numbered boxes",
    "info": "print versions, devices and the backend of every operator, with reasons",
    "bench": "run the benchmarks and write their tables and plots",
}
_MODULES = {"eval": "evaluate"}
_NEED_A_MODEL = ("demo", "train", "chat", "eval")


def build_parser(command: str | None = None) -> argparse.ArgumentParser:
    """Build the parser; only the named subcommand's module is imported."""
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
            sub.set_defaults(run=module.run)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run one subcommand and return its exit status.

    Args:
        argv: The command line without the program's name; None takes ``sys.argv``.
    """
    # transformers imports PEFT, that imports bitsandbytes, and that warns about kernels of its own
    # which no command runs.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    arguments = list(sys.argv[1:] if argv is None else argv)
    command = next((word for word in arguments if not word.startswith("-")), None)
    try:
        args = build_parser(command).parse_args(arguments)
        return int(args.run(args))
    except (ValueError, OSError, RequirementError) as error:
        print(f"collavo {command}: error: {error}", file=sys.stderr)
        return 2
