"""How every plot looks, and how it is saved."""

from __future__ import annotations

from pathlib import Path
from typing import Any

TEXT = "#7d7d7d"
# Okabe and Ito's palette without its black, which is lost on a dark page.
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#B8A800", "#999999")
MARKERS = ("o", "s", "D", "^", "v", "P", "X", "*")
STYLE = {
    "svg.hashsalt": "collavo",
    "svg.fonttype": "none",
    "font.size": 9,
    "font.family": "sans-serif",
    "text.color": TEXT,
    "axes.labelcolor": TEXT,
    "axes.edgecolor": TEXT,
    "xtick.color": TEXT,
    "ytick.color": TEXT,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "legend.frameon": False,
}


def pyplot() -> Any:
    """Return matplotlib's pyplot in this page's style."""
    import matplotlib

    matplotlib.use("svg")
    import matplotlib.pyplot as plt

    plt.rcParams.update(STYLE)
    return plt


def write(figure: Any, path: Path, *, transparent: bool = True) -> None:
    """Save a figure as the same bytes each time."""
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, transparent=transparent, bbox_inches="tight", metadata={"Date": None})
    pyplot().close(figure)
