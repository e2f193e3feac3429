"""Random commands in random surroundings: closed pipes, full disks, signals, locales, odd input.

``python -m tests.fuzz.fuzz_commands --seconds 120 --seed 0`` runs them, of the tree that
``PYTHONPATH`` names. A command may fail in such surroundings, but with the usual exit status, at
most one line of its own, and never with a traceback.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

from PIL import Image

ROOT = Path(__file__).resolve().parents[2]
NAME = "un été €"  # not every encoding has it
OUTPUTS = ("file", "file", "gone", "head", "full", "closed")
ERRORS = ("pipe", "pipe", "pipe", "full", "closed")
INPUTS: tuple[bytes | None, ...] = (None, b"", b"\xff\xfe?\n", "où est-il ?\n".encode(), b"\0\n")
VARIABLES: dict[str, tuple[str, ...]] = {
    "LC_ALL": ("", "C", "C.UTF-8", "POSIX", "xx_XX"),
    "PYTHONIOENCODING": ("", "ascii", "latin-1", "ascii:strict", "utf-8:strict"),
    "PYTHONUTF8": ("", "0"),
    "PYTHONCOERCECLOCALE": ("", "0"),
    "PYTHONUNBUFFERED": ("", "1"),
    "COLLAVO_BACKEND": ("", " ", "reference", "nonsense", "qlora_linear=cpu", "a=b"),
    "COLLAVO_ISA": ("", " ", "baseline", "nonsense"),
    "HOME": ("", "/nonexistent"),
    "COLUMNS": ("", "1", "nonsense"),
}


@dataclass(frozen=True)
class Case:
    """A command and its surroundings.

    Attributes:
        words: What follows ``python -m``; ``{coco}`` and ``{output}`` are folders.
        usual: Exit statuses that the command has by itself.
        output: What its output is: a file, a pipe without reader, a pipe whose reader leaves after
            a byte, a full disk, or nothing.
        errors: The same of its error stream.
        given: Its input; None: a closed one.
        variables: What is changed in its environment.
        number: A signal that it gets, or 0.
        after: Seconds before that.
    """

    words: tuple[str, ...]
    usual: tuple[int, ...]
    output: str = "file"
    errors: str = "pipe"
    given: bytes | None = b""
    variables: dict[str, str] = field(default_factory=dict)
    number: int = 0
    after: float = 0.0


SHOW = ("--image", "{coco}/images/{name}.png", "--panoptic", "{coco}/panoptic/{name}.png")
FOLDERS = ("--images", "{coco}/images", "--panoptic", "{coco}/panoptic")
NOWHERE = ("--llm", "{output}/none", "--vision", "{output}/none")
LISTED = ("--annotations", "{coco}/panoptic.json")
COMMANDS: tuple[tuple[tuple[str, ...], tuple[int, ...]], ...] = (
    (("collavo", "--version"), (0,)),
    (("collavo", "--help"), (0,)),
    (("collavo",), (2,)),
    (("collavo", "nonsense"), (2,)),
    (("collavo", "info"), (0,)),
    (("collavo", "info", "--json"), (0,)),
    (("collavo_kernels",), (0,)),
    (("collavo_kernels", "--json"), (0,)),
    (("collavo", "show", *SHOW, *LISTED, "--output", "{output}/été.png"), (0,)),
    (("collavo", "prepare", *FOLDERS, *LISTED, "--output", "{output}"), (0,)),
    (("collavo", "convert", "{output}/none", "{output}/new"), (2,)),
    (("collavo", "build", *NOWHERE, "--out", "{output}/new"), (2,)),
    (("collavo", "chat", "--model", "{output}/none"), (2,)),
    (("collavo", "eval", "--model", "{output}/none", *FOLDERS, *LISTED), (2,)),
    (("collavo", "train", "--model", "{output}/none", "--stage", "cpt"), (2,)),
    (("collavo", "bench", "--help"), (0,)),
    (("collavo", "demo", "--help"), (0,)),
)


def random_case(rng: random.Random) -> Case:
    """Draw a command and one to three misfortunes."""
    words, usual = rng.choice(COMMANDS)
    chosen = rng.sample(("output", "errors", "given", "variables", "signal"), rng.randint(1, 3))
    names = rng.sample(sorted(VARIABLES), rng.randint(1, 4)) if "variables" in chosen else []
    number = rng.choice((signal.SIGINT, signal.SIGTERM)) if "signal" in chosen else 0
    return Case(
        words,
        usual,
        rng.choice(OUTPUTS) if "output" in chosen else "file",
        rng.choice(ERRORS) if "errors" in chosen else "pipe",
        rng.choice(INPUTS) if "given" in chosen else b"",
        {name: rng.choice(VARIABLES[name]) for name in names},
        number,
        rng.uniform(1.0, 7.0),
    )


def write_coco(folder: Path) -> Path:
    """Write a COCO panoptic folder of one small image."""
    for name in ("images", "panoptic"):
        (folder / name).mkdir(parents=True)
        Image.new("RGB", (16, 12), (1, 0, 0)).save(folder / name / f"{NAME}.png")
    segment = {"id": 1, "category_id": 1, "area": 192, "bbox": [0, 0, 16, 12], "iscrowd": 0}
    content = {
        "images": [{"id": 1, "file_name": f"{NAME}.png", "width": 16, "height": 12}],
        "annotations": [{"image_id": 1, "file_name": f"{NAME}.png", "segments_info": [segment]}],
        "categories": [{"id": 1, "name": "person", "isthing": 1}],
    }
    (folder / "panoptic.json").write_text(json.dumps(content), encoding="utf-8")
    return folder


def run(case: Case, folder: Path) -> tuple[int, str]:
    """Run a case in an empty folder; return its exit status and what its error stream got."""
    places = {"coco": write_coco(folder / "coco"), "output": folder / "out", "name": NAME}
    (folder / "out").mkdir()
    words = [word.format(**places) for word in case.words]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    environment["PYTHONPATH"] = os.environ.get("PYTHONPATH") or str(ROOT)
    environment.pop("PYTHONUNBUFFERED", None)
    missing = [n for n, s in ((0, case.given), (1, case.output), (2, case.errors))
               if s is None or s == "closed"]  # fmt: skip
    with ExitStack() as stack:
        said = stack.enter_context((folder / "said").open("w+b"))
        reader, out = os.pipe()
        full = stack.enter_context(open("/dev/full", "wb"))
        if case.output == "gone":
            os.close(reader)
        targets = {"file": stack.enter_context((folder / "printed").open("wb")), "full": full}
        process = subprocess.Popen(
            [sys.executable, "-m", *words],
            cwd=folder / "out",
            env={**environment, **case.variables},
            stdin=subprocess.PIPE,
            stdout=targets.get(case.output, out),
            stderr=full if case.errors == "full" else said,
            preexec_fn=lambda: [os.close(number) for number in missing] and None,
        )
        os.close(out)
        if case.number:
            stack.callback(_signal_later(process, case.number, case.after))
        if case.output == "head":
            os.read(reader, 1)
        if case.output != "gone":
            os.close(reader)
        process.communicate(case.given or b"", timeout=300)
        said.seek(0)
        return process.returncode, said.read().decode(errors="replace")


def _signal_later(process: subprocess.Popen[bytes], number: int, seconds: float):  # type: ignore[no-untyped-def]
    """Send a signal while the process runs; returns what waits for the sender."""
    import threading

    timer = threading.Timer(seconds, process.send_signal, [number])
    timer.start()
    return timer.cancel


def faults(case: Case, status: int, said: str) -> list[str]:
    """List what a case did that no command may do."""
    found = [f"it said {word!r}" for word in ("Traceback", "Exception ignored") if word in said]
    usual = {*case.usual}
    if case.output in ("gone", "head") or case.errors == "full":
        usual |= {141, 2}
    if case.output == "full" or "nonsense" in case.variables.values():
        usual |= {2}
    # A name that the file system's encoding lacks cannot be opened; prepare skips it.
    usual |= {2, 3} if case.variables else set()
    if case.number:
        usual |= {128 + case.number, -case.number}
    if status not in usual:
        found.append(f"status {status}, expected one of {sorted(usual)}")
    program = "python -m collavo_kernels" if case.words[0] == "collavo_kernels" else "collavo"
    lines = [line for line in said.splitlines() if line.startswith(program)]
    if len(lines) > 1:
        found.append(f"{len(lines)} lines: {lines}")
    ended = status in (130, 143) and case.errors == "pipe"
    if ended and (len(lines) != 1 or not lines[0].endswith(("interrupted", "terminated"))):
        found.append(f"no line says that it was ended: {said!r}")
    return found


def check(case: Case) -> None:
    """Run a case and raise if it did what no command may do."""
    with tempfile.TemporaryDirectory() as folder:
        status, said = run(case, Path(folder))
    wrong = faults(case, status, said)
    if wrong:
        raise AssertionError(f"{case}: {'; '.join(wrong)}\n{said}")


def main() -> int:
    """Run random cases for a while and print what they found."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=120.0, help="how long (default 120)")
    parser.add_argument("--seed", type=int, default=0, help="of the cases (default 0)")
    args = parser.parse_args()
    rng, start, count, failed = random.Random(args.seed), time.monotonic(), 0, 0
    while time.monotonic() - start < args.seconds:
        try:
            check(random_case(rng))
        except AssertionError as error:
            failed += 1
            print(error, flush=True)
        count += 1
    print(f"{count} cases, {failed} failed (seed {args.seed})")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
