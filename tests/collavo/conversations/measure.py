"""What it costs to open and read a large file of conversations, in time and memory.

    python -m tests.collavo.conversations.measure --records 100000

prints how long a file of so many drawn records takes to be opened for the first time and again,
each in a process of its own, what that adds to the process's memory, how long a random record
takes, and what loader workers that read everything have for themselves.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from collavo.conversations import ConversationDataset

_MB = 1 << 20


def write_conversations(folder: Path, records: int, *, words: int = 30, seed: int = 0) -> Path:
    """Write drawn records of four turns, six in ten about one of a hundred pictures."""
    rng = random.Random(seed)
    names = [f"{number:03}.png" for number in range(100)]
    for name in names:
        Image.new("RGB", (8, 6)).save(folder / name)
    stock = ["".join(rng.choices("abcdefghijklmnop", k=rng.randrange(2, 9))) for _ in range(5000)]

    def say() -> str:
        return " ".join(rng.choices(stock, k=rng.randrange(words // 2, words * 3 // 2)))

    path = folder / "conversations.json"
    with path.open("w") as file:
        for number in range(records):
            record: dict[str, Any] = {"id": number if number % 2 else f"{number:012}"}
            turns = [{"from": ("human", "gpt")[i % 2], "value": say()} for i in range(8)]
            if rng.random() < 0.6:
                record["image"] = rng.choice(names)
                turns[0]["value"] = "<image>\n" + turns[0]["value"]
            record["conversations"] = turns
            file.write(("[" if number == 0 else ",\n") + json.dumps(record))
        file.write("]")
    return path


def memory(field: str = "VmRSS") -> float:
    """Return a process's own memory in MB: resident, or ``Private`` pages, which none shares."""
    source = "/proc/self/status" if field == "VmRSS" else "/proc/self/smaps_rollup"
    lines = Path(source).read_text().splitlines()
    return sum(int(line.split()[1]) for line in lines if line.startswith(field)) / 1024


def opened(path: Path) -> dict[str, float]:
    """Open a file in this process, and read some of its records."""
    before = memory()
    start, start_cpu = time.perf_counter(), time.process_time()
    data = ConversationDataset.from_llava_json(path, images=path.parent)
    seconds, cpu = time.perf_counter() - start, time.process_time() - start_cpu
    added = memory() - before
    order = np.random.default_rng(0).integers(len(data), size=20_000).tolist()
    start_cpu = time.process_time()
    for index in order:
        data.records[index]
    access = (time.process_time() - start_cpu) / len(order)
    return {"seconds": seconds, "cpu": cpu, "added MB": added, "access us": access * 1e6}


def _in_new_process(path: Path) -> dict[str, float]:
    command = [sys.executable, "-m", __spec__.name, "--open", str(path)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    result: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return result


def _read_all(data: ConversationDataset, all_of_them: bool, barrier: Any, answers: Any) -> None:
    if all_of_them:
        for index in range(len(data)):
            data.records[index]
    else:
        data.records[0]
    barrier.wait()
    answers.put(memory("Private"))
    barrier.wait()


def private_memory(data: ConversationDataset, kind: str, workers: int, read: bool) -> float:
    """Return the mean MB that workers have for themselves after reading one record, or all."""
    context: Any = multiprocessing.get_context(kind)
    barrier, answers = context.Barrier(workers), context.Queue()
    processes = [
        context.Process(target=_read_all, args=(data, read, barrier, answers))
        for _ in range(workers)
    ]
    for process in processes:
        process.start()
    found = [answers.get(timeout=300) for _ in processes]
    for process in processes:
        process.join()
    return sum(found) / len(found)


def main(argv: list[str] | None = None, say: Callable[[str], object] = print) -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--records", type=int, default=100_000)
    parser.add_argument("--workers", type=int, default=8)
    parser.add_argument("--open", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.open is not None:
        say(json.dumps(opened(args.open)))
        return 0
    with tempfile.TemporaryDirectory() as folder:
        path = write_conversations(Path(folder), args.records)
        size = path.stat().st_size / _MB
        time.sleep(2.5)  # a file that was just written is read again, since it may still change
        say(f"{args.records} conversations, {size:.0f} MB")
        for name in ("first", "second", "third"):
            one = _in_new_process(path)
            say(
                f"{name} time: {one['seconds']:.2f} s ({one['cpu']:.2f} of the processor), "
                f"{one['added MB']:.0f} MB beyond imports, "
                f"a random record {one['access us']:.1f} us"
            )
        data = ConversationDataset.from_llava_json(path, images=path.parent)
        for kind in ("fork", "spawn"):
            none, everything = (
                private_memory(data, kind, args.workers, read) for read in (False, True)
            )
            say(
                f"{args.workers} {kind} workers: {none:.0f} MB of their own each after one record, "
                f"{everything:.0f} MB after all"
            )
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
