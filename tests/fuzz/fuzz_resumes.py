"""Random kills of training runs, in every stage: a resumed run is the one that was never stopped.

    python -m tests.fuzz.fuzz_resumes --kills 20 --seeds 3 --processes 1 2 --out resumes.csv

A run is killed (SIGKILL; of several processes one) at a random micro-batch or at a random call that
opens, renames or removes a file of its output folder, resumed, killed again, and so on to its end.
Then its weights, its losses and the projector's file are compared, bit by bit, with those of a run
without a kill, and the next run begins, until all kills are done.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import random
import shutil
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import astuple, dataclass, fields
from pathlib import Path
from typing import Any

TESTS = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(TESTS / "collavo" / part) for part in ("", "train")]

import torch  # noqa: E402
from safetensors.torch import load_file  # noqa: E402
from tiny_collavo import CollavoRecords, MixedRecords, collate, make_collavo  # noqa: E402

from collavo.model.projector import PROJECTOR_FILE  # noqa: E402
from collavo.train import checkpoint  # noqa: E402
from collavo.train.arguments import CollavoTrainingArguments  # noqa: E402
from collavo.train.trainer import CollavoTrainer  # noqa: E402

EVENTS = ("open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "shutil.rmtree")
STEPS, FILE_CALLS = 8, 220
Tensors = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Kind:
    """What is trained, and of which model.

    Attributes:
        stage: A name of ``STAGES``.
        crayon: Whether the model has a crayon.
        adapters: Its adapters.
        quantize: Whether its decoder is in 4 bits.
        options: Further training arguments.
    """

    stage: str
    crayon: bool = False
    adapters: tuple[str, ...] = ()
    quantize: bool = False
    options: tuple[tuple[str, Any], ...] = ()


_LORA = (("adapters", ["instruct"]), ("parts", ["projector", "adapters"]))
_HELD_OUT = (("eval_strategy", "steps"), ("eval_steps", 2))
KINDS = {
    "cpt": Kind("cpt", True, ("image", "vl"), True),
    "cit": Kind("cit", True, ("image", "vl"), True),
    "align": Kind("align", options=_HELD_OUT),
    "align nf4": Kind("align", quantize=True),
    "instruct": Kind("instruct", options=_HELD_OUT),
    "instruct adapters": Kind("instruct", adapters=("instruct",), options=_LORA),
    "instruct nf4": Kind("instruct", False, ("instruct",), True, (*_LORA, *_HELD_OUT)),
    "instruct crayon": Kind(
        "instruct",
        True,
        ("instruct",),
        True,
        (("adapters", ["instruct"]), ("parts", ["projector", "adapters", "crayon"])),
    ),
}


@dataclass
class Row:
    """What became of one kind, seed and number of processes."""

    kind: str
    trained_only: bool
    processes: int
    seed: int
    kills: int
    in_a_step: int
    in_a_save: int
    runs: int
    seconds: float
    faults: int = 0


@dataclass(frozen=True)
class Kill:
    """When a process is killed: at its n-th micro-batch, or n-th call for a file of its output."""

    rank: int
    in_a_save: bool
    at: int


def train(out: Path, kind: Kind, seed: int, trained_only: bool, processes: int) -> None:
    """Train a tiny model from the last whole checkpoint, if there is one, and save it."""
    model = make_collavo("projection" if kind.crayon else "none", adapters=False)
    model.add_dual_qlora(kind.adapters, rank=4, alpha=6.0, dropout=0.2, quantize=kind.quantize)
    args = CollavoTrainingArguments(
        output_dir=str(out),
        stage=kind.stage,
        max_steps=STEPS,
        per_device_train_batch_size=1,
        gradient_accumulation_steps=4 // processes,
        learning_rate=1e-2,
        save_strategy="steps",
        save_steps=2,
        save_total_limit=2,
        save_trained_only=trained_only,
        logging_steps=1,
        report_to="none",
        use_cpu=True,
        ddp_backend="gloo" if processes > 1 else None,
        disable_tqdm=True,
        seed=seed,
        **dict(kind.options),
    )
    drawn = kind.stage in ("cpt", "cit")
    texts = 3 if kind.stage == "instruct" else 0
    data: Any = CollavoRecords("image", 12) if drawn else MixedRecords(12, text_every=texts)
    vl = CollavoRecords("vl", 8, text_every=2) if kind.stage == "cit" else None
    held_out = CollavoRecords("vl", 3, text_every=2) if args.eval_strategy != "no" else None
    trainer = CollavoTrainer(model, args, data, vl, data_collator=collate, eval_dataset=held_out)
    trainer.train(resume_from_checkpoint=any(is_whole(p) for p in checkpoint.checkpoints(out)))
    trainer.save_model()
    if trainer.is_world_process_zero():
        logs = [
            {name: log[name] for name in ("loss", "eval_loss") if name in log}
            for log in trainer.state.log_history
        ]
        (out / "losses.json").write_text(json.dumps([log for log in logs if log]))


def is_whole(folder: Path) -> bool:
    """Whether a checkpoint was written to its end."""
    try:
        checkpoint.check_whole(folder)
    except (OSError, ValueError):
        return False
    return True


def strike_at(kill: Kill, out: Path) -> None:
    """Kill this process when the time comes."""
    count = 0

    def counted() -> None:
        nonlocal count
        count += 1
        if count == kill.at:
            os.kill(os.getpid(), signal.SIGKILL)

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        named = arguments and isinstance(arguments[0], str | os.PathLike)
        if event in EVENTS and named and os.fspath(arguments[0]).startswith(str(out)):
            counted()

    if kill.in_a_save:
        sys.addaudithook(hook)
        return
    step = CollavoTrainer.training_step

    def training_step(*args: Any, **kwargs: Any) -> Any:
        counted()
        return step(*args, **kwargs)

    CollavoTrainer.training_step = training_step  # type: ignore[method-assign]


def launch(work: Callable[[], None], processes: int, out: Path, kill: Kill | None) -> bool:
    """Do work in processes of a group; return whether it ended, and not by the kill.

    As a launcher does, end all when one has gone.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = int(probe.getsockname()[1])
    log = out.with_suffix(".log")
    children = []
    for rank in range(processes):
        child = os.fork()
        if child == 0:
            status = 1
            try:
                descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
                for stream in (1, 2):
                    os.dup2(descriptor, stream)
                if processes > 1:
                    group = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": processes}
                    group |= {"LOCAL_WORLD_SIZE": processes, "MASTER_PORT": port}
                    os.environ |= {name: str(value) for name, value in group.items()}
                    os.environ["MASTER_ADDR"] = "127.0.0.1"
                if kill is not None and kill.rank == rank:
                    strike_at(kill, out)
                work()
                status = 0
            except BaseException as error:  # the parent says what is a fault
                print(f"process {rank}: {type(error).__name__}: {error}", flush=True)
            os._exit(status)
        children.append(child)
    statuses: dict[int, int] = {}
    while len(statuses) < processes:
        child, status = os.wait()
        statuses[child] = os.waitstatus_to_exitcode(status)
        if statuses[child] != 0:
            for other in set(children) - statuses.keys():
                os.kill(other, signal.SIGKILL)
    ended = list(statuses.values())
    if kill is not None and -signal.SIGKILL in ended:
        return False
    if any(ended):
        raise AssertionError(f"ended with {ended}: {log.read_text()[-2000:]}")
    return True


