#!/usr/bin/env python3
"""Makes, without a GPU, what a GPU machine without a network should not lose time with.

  scripts/gpu_prebuild.py [--folder .gpu] [--jobs N] [--wheels DIR] [--fresh]

The folder, which git ignores, then holds Triton's cache of every kernel that the GPU tests and the
quick benchmarks launch on Hopper, the compiled modules, and the contents of the wheels in DIR.
Take it along with the checkout; scripts/gpu_check.sh finds it. Run it with the Python, torch and
Triton versions of that machine. A second run compiles nothing and says so.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
# Entries of Triton's cache name each other by absolute paths, so it has the same one there.
CACHE = Path("/var/tmp/collavo-triton")
# What of an entry a launch needs; the rest is for reading.
NEEDED = (".cubin", ".json")
# bitsandbytes brings a library per CUDA version, ten times what is used of it.
LEFT_OUT = "bitsandbytes/libbitsandbytes_"
QUICK = ("qlora_linear", "crayon_attention", "panoptic_lookup")


def main() -> int:
    """Fill the folder; say what was compiled, what was there, and how large all is."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, default=ROOT / ".gpu", help="what to fill")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="processes")
    parser.add_argument("--wheels", type=Path, help="a folder of wheels to take along")
    parser.add_argument("--fresh", action="store_true", help="throw earlier kernels away first")
    parser.add_argument("--share", help=argparse.SUPPRESS)
    given = parser.parse_args()
    os.environ["TRITON_CACHE_DIR"] = str(CACHE)
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
    if given.share:
        return compile_share(*map(int, given.share.split("/")))
    if given.fresh:
        shutil.rmtree(CACHE, ignore_errors=True)
    CACHE.mkdir(parents=True, exist_ok=True)
    given.folder.mkdir(parents=True, exist_ok=True)
    build_modules(given.folder / "kernels")
    before = len(kernels())
    failed = compile_all(given.jobs)
    after = len(kernels())
    pack(given.folder / "triton-cache.tar.xz")
    if given.wheels:
        unpack_wheels(given.wheels, given.folder / "site")
    (given.folder / "facts.json").write_text(json.dumps(facts(), indent=2) + "\n")
    size = sum(file.stat().st_size for file in given.folder.rglob("*") if file.is_file())
    print(
        f"kernels: {before} found, {after - before} compiled; {given.folder}: {size / 1e6:.1f} MB"
    )
    return failed


def facts() -> dict[str, str]:
    """Return what has to be the same on the GPU machine for the folder to serve."""
    import torch
    import triton

    return {
        "cache": str(CACHE),
        "python": sysconfig.get_config_var("SOABI"),
        "torch": torch.__version__.partition("+")[0],
        "triton": triton.__version__,
    }


def kernels() -> list[Path]:
    """List the compiled kernels in the cache."""
    return sorted(CACHE.rglob("*.cubin"))


def build_modules(target: Path) -> None:
    """Build the compiled modules for this Python, beside the sources and into the folder."""
    command = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
    subprocess.run(command, cwd=ROOT, check=True)
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir()
    suffix = sysconfig.get_config_var("EXT_SUFFIX")
    for module in (ROOT / "collavo_kernels").glob(f"*{suffix}"):
        shutil.copy(module, target)


def compile_all(jobs: int) -> int:
    """Compile in processes; return how many of them failed, after their output."""
    shares = [
        [sys.executable, __file__, "--share", f"{i}/{max(1, jobs)}"] for i in range(max(1, jobs))
    ]
    files = [f"benchmarks/bench_{name}.py" for name in QUICK]
    options = ["--benchmark-only", "--quick-gpu", "--dry-run", "-q", "-p", "no:cacheprovider"]
    commands = [*shares, [sys.executable, "-m", "pytest", *files, *options]]
    commands += [
        [sys.executable, f"scripts/gpu_{name}.py", "--dry-run"]
        for name in ("smoke", "profile", "decode")
    ]

    def run(command: list[str]) -> subprocess.CompletedProcess[str]:
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)

    failed = 0
    with ThreadPoolExecutor(max(1, jobs)) as pool:
        for done in pool.map(run, commands):
            if done.returncode:
                print(f"failed: {' '.join(done.args)}\n{done.stdout[-4000:]}{done.stderr[-4000:]}")
                failed += 1
    return failed


