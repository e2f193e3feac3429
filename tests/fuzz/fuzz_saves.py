"""Random kills and full disks while a model is trained, a folder prepared and maps are cached.

    python -m tests.fuzz.fuzz_saves --seconds 120 --seed 0

A case is a piece of work, what befalls it and when: SIGKILL at its n-th call that opens, renames or
removes a file in the output folder, or after a random time; a disk that is full from a random call
on (a small tmpfs over the output folder; where that may not be mounted, a limit on the size of
files). The work is then done again, without a fault, and must end in what it would have been at
once: the same bits of a model, the same bytes of a prepared folder, the same maps. In between
nothing half-written is taken for whole, and what was trained to the end is somewhere.
"""

from __future__ import annotations

import argparse
import os
import random
import re
import resource
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

TESTS = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(TESTS / "collavo" / part) for part in ("", "train", "panoptic")]

import torch  # noqa: E402
from cache_worker import picture, same  # noqa: E402
from drawn_coco import draw_scene, write_coco  # noqa: E402
from forked import forked, mount, mounting_is_permitted  # noqa: E402
from safetensors.torch import load_file  # noqa: E402
from toy_model import ToyData, make_toy  # noqa: E402

from collavo.panoptic import CachedSegmenter, PanopticMap, PrepareSettings, prepare_folder  # noqa: E402
from collavo.panoptic.coco_index import CocoFolder  # noqa: E402
from collavo.train.arguments import CollavoTrainingArguments  # noqa: E402
from collavo.train.trainer import CollavoTrainer  # noqa: E402

EVENTS = (
    "open",
    "os.rename",
    "os.remove",
    "os.mkdir",
    "os.rmdir",
    "shutil.rmtree",
    "shutil.copyfile",
)
NO_CHECKPOINT = re.compile("No valid checkpoint|expected a whole checkpoint")
STEPS = 6
Result = dict[str, bytes] | dict[str, torch.Tensor]


@dataclass(frozen=True)
class SaveCase:
    """A piece of work and its fault.

    Attributes:
        work: ``train``, ``prepare`` or ``cache``.
        fault: ``kill`` or ``full``.
        call: The call of the output folder at which the fault comes.
        after: Seconds from the work's beginning; 0: at the call.
        room: Bytes that a full disk still takes, or the largest file.
        mounted: Whether the output folder is a mount point.
        limit: ``save_total_limit`` of training.
        older: Whether the output folder has an older model.
    """

    work: str
    fault: str
    call: int
    after: float
    room: int
    mounted: bool
    limit: int | None
    older: bool


def draw(choice: random.Random) -> SaveCase:
    """Draw a case."""
    work = choice.choice(["train", "train", "train", "prepare", "cache"])
    return SaveCase(
        work=work,
        fault=choice.choice(["kill", "full"]),
        call=choice.randrange({"train": 160, "prepare": 30, "cache": 20}[work]),
        after=choice.choice([0.0, 0.0, choice.uniform(0.0, 0.4)]),
        room=choice.choice([0, choice.randrange(4096), choice.randrange(40_000)]),
        mounted=choice.random() < 0.5,
        limit=choice.choice([None, 1, 2]),
        older=choice.random() < 0.5,
    )


def train(out: Path, case: SaveCase, resume: bool) -> None:
    """Train the toy to its end and save it."""
    args = CollavoTrainingArguments(
        output_dir=str(out),
        stage="cit",
        max_steps=STEPS,
        per_device_train_batch_size=2,
        learning_rate=0.05,
        save_steps=2,
        save_total_limit=case.limit,
        logging_steps=1,
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
        seed=3,
    )
    trainer = CollavoTrainer(make_toy(), args, ToyData("image"), ToyData("vl"))
    trainer.train(resume_from_checkpoint=True if resume else None)
    trainer.save_model()
    trainer.save_state()


def write_older_model(out: Path) -> None:
    """Save another toy, which its configuration tells apart."""
    model = make_toy()
    model.config.age = "older"
    for parameter in model.parameters():
        parameter.data.zero_()
    model.save_pretrained(out)