def result(out: Path) -> tuple[Tensors, Any]:
    """Read what a run has left: its weights, its projector's file, and its losses."""
    weights = load_file(out / "model.safetensors")
    if (out / PROJECTOR_FILE).is_file():
        weights |= torch.load(out / PROJECTOR_FILE, weights_only=True)
    return weights, json.loads((out / "losses.json").read_text())


def compare(found: tuple[Tensors, Any], expected: tuple[Tensors, Any]) -> None:
    """Raise AssertionError unless all bits and all losses are equal."""
    if found[0].keys() != expected[0].keys():
        raise AssertionError(f"{found[0].keys() ^ expected[0].keys()} is in one run only")
    differing = [
        name for name, value in expected[0].items() if not torch.equal(found[0][name], value)
    ]
    if differing:
        raise AssertionError(f"{len(differing)} tensors differ, the first is {differing[0]}")
    if found[1] != expected[1]:
        raise AssertionError(f"losses {found[1]} differ from {expected[1]}")


def same_held_out(one: Any, two: Any) -> bool:
    """Whether held-out losses agree: ranks of three records hold one of them twice.

    Weights differ by the order of sums, 1e-7 of them.
    """
    values = [[log["eval_loss"] for log in logs if "eval_loss" in log] for logs in (one, two)]
    close = [abs(a - b) <= 1e-5 * abs(b) for a, b in zip(*values, strict=True)]
    if not all(close):
        print(f"held-out losses {values[0]} of several processes, {values[1]} of one")
    return all(close)