def compile_share(share: int, shares: int) -> int:
    """Go through every ``shares``-th call of the GPU tests on a stand-in."""
    from collavo_kernels.testing.gpu_stand_in import gpu_stand_in

    with gpu_stand_in():
        for number, call in enumerate(calls()):
            if number % shares == share:
                call()
    return 0


def calls() -> Iterator[Callable[[], object]]:
    """Yield what the GPU tests call, from the same tables."""
    import torch

    from collavo_kernels.testing.cases import crayon_attention as attention
    from collavo_kernels.testing.cases import qlora_linear as linear
    from collavo_kernels.testing.cases.panoptic_lookup import CASES as LOOKUP
    from collavo_kernels.testing.cases.panoptic_lookup import LARGE_CASES

    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        for case in (*attention.CASES, *attention.LONG_CASES):
            if case.length and case.batch:
                yield lambda case=case, dtype=dtype: attend(case.make(dtype, gradients=True))
        for layer in linear.CASES:
            yield lambda layer=layer, dtype=dtype: multiply(linear.make_call(layer, dtype))
    # Of one more test each: without the adapters' odd ranks, and a loss of the output alone.
    few = next(layer for layer in linear.CASES if layer.name == "few")
    yield lambda: multiply(linear.make_call(replace(few, k=128), torch.bfloat16))
    for case in attention.CASES:
        if case.name in ("left_padding", "right_padding", "padding_window", "empty_range"):
            yield lambda case=case: attend(case.make(torch.bfloat16, gradients=True), results=1)
    for maps in (*LOOKUP.values(), *LARGE_CASES.values()):
        yield lambda maps=maps: look_up(maps)


def attend(inputs, results: int = 3) -> None:
    """Forward and backward from some of the results, and what the library attention prepares."""
    import torch

    from collavo_kernels import crayon_attention
    from collavo_kernels.ops.crayon_attention.triton import launch

    if launch.declines(inputs) is not None:
        return
    options = dict(zip(inputs._fields[3:], inputs[3:], strict=True))
    found = crayon_attention(inputs.q, inputs.k, inputs.v, **options, backend="triton")
    leaves = [x for x in (*inputs[:3], *inputs[5:8]) if x is not None]
    loss = sum(x.sum() for x in found[:results])
    torch.autograd.grad(loss, leaves, allow_unused=True)
    with torch.no_grad():
        launch.prepared(launch.readable(inputs), query=True)


def multiply(call) -> None:
    """Forward and backward, where the backend takes the case."""
    import torch

    try:
        out = call.run("triton")
    except ValueError:  # it declines, as it will there
        return
    call.gradients(torch.zeros_like(out), "triton")


def look_up(case) -> None:
    """Both reductions of maps of ids and of colours."""
    from collavo_kernels import panoptic_lookup
    from collavo_kernels.testing.cases.panoptic_lookup import colours

    numbers = {"num_classes": case.num_classes, "max_number": case.max_number, "grid": case.grid}
    for maps in (case.maps(), [colours(x) for x in case.maps()] if case.has_colours() else None):
        for reduce in ("majority", "nearest") if maps is not None else ():
            panoptic_lookup(
                maps, case.ids(), case.classes(), **numbers, reduce=reduce, backend="triton"
            )


def pack(target: Path) -> None:
    """Pack the cache's needed parts."""
    with tarfile.open(target, "w:xz") as archive:
        for file in sorted(CACHE.rglob("*")):
            if file.suffix in NEEDED:
                archive.add(file, file.relative_to(CACHE))


def unpack_wheels(wheels: Path, target: Path) -> None:
    """Lay wheels out as a folder for PYTHONPATH, without libraries for other CUDA than 13.0."""
    shutil.rmtree(target, ignore_errors=True)
    for wheel in sorted(wheels.glob("*.whl")):
        with zipfile.ZipFile(wheel) as archive:
            names = [
                name
                for name in archive.namelist()
                if not name.startswith(LEFT_OUT) or "cuda130" in name or "_cpu" in name
            ]
            archive.extractall(target, names)


if __name__ == "__main__":
    raise SystemExit(main())
