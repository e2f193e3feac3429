"""The README's picture: six to eight bars in words, each the quotient of two rows of the results.

A claim names the rows that it may come from; where a device has no such rows its bar is left out,
and where it has rows of calls with other work between them (``-cold``) those count. All bars of a
picture are of one number of threads and one instruction set.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks import report
from benchmarks.caches import COLD
from benchmarks.ops.qlora_linear_cases import FLOAT32_ADAPTERS
from benchmarks.plot_style import COLOURS, pyplot, write

# Bars, at most, and at least where a device's picture is to be drawn.
MOST, LEAST = 8, 3
# Longer bars are cut, with a mark: one of 90 would make the others dots.
CUT = 8.0
INK, PAPER, WORDS = "#24292f", "#ffffff", {"color": "#57606a", "fontsize": 10.5}
# Inches, as wide as a page of the README; and the axis over its longest whole bar.
WIDTH, ROOM = 8.3, 1.1
Groups = Mapping[str, Sequence[report.Measurement]]


@dataclass(frozen=True)
class Pair:
    """Two providers that do the same work.

    Attributes:
        peer: The peer's name in the results.
        words: Who that is.
        ending: What our provider's name ends with after its backend.
    """

    peer: str
    words: str
    ending: str = ""

    def is_ours(self, provider: str) -> bool:
        """Whether this is our provider of the pair, on a backend that serves unasked."""
        return re.fullmatch(f"ours(:(cpu|triton|cuda))?{self.ending}", provider) is not None


@dataclass(frozen=True)
class Claim:
    """What a bar says, and where its rows are.

    Attributes:
        what: The bar's label.
        op: The results' file.
        case: Its rows' case.
        mode: Its rows' mode; the same with ``-cold`` comes first.
        pairs: Who is held against whom; the first that was measured.
        spare: The first to go where there are more than ``MOST`` bars.
    """

    what: str
    op: str
    case: str
    mode: str
    pairs: tuple[Pair, ...]
    spare: bool = False


@dataclass(frozen=True)
class Bar:
    """A claim with its two rows."""

    claim: Claim
    pair: Pair
    ours: report.Measurement
    peer: report.Measurement

    @property
    def value(self) -> float:
        """How many times as fast."""
        return self.peer.p50_ms / self.ours.p50_ms

    @property
    def number(self) -> str:
        """The value as the bar shows it."""
        return f"{self.value:.1f}x" if self.value < 10 else f"{self.value:.0f}x"

    @property
    def times(self) -> str:
        """Who the peer is, and both medians."""
        peer, ours = (report.short_time(row.p50_ms) for row in (self.peer, self.ours))
        return f"{self.pair.words} {peer}, here {ours}"


EAGER = (Pair("eager", "eager PyTorch"),)
STOCK = (Pair("transformers+peft+bitsandbytes", "transformers + PEFT + bitsandbytes"),)
PEFT = (
    Pair("peft" + FLOAT32_ADAPTERS, "PEFT + bitsandbytes", FLOAT32_ADAPTERS),
    Pair("peft", "PEFT + bitsandbytes"),
)
SEVEN = "7b/s1325/g8/b1"
MODEL = "h4096-l2-b1-image576-text40"


def _layer(what: str, tokens: int, mode: str, *, spare: bool = False) -> Claim:
    label = f"4-bit layer with two LoRAs, {what}"
    return Claim(label, "qlora_linear", f"4096x4096/m{tokens}/r64", mode, PEFT, spare)


CLAIMS = (
    Claim("Attention with crayon, 7B, 1325 tokens", "crayon_attention", SEVEN, "fwd", EAGER),
    Claim("The same, forward + backward", "crayon_attention", SEVEN, "fwd+bwd", EAGER),
    _layer("decoding one token", 1, "fwd"),
    _layer("prefill of 1024 tokens", 1024, "fwd"),
    _layer("prefill of 2048 tokens", 2048, "fwd"),
    _layer("training on 128 tokens", 128, "fwd+bwd", spare=True),
    Claim(
        "Panoptic maps to tokens, 16 images",
        "panoptic_lookup",
        "480x640/s15/b16",
        "majority",
        (Pair("torch", "PyTorch operators"),),
    ),
    Claim("Two 7B layers, end to end: prefill", "end_to_end", MODEL, "prefill", STOCK),
    Claim("Two 7B layers, end to end: training step", "end_to_end", MODEL, "train", STOCK),
    Claim("Two 7B layers, end to end: decoding", "end_to_end", MODEL, "decode", STOCK),
)


def find(claim: Claim, rows: Sequence[report.Measurement]) -> Bar | None:
    """Return the claim's bar from rows of one number of threads, None if they are not there."""
    for pair in claim.pairs:
        for mode in (claim.mode + COLD, claim.mode):
            here = [row for row in rows if (row.case, row.mode) == (claim.case, mode)]
            ours = [row for row in here if pair.is_ours(row.provider)]
            peers = [row for row in here if row.provider == pair.peer]
            for best in sorted(ours, key=lambda row: row.p50_ms):
                same = [row for row in peers if row.dtype == best.dtype]
                if same:
                    return Bar(claim, pair, best, same[0])
    return None


