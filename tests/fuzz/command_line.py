"""How the fuzzers run from the command line: random cases for a time, from a seed."""

from __future__ import annotations

import argparse
import random
import time
from collections.abc import Callable
from typing import TypeVar

Case = TypeVar("Case")


def seconds_and_seed(about: str | None, seconds: float = 120.0) -> tuple[float, int]:
    """Read ``--seconds`` and ``--seed``."""
    parser = argparse.ArgumentParser(description=about)
    parser.add_argument("--seconds", type=float, default=seconds)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    return given.seconds, given.seed


def run_for_a_time(
    about: str | None, draw: Callable[[random.Random], Case], check: Callable[[Case], object]
) -> int:
    """Check random cases, print every fault with its case, and return 1 if there was one."""
    seconds, seed = seconds_and_seed(about, 60.0)
    end = time.monotonic() + seconds
    cases, faults = 0, 0
    while time.monotonic() < end:
        case = draw(random.Random(f"{seed}/{cases}"))
        cases += 1
        try:
            check(case)
        except Exception as error:
            faults += 1
            print(ascii(f"{type(error).__name__}: {error}"), ascii(case), sep="\n  ")
    print(f"{cases} cases, {faults} faults")
    return int(faults > 0)