def prepare(out: Path, case: SaveCase, resume: bool) -> None:
    """Prepare the drawn scenes; it goes on by itself."""
    coco = out.parent / "coco"
    parts = CocoFolder(coco / "images", coco / "panoptic", coco / "panoptic.json")
    prepare_folder(parts, out, PrepareSettings(grid=(3, 4), images_per_shard=1))


def dark_and_light(image: Any) -> PanopticMap:
    """Segment an image by its pixels."""
    grey = torch.frombuffer(bytearray(image.convert("L").tobytes()), dtype=torch.uint8)
    ids = grey.reshape(image.height, image.width).int() + 1
    listed = sorted(set(ids.flatten().tolist()))
    return PanopticMap.from_segments(ids, listed, [one % 133 for one in listed])


def cache(out: Path, case: SaveCase, resume: bool) -> None:
    """Ask for a few maps; every answer is right, whether it can be kept or not."""
    cached = CachedSegmenter(dark_and_light, out, settings="dark and light")
    for seed in range(4):
        if not same(cached(picture(seed)), dark_and_light(picture(seed))):
            raise AssertionError("a cached map is another image's")


WORKS: dict[str, Callable[[Path, SaveCase, bool], None]] = {
    "train": train, "prepare": prepare, "cache": cache
}  # fmt: skip