def bars(groups: Groups) -> list[Bar]:
    """Return a device's bars, of the threads and instruction set that have the most of them."""
    settings = {row.on: (row.threads, row.isa) for rows in groups.values() for row in rows}
    found = [_of(groups, on) for on in sorted(settings, key=lambda on: (settings[on][0], on))]
    return max(found, key=len, default=[])


def _of(groups: Groups, on: str) -> list[Bar]:
    """Return the bars of one setting."""
    rows = {op: [row for row in each if row.on == on] for op, each in groups.items()}
    found = [bar for claim in CLAIMS if (bar := find(claim, rows.get(claim.op, ())))]
    for bar in [bar for bar in found if bar.claim.spare]:
        if len(found) > MOST:
            found.remove(bar)
    return found[:MOST]


def caption(found: Sequence[Bar]) -> str:
    """Say on what the bars were measured."""
    row = found[0].ours
    names = {"avx512": "AVX-512", "avx2": "AVX2"}
    threads = "one thread" if row.threads == 1 else f"{row.threads} threads"
    where = f", {threads}, {names.get(row.isa, row.isa)}" if row.isa else ""
    return f"Times as fast as what it replaces. {row.device}{where}; medians."


def draw(groups: Groups, path: Path) -> bool:
    """Draw a device's picture; False where it has too few of the rows."""
    found = bars(groups)
    if len(found) < LEAST:
        return False
    plt = pyplot()
    figure = plt.figure(figsize=(WIDTH, 0.6 * len(found) + 0.45), facecolor=PAPER)
    axes = figure.add_axes((0.02, 0.45 / figure.get_figheight(), 0.96, 1))
    axes.set_ylim(len(found), 0)
    axes.set_axis_off()
    end = max([bar.value for bar in found if bar.value <= CUT], default=CUT)
    axes.set_xlim(0, ROOM * end)
    for index, bar in enumerate(found):
        _draw_bar(axes, bar, index, end)
    place = {"xycoords": ("data", "axes fraction"), "textcoords": "offset points"}
    axes.annotate("1x: equal", (1.0, 0.0), xytext=(0, -3), ha="center", va="top", **WORDS, **place)
    figure.text(0.02, 0.012, caption(found), ha="left", va="bottom", **WORDS)
    write(figure, path, transparent=False)
    return True


def _draw_bar(axes: Any, bar: Bar, index: int, end: float) -> None:
    """Draw a bar with its number at its end, and above it what it says and both times."""
    middle, half, cut = index + 0.68, 0.24, bar.value > end
    length = end if cut else bar.value
    colour = COLOURS[list(dict.fromkeys(claim.op for claim in CLAIMS)).index(bar.claim.op)]
    axes.barh(middle, length, color=colour, height=2 * half)
    axes.plot((1, 1), (middle - half, middle + half), color=INK, linewidth=1, linestyle=(0, (4, 2)))
    for share in (0.90, 0.93) if cut else ():
        ends = (share * end - 0.012 * end, share * end + 0.012 * end)
        axes.plot(ends, (middle + 0.3, middle - 0.3), color=PAPER, linewidth=3)
    place = {"textcoords": "offset points", "va": "center"}
    number = {"color": INK, "fontsize": 14, "fontweight": "bold"}
    axes.annotate(bar.number, (length, middle), xytext=(6, 0), **place, **number)
    axes.text(0, index + 0.24, bar.claim.what, color=INK, fontsize=12, va="center")
    axes.text(ROOM * end, index + 0.24, bar.times, ha="right", va="center", **WORDS)
