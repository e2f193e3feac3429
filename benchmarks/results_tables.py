"""The tables of ``RESULTS.md``: which rows stand in which column, in words."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from benchmarks import report
from benchmarks.caches import COLD
from benchmarks.headline import MODEL
from benchmarks.ops import llava_order_cases as order
from benchmarks.ops import llava_training_cases as training
from benchmarks.ops.qlora_linear_cases import FLOAT32_ADAPTERS

Rows = Sequence[report.Measurement]
OURS = "ours(:(cpu|triton|cuda))?"


@dataclass(frozen=True)
class Column:
    """One number per row of the table.

    Attributes:
        heading: In words.
        provider: Pattern of the provider's name; of several the fastest counts.
        mode: What its rows' mode begins with; the table's line has the rest.
        kind: ``time``; ``roof``, the share of it; ``speed``, the time over that of ``over``;
            ``price``, by what share it takes longer than ``over``.
        over: Pattern of the provider that ``speed`` and ``price`` are held against.
    """

    heading: str
    provider: str
    mode: str = ""
    kind: str = "time"
    over: str = ""

    def cell(self, rows: Rows, case: str, mode: str) -> str:
        """Return the number, or nothing where it was not measured."""
        row = fastest(rows, case, self.mode + mode, self.provider)
        if row is None:
            return ""
        if self.kind == "time":
            return report.short_time(row.p50_ms)
        if self.kind == "roof":
            return "" if row.roof is None else f"{row.roof:.0%}"
        other = fastest(rows, case, self.mode + mode, self.over)
        if other is None:
            return ""
        ratio = row.p50_ms / other.p50_ms
        return f"{ratio:.2f}x" if self.kind == "speed" else f"{ratio - 1:+.0%}"


@dataclass(frozen=True)
class Line:
    """A row of a table: a case, in modes whose numbers share a cell, of one dtype or of any."""

    words: str
    case: str
    modes: tuple[str, ...] = ("",)
    dtype: str = ""


@dataclass(frozen=True)
class Table:
    """One operator's table, for each number of threads and instruction set."""

    op: str
    about: str
    columns: tuple[Column, ...]
    lines: tuple[Line, ...]

    def markdown(self, rows: Rows) -> str:
        """Return the table of rows of one setting; empty where none of its lines has a row."""
        body = [[line.words, *self._cells(rows, line)] for line in self.lines]
        body = [cells for cells in body if any(cells[1:])]
        used = [i for i in range(len(self.columns) + 1) if any(cells[i] for cells in body)]
        if not used:
            return ""
        head = ["", *(column.heading for column in self.columns)]
        lines = [head, ["---"] * len(head), *body]
        return "\n".join(f"| {' | '.join(cells[i] for i in used)} |" for cells in lines)

    def _cells(self, rows: Rows, line: Line) -> Iterator[str]:
        rows = [row for row in rows if line.dtype in ("", row.dtype)]
        for column in self.columns:
            found = [column.cell(rows, line.case, mode) for mode in line.modes]
            yield "; ".join(each or "-" for each in found) if any(found) else ""


def fastest(rows: Rows, case: str, mode: str, provider: str) -> report.Measurement | None:
    """Return the fastest row of a case, a mode and a provider's pattern, if there is one."""
    found = [
        row
        for row in rows
        if (row.case, row.mode) == (case, mode) and re.fullmatch(provider, row.provider)
    ]
    return min(found, key=lambda row: row.p50_ms, default=None)


def _tokens(count: int) -> str:
    return "1 token" if count == 1 else f"{count} tokens"


def _layer_lines() -> Iterator[Line]:
    names = {"fwd": "forward", "fwd-grad": "forward, gradients on", "fwd+bwd": "forward + backward"}
    counts = {"fwd": (1, 4, 16, 128, 1024, 2048), "fwd-grad": (1, 16), "fwd+bwd": (1, 128, 1024)}
    for mode, words in names.items():
        for m in (*counts[mode], *((2048,) if mode == "fwd+bwd" else ())):
            yield Line(f"{_tokens(m)}, {words}", f"4096x4096/m{m}/r64", (mode,))
    yield Line("1 token, forward, rank 256", "4096x4096/m1/r256", ("fwd",))


