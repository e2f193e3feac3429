"""Hold kept results against the goals: ``python -m benchmarks.goals benchmarks/results/<device>``.

A goal is a bound on one number from rows of one run on one device: how many times faster ours is
than a peer, the fraction of the roof, or memory. Nothing here measures, and nothing asserts.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from benchmarks import report
from benchmarks.ops import llava_order_cases as order
from benchmarks.ops import llava_training_cases as training
from benchmarks.ops.qlora_linear_cases import BASE_ONLY

NOT_MEASURED = "not measured here"
SQUARE, WIDE, TALL = "4096x4096", "4096x11008", "11008x4096"


@dataclass(frozen=True)
class Goal:
    """One bound.

    Attributes:
        what: In words, what ours is held against.
        case: The rows' case.
        mode: The rows' mode.
        bound: ``speed``: peer's median over ours, at least; ``host``: the same of a GPU's times by
            the host's clock; ``price``: ours over the peer's, at
            most; ``roof``: fraction, at least; ``memory``: MB that ours allocates less than the
            peer, at least; ``threads``: our median with one thread over that with ``threads``, at
            least; ``share``: part of ours that the peer's work is, at least; ``work``: tokens over
            rows of our row, by which its products are fewer, at least.
        metric: ``speed``, ``host``, ``price``, ``roof``, ``memory``, ``threads``, ``share`` or
            ``work``.
        peer: The peer's provider, or what several begin with before a colon, of which the fastest
            counts; empty for ``roof``.
        ours: Our providers begin with this; the fastest counts.
        isa: The rows' instruction set; empty for a GPU.
        threads: The rows' number of threads on a CPU.
    """

    what: str
    case: str
    mode: str
    bound: float
    metric: str = "speed"
    peer: str = ""
    ours: str = "ours"
    isa: str = "avx512"
    threads: int = 1


@dataclass(frozen=True)
class Outcome:
    """A goal, the number found (None: no such rows), and the row of ours that it came from."""

    goal: Goal
    found: float | None = None
    row: report.Measurement | None = None

    @property
    def state(self) -> str:
        """Met, not met or not measured here."""
        if self.found is None:
            return NOT_MEASURED
        most = self.goal.metric == "price"
        enough = self.found <= self.goal.bound if most else self.found >= self.goal.bound
        return "met" if enough else "not met"


def _decode_cases(shape: str, counts: Iterable[int]) -> Iterator[str]:
    return (f"{shape}/m{m}/r64" for m in counts)


def _cpu_goals() -> Iterator[Goal]:
    for m, bound in ((1, 1.25), (4, 1.4), (16, 1.2), (1024, 1.1)):
        case = f"{SQUARE}/m{m}/r64"
        yield Goal("bitsandbytes, base only", case, "fwd", bound, peer="bitsandbytes")
    for m, bound in ((1, 2.2), (4, 2.2), (16, 1.5), (1024, 1.2)):
        yield Goal("PEFT + bitsandbytes", f"{SQUARE}/m{m}/r64", "fwd", bound, peer="peft")
    for case in _decode_cases(SQUARE, (4, 16)):
        what = "bitsandbytes, base only, by 8-bit activations"
        yield Goal(what, case, "fwd", 2.2, peer="bitsandbytes", ours="ours:int8")
    for m, bound in ((1, 30.0), (16, 10.0)):
        case = f"{SQUARE}/m{m}/r64"
        yield Goal("PEFT + bitsandbytes, gradients on", case, "fwd-grad", bound, peer="peft")
    case = f"{SQUARE}/m1024/r64"
    yield Goal("PEFT + bitsandbytes, a training step", case, "fwd+bwd", 1.1, peer="peft")
    yield Goal("of the read bandwidth", f"{SQUARE}/m1/r64", "fwd", 0.85, "roof")
    yield Goal("of the bfloat16 peak", case, "fwd", 0.80, "roof")
    for m, bound in ((1, 12.0), (16, 3.5)):
        case = f"{SQUARE}/m{m}/r64"
        yield Goal("bitsandbytes, no AVX-512", case, "fwd", bound, peer="bitsandbytes", isa="avx2")


def _gpu_goals() -> Iterator[Goal]:
    for shape, bound in ((SQUARE, 0.55), (WIDE, 0.75)):
        for case in _decode_cases(shape, (1, 4, 16)):
            yield Goal("of the read bandwidth", case, "fwd", bound, "roof", isa="")
    for shape, m, bound in ((SQUARE, 1, 1.3), (WIDE, 1, 1.3), (SQUARE, 16, 4.0), (TALL, 16, 4.0)):
        case = f"{shape}/m{m}/r64"
        yield Goal("bitsandbytes, base only", case, "fwd", bound, peer="bitsandbytes", isa="")
    for shape in (SQUARE, WIDE):
        for case in _decode_cases(shape, (1, 4, 16)):
            peft = Goal("PEFT + bitsandbytes", case, "fwd", 4.0, peer="peft", isa="")
            yield peft
            yield replace(peft, what=f"{peft.what} by the host's clock", metric="host", bound=10.0)
        case = f"{shape}/m2048/r64"
        # At most 1.10 times as long.
        yield Goal("bare bfloat16 F.linear", case, "fwd", 1 / 1.1, peer="dense", isa="")
        yield Goal("PEFT + bitsandbytes", case, "fwd", 2.0, peer="peft", isa="")
        by_hand = "dequantise, cuBLAS and LoRA apart, a training step"
        yield Goal(by_hand, case, "fwd+bwd", 1.3, peer="dequantize+lora", isa="")
        # A bfloat16 copy of the weight, which ours never makes.
        size = 2e-6 * int(shape.split("x")[0]) * int(shape.split("x")[1])
        memory = Goal(by_hand, case, "fwd+bwd", size, "memory", "dequantize+lora", isa="")
        yield memory


def _attention_goals() -> Iterator[Goal]:
    long, eager = "7b/s1325/g8/b1", "eager adds, RoPE and SDPA"
    price = Goal("our own attention without crayon and RoPE", long, "fwd", 1.05, "price")
    yield replace(price, peer="ours-alone", ours="ours:cpu")
    for mode, low, full in (("fwd", 3.0, 1.5), ("fwd+bwd", 2.0, 1.3)):
        yield Goal(eager, long, mode, low, peer="eager")
        yield Goal(eager, f"{long}/fp32", mode, full, peer="eager", isa="avx2")
    yield Goal("of the bfloat16 peak", long, "fwd", 0.45, "roof")


def _attention_gpu_goals() -> Iterator[Goal]:
    cases = ("7b/s1325/g8/b1", "7b/s2048/g8/b1")
    best, eager = "the best attention without crayon and RoPE", "eager adds, RoPE and SDPA"
    for case in cases:
        for mode, bound in (("fwd", 2.5), ("fwd+bwd", 2.0)):
            yield Goal(eager, case, mode, bound, peer="eager", isa="")
        own = Goal(best, case, "fwd", 1.15, "price", "sdpa-alone", "ours:triton", isa="")
        yield own
        yield replace(own, bound=1.35, ours="ours:library")
        yield replace(own, mode="fwd+bwd")
        yield replace(own, metric="speed", bound=0.85, ours="ours-alone:triton")
    yield Goal(best, "7b/s8192/g8/b1", "fwd", 1.06, "price", "sdpa-alone", isa="")


def _lookup_goals() -> Iterator[Goal]:
    one, many = "480x640/s15/b1", "480x640/s15/b64"
    released, cpu = "released-algorithm", "ours:cpu"
    nearest = "ours:cpu-nearest"
    yield Goal("the released algorithm", one, "nearest", 60.0, peer=released, ours=nearest)
    yield Goal("NumPy (unique, bincount)", one, "majority", 8.0, peer="numpy", ours=cpu)
    yield Goal("of the read bandwidth", many, "majority", 0.5, "roof", ours=cpu)
    yield Goal("one thread", many, "majority", 1.7, "threads", ours=cpu, threads=2)
    yield Goal("of the copy bandwidth", many, "majority", 0.6, "roof", ours="ours:triton", isa="")


def _prompt_goals() -> Iterator[Goal]:
    for case in ("d128", "d1024"):
        yield Goal("one row per token", case, "fwd+bwd", 10.0, peer="per-token")
        yield Goal("one row per token", case, "fwd+bwd", 20.0, "work", peer="per-token")


def _data_goals() -> Iterator[Goal]:
    what = "of the time is PNG decoding"
    yield Goal(what, "480x640/s15/b16", "images", 0.9, "share", peer="decoding-alone")


def _stage_goals() -> Iterator[Goal]:
    qlora, crayon = "PEFT + bitsandbytes, a training step", "the same without crayon"
    for isa, case in (("avx512", training.TWO), ("", training.SEVEN_B)):
        for mode, bound in (("align", 1.12), ("instruct", 1.2)):
            yield Goal(qlora, str(case), mode, bound, peer=training.QLORA, isa=isa)
        price = Goal(crayon, str(case), "instruct", 1.03, "price", "ours", isa=isa)
        yield replace(price, ours=training.CRAYON)


def _order_goals() -> Iterator[Goal]:
    for isa, mix in (("avx512", order.SMALL), ("", order.WIDE)):
        grouped, anyhow = order.NAMES
        yield Goal("any order", str(mix), order.MODE, 1.2, peer=anyhow, ours=grouped, isa=isa)


GOALS = {
    "panoptic_lookup": tuple(_lookup_goals()),
    "panoptic_data": tuple(_data_goals()),
    "crayon_prompt": tuple(_prompt_goals()),
    "qlora_linear": (*_cpu_goals(), *_gpu_goals()),
    "crayon_attention": (*_attention_goals(), *_attention_gpu_goals()),
    "llava_training": tuple(_stage_goals()),
    "llava_order": tuple(_order_goals()),
}


def check(goal: Goal, rows: Sequence[report.Measurement]) -> Outcome:
    """Find the goal's number in the rows of its operator."""
    here = [row for row in rows if _fits(goal, row)]
    ours = [row for row in here if _is_ours(goal, row.provider)]
    peers = [row for row in here if goal.peer in (row.provider, row.provider.split(":")[0])]
    if not ours or (goal.peer and not peers):
        return Outcome(goal)
    best = min(ours, key=lambda row: row.p50_ms)
    if goal.metric == "roof":
        return Outcome(goal, best.roof, best)
    if goal.metric == "threads":
        alone = check(replace(goal, metric="roof", threads=1), rows).row
        return Outcome(goal, None if alone is None else alone.p50_ms / best.p50_ms, best)
    if goal.metric == "work":
        config = json.loads(best.config_json)
        return Outcome(goal, config["tokens"] / config["rows"], best)
    peer = min(peers, key=lambda row: row.p50_ms)
    if goal.metric == "host":
        return _by_the_host(goal, ours, peers)
    if goal.metric == "speed":
        return Outcome(goal, peer.p50_ms / best.p50_ms, best)
    if goal.metric == "price":
        return Outcome(goal, best.p50_ms / peer.p50_ms, best)
    if goal.metric == "share":
        return Outcome(goal, peer.p50_ms / best.p50_ms, best)
    if best.peak_mb is None or peer.peak_mb is None:
        return Outcome(goal)
    return Outcome(goal, peer.peak_mb - best.peak_mb, best)


