"""Says at the end how many random calls ran, where many were asked for."""

from __future__ import annotations

from typing import Any

from fuzz_support import EXAMPLES, ISAS, examples_run


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Print the numbers of cases."""
    if EXAMPLES:
        counts = ", ".join(f"{count} {kind}" for kind, count in examples_run().items())
        terminalreporter.write_line(f"random calls on {', '.join(ISAS)}: {counts or 'none'}")