@contextmanager
def befallen(out: Path, case: SaveCase, mounted: bool) -> Iterator[None]:
    """Let the fault come while the body runs, in a process that ends after it."""
    lock, calls = threading.Lock(), 0

    def strike() -> None:
        if case.fault == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        elif mounted:
            filler = out / "somebody-elses-file"
            room = shutil.disk_usage(out).free // 4096 * 4096
            with filler.open("wb") as file:
                file.write(bytes(max(room - case.room // 4096 * 4096, 0)))
        else:
            _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
            resource.setrlimit(resource.RLIMIT_FSIZE, (case.room, hard))

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal calls
        if event not in EVENTS or not arguments or not isinstance(arguments[0], str | os.PathLike):
            return
        if not os.fspath(arguments[0]).startswith(str(out)):
            return
        with lock:
            calls += 1
            struck = calls == case.call + 1
        if struck:
            strike()

    if case.after:
        timer = threading.Timer(case.after, strike)
        timer.daemon = True
        timer.start()
    else:
        sys.addaudithook(hook)
    yield


def check(case: SaveCase, expected: Result) -> str:
    """Run a case in a folder of its own, raise AssertionError for what is wrong, or say its end."""
    with tempfile.TemporaryDirectory(prefix="collavo-saves-") as home:
        folder = Path(home)
        write_coco(folder / "coco", [draw_scene(), draw_scene(20, 18)])
        for name in ("out", "temporary"):
            (folder / name).mkdir()
        status, message = forked(lambda: _check_here(folder, case, expected))
        if status != 0:
            raise AssertionError(message or f"status {status}")
        return message


def _check_here(folder: Path, case: SaveCase, expected: Result) -> str:
    out, work = folder / "out", WORKS[case.work]
    tempfile.tempdir = str(folder / "temporary")
    mounted = case.mounted and mount(out)
    if case.older and case.work == "train":
        write_older_model(out)

    def under_the_fault() -> None:
        with befallen(out, case, mounted):
            work(out, case, False)

    status, message = forked(under_the_fault)
    (out / "somebody-elses-file").unlink(missing_ok=True)
    end = {0: "undisturbed", 1: "failed"}.get(status, "killed")
    if status == 1 and "does not begin" in message:
        end = "did not begin"
    if status not in (0, 1, -signal.SIGKILL):
        raise AssertionError(f"the work ended with {status}: {message}")
    if status == 1 and case.fault == "kill":
        raise AssertionError(f"no disk was full, and yet: {message}")
    if case.work == "train":
        _check_between(folder, case, status, message, expected)
    status, message = forked(lambda: work(out, case, True))
    if status == 1 and NO_CHECKPOINT.search(message):
        if list(out.glob("checkpoint-*/collavo_streams.json")):
            raise AssertionError(f"a whole checkpoint is not found: {message}")
        status, message = forked(lambda: work(out, case, False))
    if status != 0:
        raise AssertionError(f"the work cannot go on: {message}")
    _compare(result(out, case.work), expected, "what the second run left")
    left = [str(p.relative_to(out)) for p in out.rglob("*") if p.name.startswith(".collavo-")]
    if left and case.work != "cache":
        raise AssertionError(f"left behind: {left}")
    return f"{case.work} {end}"


def _check_between(
    folder: Path, case: SaveCase, status: int, message: str, expected: Result
) -> None:
    """The model that is there is one model; what a failed save had to hold is where it is said."""
    out = folder / "out"
    if (out / "config.json").is_file() and (out / "model.safetensors").is_file():
        older = '"age": "older"' in (out / "config.json").read_text()
        found = load_file(out / "model.safetensors")
        if older and any(tensor.any() for tensor in found.values()):
            raise AssertionError("the older configuration beside the newer weights")
        if not older:
            _compare(found, expected, "the saved model")
    if status == 0:
        _compare(result(out, "train"), expected, "a run that says it was saved")
    found_at = re.search(r"trained tensors are in (\S+\.safetensors)", message)
    if found_at is not None:
        tensors = load_file(found_at[1])
        if not {"crayon.weight", "lora_a.vl.weight"} <= tensors.keys():
            raise AssertionError(f"rescued were only {sorted(tensors)}")
        if (out / f"checkpoint-{STEPS}" / "collavo_streams.json").is_file():
            trained = {name: expected[name] for name in tensors}
            _compare(tensors, trained, "what was rescued after the last step")
        if Path(found_at[1]).parent not in (out, folder, folder / "temporary"):
            raise AssertionError(f"rescued at an unexpected place: {found_at[1]}")
    elif status == 1 and "trainer_state.json" in message:
        _compare(result(out, "train"), expected, "the model saved before trainer_state.json")
    elif status == 1 and not re.search("does not begin|written nowhere", message):
        # Before the first step nothing is lost; after it the message has to say where all is.
        raise AssertionError(f"nothing says where the trained tensors are: {message}")


def result(out: Path, work: str) -> Result:
    """Read what finished work has left."""
    if work == "train":
        return load_file(out / "model.safetensors")
    if work == "cache":
        return {}
    return {p.name: p.read_bytes() for p in sorted(out.iterdir()) if p.is_file()}


def _compare(found: Result, expected: Result, what: str) -> None:
    if found.keys() != expected.keys():
        raise AssertionError(f"{what}: has {sorted(found)}, expected {sorted(expected)}")
    for name, value in expected.items():
        other: Any = found[name]
        equal = torch.equal(other, value) if isinstance(value, torch.Tensor) else other == value
        if not equal:
            raise AssertionError(f"{what}: {name} differs from an undisturbed run's")


def undisturbed(work: str) -> Result:
    """Return what a run without a fault leaves."""
    with tempfile.TemporaryDirectory() as home:
        folder = Path(home)
        write_coco(folder / "coco", [draw_scene(), draw_scene(20, 18)])
        case = SaveCase(work, "kill", 0, 0.0, 0, False, None, False)
        status, message = forked(lambda: WORKS[work](folder / "out", case, False))
        if status != 0:
            raise RuntimeError(message)
        return result(folder / "out", work)


def main() -> int:
    """Run random cases for a time and print the faults."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--cases", type=int, default=0, help="so many in place of a time")
    args = parser.parse_args()
    torch.set_num_threads(1)
    if not mounting_is_permitted():
        print("no tmpfs may be mounted here: full disks are limits on the size of files")
    expected = {work: undisturbed(work) for work in WORKS}
    end = time.monotonic() + args.seconds
    cases, faults, ends = 0, 0, Counter[str]()
    while cases < args.cases if args.cases else time.monotonic() < end:
        case = draw(random.Random(f"{args.seed}/{cases}"))
        cases += 1
        try:
            ends[check(case, expected[case.work])] += 1
        except AssertionError as error:
            faults += 1
            print(f"{error}\n  {case}", flush=True)
    print(", ".join(f"{count} x {end}" for end, count in sorted(ends.items())))
    print(f"{cases} cases, {faults} faults")
    return int(faults > 0)


if __name__ == "__main__":
    raise SystemExit(main())
