"""What a run shows: its checks, a table in the terminal, and ``report.json``."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from collavo import writing
from collavo.demo.experiment import Results
from collavo.demo.settings import Settings
from collavo_kernels import info

ROWS = (
    ("base", "base, before any crayon"),
    ("cpt", "after CPT (the crayon alone)"),
    ("cit", "after CIT, both adapters in turn"),
    ("cit, crayon shuffled", "  same model, crayon rows shuffled"),
    ("cit, crayon left out", "  same model, crayon left out"),
    ("control", "  control: same steps, no crayon"),
    ("one adapter", "  ablation: one adapter, rank doubled"),
    ("image phase", "  ablation: Image-CIT steps first ..."),
    ("vl phase", "  ... then VL-CIT steps, no turns"),
)
# Of a score after CIT over another: the margin's name, and the other.
_COMPARED = (("base", "base"), ("control", "control"), ("shuffled", "cit, crayon shuffled"))


@dataclass(frozen=True)
class Check:
    """One thing that a run is expected to show.

    Args:
        name: What, in words.
        value: What was measured.
        expected: What it is to reach.
        exact: Whether it must hold in every run, whatever was learned.
    """

    name: str
    value: float
    expected: float
    exact: bool = False

    @property
    def passed(self) -> bool:
        """Whether the value reaches what is expected."""
        return self.value >= self.expected


def differences(scores: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
    """Return what CIT gained, in percentage points, under the names of ``Margins``.

    Args:
        scores: Accuracy in 0..1 by measurement and kind (``"b2c"``, ``"c2b"``).

    Example:
        >>> scores = {"base": {"b2c": 0.5, "c2b": 0.5}, "cit": {"b2c": 0.75, "c2b": 0.5}}
        >>> differences(scores)
        {'b2c_base': 25.0, 'c2b_base': 0.0}
    """
    return {
        f"{kind}_{name}": round(100.0 * (scores["cit"][kind] - scores[other][kind]), 2)
        for name, other in _COMPARED
        if other in scores
        for kind in ("b2c", "c2b")
    }


def checks(results: Results, settings: Settings) -> list[Check]:
    """Compare a run with the margins of its settings, in percentage points.

    Args:
        results: Of the experiment.
        settings: With the margins.
    """
    gained = differences(
        {
            name: {"b2c": one.b2c.accuracy or 0.0, "c2b": one.c2b.accuracy or 0.0}
            for name, one in results.measurements.items()
        }
    )
    found = []
    for name, other in _COMPARED:
        for kind in ("b2c", "c2b"):
            expected = getattr(settings.margins, f"{kind}_{name}")
            if expected is not None:
                title = f"{kind.upper()}: after CIT minus {_LABELS[other]}"
                found.append(Check(title, gained[f"{kind}_{name}"], expected))
    return found + [Check(name, float(held), 1.0, exact=True) for name, held in facts(results)]


_LABELS = {
    "base": "base",
    "control": "the same steps without crayon",
    "cit, crayon shuffled": "the same model, rows shuffled",
}


def facts(results: Results) -> list[tuple[str, bool]]:
    """List what must hold in every run, to the last bit, and whether it did.

    Args:
        results: Of the experiment.
    """
    found = results.facts
    kept = all(phase["idle_kept"] for phase in results.phases.values())
    listed = [
        ("CPT moved the crayon and nothing else", found["cpt_moved_only_the_crayon"]),
        ("CIT left the 4-bit base as it was, bit for bit", found["base_identical"]),
        ("no step moved the adapter that it does not train, bit for bit", kept),
    ]
    phases = found.get("phases")
    if phases is not None:
        listed += [
            ("the vl phase left the image adapter, bit for bit", phases["image_adapter_identical"]),
            (
                "vl adapter off, crayon put back: the image phase's outputs, bit for bit",
                phases["image_outputs_restored"],
            ),
        ]
    return listed


def table(results: Results) -> str:
    """Return the scores as a table of text.

    Args:
        results: Of the experiment.
    """
    title = "accuracy on held-out scenes, %"
    head = f"{title:38s}{'B2C':>7s}{'C2B':>8s}{'yes':>8s}{'no':>8s}"
    lines = [head, "-" * len(head)]
    for key, label in ROWS:
        if key in results.measurements:
            one = results.measurements[key]
            values = (one.b2c.accuracy, one.c2b.accuracy, one.c2b.recall, one.c2b.specificity)
            b2c, c2b, recall, specificity = (100.0 * (value or 0.0) for value in values)
            lines.append(f"{label:38s}{b2c:7.1f}{c2b:8.1f}{recall:8.1f}{specificity:8.1f}")
    lines.append("B2C: which object is in this box; C2B: is there any such object, and those whose")
    lines.append("answer is yes and no")
    return "\n".join(lines)


def check_lines(found: list[Check]) -> str:
    """Return the checks as lines of text.

    Args:
        found: From :func:`checks`.
    """
    lines = []
    for check in found:
        if check.exact:
            lines.append(f"  {'ok    ' if check.passed else 'FAILED'} {check.name}")
        else:
            lines.append(
                f"  {'ok    ' if check.passed else 'missed'} {check.name}: "
                f"{check.value:+.1f} (at least {check.expected:+.1f})"
            )
    return "\n".join(lines)


def machine() -> dict[str, Any]:
    """Say where a run was made: processor, instruction set of the kernels, threads, torch."""
    here = info.collect()
    return {
        "processor": here.platform["processor"],
        "isa": here.cpu_kernels.get("instruction_set", "none"),
        "threads": here.threads["torch"],
        "torch": torch.__version__,
    }


def machine_in_words() -> str:
    """Name processor, instruction set and threads, such as ``AMD EPYC 9654, avx512, 1 thread``."""
    here = machine()
    threads = "1 thread" if here["threads"] == 1 else f"{here['threads']} threads"
    return f"{here['processor']}, {here['isa']}, {threads}"


def write_json(
    path: Path, results: Results, found: list[Check], settings: Settings, seed: int
) -> None:
    """Write everything that was measured.

    Args:
        path: The file.
        results: Of the experiment.
        found: The checks.
        settings: Of the run.
        seed: Of the run.
    """
    content: dict[str, Any] = {
        "seed": seed,
        "settings": asdict(settings),
        **machine(),
        "measurements": {
            name: {"crayon": one.crayon, "b2c": one.b2c.as_dict(), "c2b": one.c2b.as_dict()}
            for name, one in results.measurements.items()
        },
        "checks": [{**asdict(check), "passed": check.passed} for check in found],
        "facts": results.facts,
        "phases": results.phases,
        "seconds": results.seconds,
        "losses": results.losses,
    }
    write_content(path, content)


def write_content(path: Path, content: Mapping[str, Any]) -> None:
    """Write a report as JSON, a line an entry: to be read, and to be compared by line.

    Args:
        path: The file.
        content: Entries by name.
    """
    entries = ",\n".join(f"{json.dumps(key)}: {_entry(value)}" for key, value in content.items())
    writing.write_file(path, f"{{\n{entries}\n}}\n".encode())


def _entry(value: Any) -> str:
    if isinstance(value, dict):
        lines = ",\n".join(f"  {json.dumps(key)}: {json.dumps(one)}" for key, one in value.items())
        return f"{{\n{lines}\n}}"
    if isinstance(value, list):
        return "[\n" + ",\n".join(f"  {json.dumps(one)}" for one in value) + "\n]"
    return json.dumps(value)