def _by_the_host(
    goal: Goal, ours: Sequence[report.Measurement], peers: Sequence[report.Measurement]
) -> Outcome:
    """Hold the least times by the host's clock against each other."""
    sides = [[(t, row) for row in rows if (t := row.wall_ms) is not None] for rows in (ours, peers)]
    if not all(sides):
        return Outcome(goal)
    (mine, best), (theirs, _) = (min(side, key=lambda each: each[0]) for side in sides)
    return Outcome(goal, theirs / mine, best)


def _fits(goal: Goal, row: report.Measurement) -> bool:
    on_cpu = bool(goal.isa)
    there = row.isa == goal.isa and (not on_cpu or row.threads == goal.threads)
    return there and (row.case, row.mode) == (goal.case, goal.mode)


def _is_ours(goal: Goal, provider: str) -> bool:
    named = provider == goal.ours or provider.startswith(f"{goal.ours}:")
    return named and provider not in BASE_ONLY


def table(outcomes: Sequence[Outcome]) -> str:
    """Lay the outcomes out as a markdown table, what was measured first."""
    ranked = sorted(outcomes, key=lambda each: each.state == NOT_MEASURED)
    lines = ["| case | mode | on | goal | measured | |", "|---|---|---|---|---|---|"]
    for each in ranked:
        goal = each.goal
        on = f"{goal.threads} x {goal.isa}" if goal.isa else "GPU"
        most = "at most " if goal.metric == "price" else ""
        wanted = f"{most}{_number(goal.bound, goal.metric)} {_words(goal)}"
        found = "" if each.found is None else _number(each.found, goal.metric)
        lines.append(f"| {goal.case} | {goal.mode} | {on} | {wanted} | {found} | {each.state} |")
    return "\n".join(lines)


