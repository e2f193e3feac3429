"""A few cases of the fuzzer of commands; minutes of it run from the command line."""

from __future__ import annotations

import random
import sys

import pytest

from tests.fuzz.fuzz_commands import Case, check, faults, random_case

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="needs /dev/full")


@pytest.mark.parametrize("seed", range(3))
def test_random_commands(seed: int) -> None:
    check(random_case(random.Random(seed)))


def test_the_check_sees_faults() -> None:
    """What the commands did before: a late flush, an unhandled signal, two lines of an error."""
    flushed = Case(("collavo", "info"), (0,), output="gone")
    assert faults(flushed, 120, "Exception ignored in: <stdout>\n")
    interrupted = Case(("collavo", "info"), (0,), number=2)
    assert faults(interrupted, 130, "Traceback (most recent call last):\n")
    assert not faults(interrupted, 130, "collavo info: interrupted\n")
    assert faults(Case(("collavo", "chat"), (2,)), 2, "collavo chat: error: a\ncollavo: b\n")
