"""What a run of ``collavo demo --llava`` shows: checks, a table, ``report.json``, ``report.md``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from collavo import writing
from collavo.demo.llava.course import Results
from collavo.demo.llava.settings import Settings
from collavo.demo.report import Check, check_lines, machine, machine_in_words, write_content

ROWS = (
    ("built", "as built, nothing trained"),
    ("aligned", "after align (the projector alone)"),
    ("instructed", "after instruct, with the crayon"),
    ("crayon shuffled", "  same model, crayon rows shuffled"),
    ("crayon left out", "  same model, crayon left out"),
)
_KINDS = ("captions", "presence", "places")
# Of a score after instruct over another, by the end of a margin's name.
_COMPARED = {"built": "built", "off": "crayon left out", "shuffled": "crayon shuffled"}
_LABELS = {
    "built": "as built",
    "off": "the same model, crayon left out",
    "shuffled": "the same model, rows shuffled",
    "captions": "captions right",
    "presence": "classes",
    "places": "places",
}
STAND_INS = """\
What stands in for what: the language model (for Vicuna) and the vision tower (for CLIP) come with
the package. `python -m collavo.demo.llava.pretraining` made them, on other drawn scenes than these:
the one has read scenes written down as a word for each patch, and talk about them, and never a
picture; the other has learnt to name what its patches show with a head that was thrown away, and
never a word. Projector and crayon are untrained where this begins.
"""


def accuracies(measurements: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, float]]:
    """Return the share that is right, by measurement and kind, of a report's measurements.

    Args:
        measurements: As ``report.json`` has them.
    """
    return {
        name: {
            "captions": float(one["captions"]["right"]),
            "presence": float(one["presence"]["accuracy"] or 0.0),
            "places": float(one["places"]["accuracy"] or 0.0),
        }
        for name, one in measurements.items()
    }


def differences(scores: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
    """Return what ``instruct`` with the crayon is ahead by, in points, by margins' names and more.

    Args:
        scores: From :func:`accuracies`.

    Example:
        >>> nothing = {"captions": 0.0, "presence": 0.5, "places": 0.0}
        >>> scores = {"built": nothing, "instructed": {**nothing, "captions": 0.75}}
        >>> differences(scores)
        {'captions_built': 75.0, 'presence_built': 0.0, 'places_built': 0.0}
    """
    return {
        f"{kind}_{name}": round(100.0 * (scores["instructed"][kind] - scores[other][kind]), 2)
        for name, other in _COMPARED.items()
        if other in scores
        for kind in _KINDS
    }


def checks(results: Results, settings: Settings) -> list[Check]:
    """Compare a run with the margins of its settings, in percentage points.

    Args:
        results: Of the experiment.
        settings: With the margins.
    """
    measured = {name: one.as_dict() for name, one in results.measurements.items()}
    gained = differences(accuracies(measured))
    found = []
    for name, least in asdict(settings.margins).items():
        kind, other = name.rsplit("_", 1)
        title = f"{_LABELS[kind]}: after instruct minus {_LABELS[other]}"
        found.append(Check(title, gained[name], least))
    for name, run in results.stages.items():
        title = f"{name} moved what it trains and nothing else, bit for bit"
        found.append(Check(title, float(run.held and bool(run.moved)), 1.0, exact=True))
    return found


def table(measurements: Mapping[str, Mapping[str, Any]]) -> str:
    """Return the scores as a table of text.

    Args:
        measurements: As ``report.json`` has them.
    """
    head = f"{'right on held-out scenes, %':38s}{'captions':>9s}{'classes':>9s}{'places':>9s}"
    scores = accuracies(measurements)
    lines = [head, "-" * len(head)]
    for name, label in ROWS:
        cells = "".join(f"{100.0 * scores[name][kind]:9.1f}" for kind in _KINDS)
        lines.append(f"{label:38s}{cells}")
    lines.append("captions: all classes of the scene named and no other; classes: is there any,")
    lines.append("as many yes as no; places: which object is at the top, and at the bottom")
    return "\n".join(lines)


def content(results: Results, found: list[Check], settings: Settings, seed: int) -> dict[str, Any]:
    """Return everything that was measured, as ``report.json`` has it.

    Args:
        results: Of the experiment.
        found: The checks.
        settings: Of the run.
        seed: Of the run.
    """
    return {
        "demo": "llava",
        "seed": seed,
        "settings": asdict(settings),
        **machine(),
        "measurements": {name: one.as_dict() for name, one in results.measurements.items()},
        "checks": [{**asdict(check), "passed": check.passed} for check in found],
        "facts": results.facts,
        "stages": {
            name: {"moved": len(run.moved), "held": run.held, "losses": run.losses}
            for name, run in results.stages.items()
        },
        "seconds": results.seconds,
    }


def write(folder: Path, made: Mapping[str, Any], found: list[Check]) -> None:
    """Write ``report.json`` and ``report.md``, which shows ``scene.png``.

    Args:
        folder: Of the run.
        made: From :func:`content`.
        found: The checks.
    """
    write_content(folder / "report.json", made)
    text = (
        f"# LLaVA's two stages on drawn scenes\n\nSeed {made['seed']}, {machine_in_words()}, "
        f"{made['seconds']['total']:.0f} s.\n\n{STAND_INS}\n"
        f"```text\n{table(made['measurements'])}\n```\n\n"
        f"```text\n{check_lines(found)}\n```\n\n![A held-out scene](scene.png)\n"
    )
    writing.write_file(folder / "report.md", text.encode())