def check(name: str, seed: int, kills: int, trained_only: bool, processes: int) -> Row:
    """Do all kills of one kind."""
    choice = random.Random(f"{name}/{seed}/{trained_only}/{processes}")
    row = Row(name, trained_only, processes, seed, 0, 0, 0, 0, time.monotonic())
    with tempfile.TemporaryDirectory(prefix="collavo-resumes-") as home:
        out = Path(home) / "straight"

        def work() -> None:
            train(out, KINDS[name], seed, trained_only, processes)

        launch(work, processes, out, None)
        expected = result(out)
        if processes > 1 and not KINDS[name].adapters:  # whose dropout is every process's own
            alone = Path(home) / "alone"
            launch(lambda: train(alone, KINDS[name], seed, trained_only, 1), 1, alone, None)
            row.faults += not same_held_out(expected[1], result(alone)[1])
        while row.kills < kills:
            row.runs += 1
            out = Path(home) / f"run{row.runs}"
            try:
                in_a_save = choice.random() < 0.5
                kill: Kill | None = draw(choice, processes, in_a_save)
                while not launch(work, processes, out, kill):
                    row.kills += 1
                    row.in_a_save += in_a_save
                    row.in_a_step += not in_a_save
                    in_a_save = choice.random() < 0.5
                    kill = draw(choice, processes, in_a_save) if row.kills < kills else None
                compare(result(out), expected)
            except AssertionError as error:
                row.faults += 1
                print(f"{name}, seed {seed}, {processes} processes: {error}", flush=True)
                break
            shutil.rmtree(out)
    row.seconds = round(time.monotonic() - row.seconds, 1)
    return row


def draw(choice: random.Random, processes: int, in_a_save: bool) -> Kill:
    """Draw which process is killed and when; one that ends before that is not killed."""
    most = FILE_CALLS if in_a_save else STEPS * 4 // processes
    # The first process alone writes.
    rank = 0 if in_a_save else choice.randrange(processes)
    return Kill(rank, in_a_save, choice.randrange(1, most))


def write(rows: Sequence[Row], path: Path) -> None:
    """Write the table."""
    with path.open("w", newline="", encoding="utf-8") as file:
        table = csv.writer(file, lineterminator="\n")
        table.writerow([field.name for field in fields(Row)])
        table.writerows([astuple(row) for row in rows])


def main() -> int:
    """Kill runs of all kinds, and print what became of them."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=3, help="of each kind and seed")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--kinds", nargs="+", default=list(KINDS), choices=list(KINDS))
    parser.add_argument("--processes", type=int, nargs="+", default=[1])
    parser.add_argument("--out", type=Path, help="CSV file")
    args = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    for seed in range(args.seeds):
        for name in args.kinds:
            for processes in args.processes:
                trained_only = (list(KINDS).index(name) + seed) % 2 == 0
                rows.append(check(name, seed, args.kills, trained_only, processes))
                print(rows[-1], flush=True)
                if args.out is not None:
                    write(rows, args.out)
    kills, faults = sum(row.kills for row in rows), sum(row.faults for row in rows)
    print(f"{kills} kills, {faults} faults")
    return int(faults > 0)


if __name__ == "__main__":
    raise SystemExit(main())