LAYER = Table(
    "qlora_linear",
    "A 4096x4096 NF4 weight with two LoRA adapters of rank 64, x in bfloat16; weights and adapters "
    "rotate past every cache. `apply_to_llava` and PEFT both make float32 adapters unless told "
    "otherwise.",
    (
        Column("ours, float32 adapters", OURS + FLOAT32_ADAPTERS),
        Column("PEFT + bitsandbytes, float32 adapters", "peft" + FLOAT32_ADAPTERS),
        Column("ours, bfloat16 adapters", OURS),
        Column("share of the roof", OURS, kind="roof"),
        Column("PEFT + bitsandbytes, bfloat16 adapters", "peft"),
        Column("bitsandbytes, base alone", "bitsandbytes"),
        Column("bfloat16 weight + LoRA", r"dense\+lora"),
    ),
    tuple(_layer_lines()),
)

BOTH = ("fwd", "fwd+bwd")
ATTENTION = Table(
    "crayon_attention",
    "Causal attention with table rows and RoPE, forward; forward + backward. *Eager* is what it "
    "replaces: a dense crayon per token, RoPE and SDPA in PyTorch. The columns *alone* have "
    "neither crayon nor RoPE.",
    (
        Column("ours", OURS),
        Column("share of the roof", OURS, kind="roof"),
        Column("eager", "eager"),
        Column("speed over eager", "eager", kind="speed", over=OURS),
        Column("ours alone", "ours-alone(:.*)?"),
        Column("price of the crayon", OURS, kind="price", over="ours-alone(:.*)?"),
        Column("SDPA alone", "sdpa-alone(:.*)?"),
        Column("ours around PyTorch's library, by name only", "ours:library"),
    ),
    (
        Line("7B (32 heads, 8 for keys), 320 tokens", "7b/s320/g8/b1", BOTH),
        Line("1325 tokens", "7b/s1325/g8/b1", BOTH),
        Line("1325 tokens, other work between the calls", "7b/s1325/g8/b1", ("fwd" + COLD,)),
        Line("2048 tokens", "7b/s2048/g8/b1", BOTH),
        Line("8192 tokens", "7b/s8192/g8/b1", BOTH),
        Line("32 heads for keys too, 1325 tokens", "7b/s1325/g32/b1", BOTH),
        Line("the same, 320 tokens, eight samples", "7b/s320/g32/b8", BOTH),
        Line("13B (40 heads), 1325 tokens", "13b/s1325/g40/b1", BOTH),
        Line("head dim 64 (32 / 8), 1325 tokens", "d64/s1325/g8/b1", BOTH),
        Line("head dim 256 (16 / 8), 1325 tokens", "d256/s1325/g8/b1", BOTH),
        Line("7B (32 / 8), 1325 tokens, float32", "7b/s1325/g8/b1/fp32", BOTH),
    ),
)


def _map_lines() -> Iterator[Line]:
    for count in (1, 16, 64):
        words = "1 map" if count == 1 else f"{count} maps"
        yield Line(words, f"480x640/s15/b{count}")
        yield Line(f"{words}, other work between the calls", f"480x640/s15/b{count}", (COLD,))
    yield Line("16 maps, 60 segments", "480x640/s60/b16")
    yield Line("16 maps of 1280x960", "960x1280/s15/b16")
    yield Line("16 maps, a 24x24 grid", "480x640/s15/b16/g24")


LOOKUP = Table(
    "panoptic_lookup",
    "Maps of 640x480 with 15 segments to a 35x35 grid, in one call. One call follows the other, "
    "unless it says that other work came between, as in a program that looks up one batch at a "
    "time; then the caches hold neither the map nor the code.",
    (
        Column("ours", OURS, "majority"),
        Column("share of the read bandwidth", OURS, "majority", "roof"),
        Column("torch operators", "torch", "majority"),
        Column("NumPy", "numpy", "majority"),
        Column("ours, from COCO's colours", OURS + "-colours", "majority"),
        Column("ours, nearest", OURS + "-nearest", "nearest"),
        Column("released algorithm, nearest", "released-algorithm", "nearest"),
    ),
    tuple(_map_lines()),
)