def _number(value: float, metric: str) -> str:
    if metric in ("roof", "share"):
        return f"{value:.0%}"
    if metric == "memory":
        return f"{value:.0f} MB"
    return f"{value:.2f}x"


def _words(goal: Goal) -> str:
    if goal.metric == "memory":
        return f"less than {goal.what}"
    kinds = {
        "roof": "",
        "share": "",
        "speed": "the speed of ",
        "host": "the speed of ",
        "price": "the time of ",
        "threads": "the speed of ",
        "work": "fewer products than ",
    }
    return kinds[goal.metric] + goal.what


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the goals of every operator whose results a folder keeps; 1 where it keeps none."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.goals", description=__doc__)
    parser.add_argument("folder", type=Path, help="benchmarks/results/<device>")
    folder = parser.parse_args(arguments).folder
    found = False
    for op, goals in GOALS.items():
        path = folder / f"{op}.csv"
        if not path.exists():
            continue
        found = True
        rows = report.read_csv(path)
        print(f"{op} on {rows[0].device if rows else folder.name}\n")
        outcomes = [check(goal, rows) for goal in goals]
        print(table(outcomes))
        states = [each.state for each in outcomes]
        counts = (f"{states.count(state)} {state}" for state in dict.fromkeys(sorted(states)))
        print(f"\n{', '.join(counts)}")
    if not found:
        print(f"{folder}: no results of {', '.join(GOALS)}; run pytest with --save-results")
    return 0 if found else 1


if __name__ == "__main__":
    raise SystemExit(main())
