"""``collavo bench``: run the benchmarks of the checkout, keep their tables, draw their plots."""

from __future__ import annotations

import argparse
import importlib.util
import subprocess
import sys
from pathlib import Path

_RUN = """
import runpy, signal
if hasattr(signal, "SIGPIPE"):
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)
runpy.run_module({name!r}, run_name="__main__", alter_sys=True)
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of ``collavo bench``."""
    parser.add_argument("--full", action="store_true", help="every shape, not the quick selection")
    parser.add_argument("--save", action="store_true", help="keep tables and draw the plots")
    parser.add_argument("--device", help="device to measure (default: a GPU where there is one)")
    parser.add_argument(
        "--base", metavar="REF", help="our own providers alone, in turns with those of a commit"
    )
    parser.add_argument("-k", dest="expression", help="only benchmarks that match, as pytest's -k")


def checkout() -> Path:
    """Return the folder that holds ``benchmarks/``.

    Raises:
        FileNotFoundError: where the package was installed without its sources.
    """
    root = Path(__file__).resolve().parents[2]
    for folder in (Path.cwd(), root):
        if (folder / "benchmarks" / "conftest.py").is_file() and (folder / "collavo").is_dir():
            return folder
    raise FileNotFoundError(
        "benchmarks/: not found; the benchmarks are part of the source checkout, not of the "
        "installed package: clone the repository and run 'collavo bench' inside it"
    )


def run(args: argparse.Namespace) -> int:
    """Run ``pytest benchmarks/ --benchmark-only`` with the chosen selection."""
    root = checkout()
    for package in ("pytest", "pytest_benchmark"):
        if importlib.util.find_spec(package) is None:
            raise ValueError(f"{package} is not installed: pip install 'collavo-kernels[test]'")
    command = [*_python_module("pytest"), "benchmarks/", "--benchmark-only", "-q"]
    command += ["--full"] if args.full else []
    command += ["--save-results"] if args.save else []
    command += ["--device", args.device] if args.device else []
    command += ["--base", args.base] if args.base else []
    command += ["-k", args.expression] if args.expression else []
    status = subprocess.run(command, cwd=root, check=False).returncode
    if status == 0 and args.save:
        plots = _python_module("benchmarks.plots")
        status = subprocess.run(plots, cwd=root, check=False).returncode
    return status if status >= 0 else 128 - status  # a signal ended it


def _python_module(name: str) -> list[str]:
    """Return the command that runs a module and that a closed pipe ends without a word."""
    return [sys.executable, "-c", _RUN.format(name=name)]