DATA = Table(
    "panoptic_data",
    "From PNG files to rows and object text.",
    (
        Column("ours", "ours"),
        Column("decoding into arrays, in it", "decoding-alone"),
        Column("released algorithm", "released-algorithm"),
    ),
    (
        Line("16 images of 640x480, 15 segments", "480x640/s15/b16", ("images",)),
        Line("16 images of 1280x960, 60 segments", "960x1280/s60/b16", ("images",)),
    ),
)

PROMPT = Table(
    "crayon_prompt",
    "`CrayonPrompt`, forward + backward, for 16 images of 35x35 tokens.",
    (Column("ours, a row per segment", "ours"), Column("a row per token", "per-token")),
    (
        Line("width 128", "d128", ("fwd+bwd",)),
        Line("width 1024", "d1024", ("fwd+bwd",)),
    ),
)

PEER = r"transformers\+peft\+bitsandbytes"
SMALL = "h256-l2-b2-image64-text32"


def _model_lines() -> Iterator[Line]:
    names = {"prefill": "prefill", "decode": "next token", "train": "training step"}
    for mode, what in names.items():
        yield Line(f"two 7B layers, 576 image tokens and 40 of text: {what}", MODEL, (mode,))
    for dtype in ("float32", "bfloat16"):
        for mode, what in {"fwd": "forward", **names}.items():
            words = f"tiny (hidden size 256, two layers), {dtype}, two samples: {what}"
            yield Line(words, SMALL, (mode,), dtype)


MODELS = Table(
    "end_to_end",
    "A LLaVA with NF4 weights, two adapters in float32 and a crayon, beside transformers with "
    "bitsandbytes' layers, PEFT's adapters and a crayon per token; the same weights.",
    (
        Column("ours", "ours"),
        Column("transformers + PEFT + bitsandbytes", PEER),
        Column("speed", PEER, kind="speed", over="ours"),
    ),
    tuple(_model_lines()),
)


def _stage_lines() -> Iterator[Line]:
    for case in training.CASES.values():
        size = f"{case.layers} layers of a 7B, {case.tokens} tokens"
        for mode, what in (("align", "projector"), ("instruct", "projector and LoRA adapters")):
            yield Line(f"{size}: `{mode}` ({what})", str(case), (mode,))


TRAINING = Table(
    training.OP,
    "A step of LLaVA's stages: forward, backward, AdamW. Ours has NF4 weights; what is trained is "
    "float32 beside bfloat16, and adapters have rank 128.",
    (
        Column("ours", "ours"),
        Column("with the crayon", re.escape(training.CRAYON)),
        Column("price of the crayon", re.escape(training.CRAYON), kind="price", over="ours"),
        Column("transformers + PEFT + bitsandbytes", re.escape(training.QLORA)),
        Column("speed", re.escape(training.QLORA), kind="speed", over="ours"),
        Column("transformers + PEFT, bfloat16", re.escape(training.LORA)),
        Column("speed", re.escape(training.LORA), kind="speed", over="ours"),
    ),
    tuple(_stage_lines()),
)
ORDER = Table(
    order.OP,
    "An epoch over samples of which 60 % have an image, in the trainer's order and in any.",
    (
        Column("steps of one kind, alike lengths", "ours:grouped"),
        Column("any order", "ours:random"),
        Column("speed", "ours:random", kind="speed", over="ours:grouped"),
    ),
    tuple(
        Line(f"{mix.images} samples with an image, {mix.texts} without", name, (order.MODE,))
        for name, mix in order.MIXES.items()
    ),
)

TABLES = (MODELS, TRAINING, ORDER, ATTENTION, LAYER, LOOKUP, DATA, PROMPT)
