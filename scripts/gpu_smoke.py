#!/usr/bin/env python3
"""One case of every operator and GPU backend against float64, each in a process of its own.

  scripts/gpu_smoke.py [--limit SECONDS] [--dry-run]

A line each: ok, FAIL with the reason, or STOPPED where a process does not end within the limit, so
that a kernel that hangs or breaks the device costs its own line alone. Ends with 1 where one is not
ok. --dry-run goes through the same calls on a stand-in for a GPU and compares nothing.
"""

from __future__ import annotations

import argparse
import dataclasses
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
CASES = (
    "panoptic_lookup:triton",
    *(
        f"{operator}:{backend}:{mode}"
        for operator, native in (("qlora_linear", "cuda"), ("crayon_attention", "library"))
        for backend in ("triton", native)
        for mode in ("forward", "backward")
    ),
)


def main() -> int:
    """Run every case in a process, or one of them in this one."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--limit", type=float, default=20.0, help="seconds for each process")
    parser.add_argument("--dry-run", action="store_true", help="on a stand-in, without comparing")
    parser.add_argument("--case", choices=CASES, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.case:
        return run_case(given.case, dry=given.dry_run)
    command = [sys.executable, __file__, *(["--dry-run"] if given.dry_run else []), "--case"]

    def state(case: str) -> str:
        try:
            done = subprocess.run(
                [*command, case], capture_output=True, text=True, timeout=given.limit
            )
        except subprocess.TimeoutExpired:
            return f"STOPPED after {given.limit:g} s"
        if done.returncode == 0:  # libraries warn on stderr
            return done.stdout.strip().splitlines()[-1]
        said = (done.stdout + done.stderr).strip().splitlines() or [f"status {done.returncode}"]
        return f"FAIL {said[-1]}"

    states = []
    # Most of a case is starting Python, which a dry run's machine does one at a time.
    with ThreadPoolExecutor(1 if given.dry_run else len(CASES)) as pool:
        for case, found in zip(CASES, pool.map(state, CASES), strict=True):
            print(f"{case}: {found}", flush=True)
            states.append(found)
    good = sum(each.startswith(("ok", "dry")) for each in states)
    print(f"{good} of {len(states)} ok")
    return int(good < len(states))


def run_case(case: str, *, dry: bool) -> int:
    """Run one case; print ok or let the exception end the process."""
    operator, backend, *mode = case.split(":")
    if dry and backend != "triton":
        print("dry run: only Triton has a stand-in")
        return 0
    if not dry:
        compare(operator, backend, "backward" in mode, "cuda")
        print("ok")
        return 0
    from collavo_kernels.testing.gpu_stand_in import gpu_stand_in

    with gpu_stand_in() as gpu:
        compare(operator, backend, "backward" in mode, None)
    print(f"dry run: {len(gpu.launches)} launches")
    return 0


def compare(operator: str, backend: str, backward: bool, device: str | None) -> None:
    """Hold a case on a device against float64; without a device only call."""
    checks: dict[str, Callable[[str, bool, str | None], None]] = {
        "panoptic_lookup": look_up,
        "qlora_linear": multiply,
        "crayon_attention": attend,
    }
    checks[operator](backend, backward, device)
    if device:
        from collavo_kernels import check

        check()


def look_up(backend: str, backward: bool, device: str | None) -> None:
    """Check that all results have the reference's bits."""
    import torch

    from collavo_kernels import panoptic_lookup

    generator = torch.Generator().manual_seed(0)
    maps = torch.randint(0, 9, (2, 70, 90), generator=generator, dtype=torch.int32)
    ids = [torch.arange(1, 8, dtype=torch.int32)] * 2
    classes = [torch.arange(7, dtype=torch.int32) % 3] * 2
    found = panoptic_lookup(maps.to(device or "cpu"), ids, classes, grid=(5, 6), backend=backend)
    if device is None:
        return
    expected = panoptic_lookup(maps, ids, classes, grid=(5, 6), backend="reference")
    for field in dataclasses.fields(expected):
        mine, other = (getattr(each, field.name) for each in (found, expected))
        if isinstance(other, torch.Tensor) and not torch.equal(mine.cpu(), other):
            raise SystemExit(f"{field.name} differs from the reference's")


def multiply(backend: str, backward: bool, device: str | None) -> None:
    """Check a prefill of 40 tokens, two adapters, bfloat16."""
    import torch

    from collavo_kernels.testing.cases.qlora_linear import QLoRACase, make_call

    case = QLoRACase("smoke", "", (40,), 256, 512, (16, 32), bias=True)
    here = make_call(case, torch.bfloat16)
    grad = torch.randn(40, 256, generator=torch.Generator().manual_seed(1)).bfloat16()
    call = here if device is None else make_call(case, torch.bfloat16, device)

    def results(of, with_backend: str, upstream: torch.Tensor) -> list[torch.Tensor]:
        if not backward:
            return [of.run(with_backend)]
        out, gradients = of.gradients(upstream, with_backend)
        return [out, *gradients]

    found = results(call, backend, grad if device is None else grad.to(device))
    if device:
        low = results(here, "reference", grad)
        within_budget(found, low, results(here.double(), "reference", grad.double()))


def attend(backend: str, backward: bool, device: str | None) -> None:
    """Check 200 tokens, grouped heads of 128, crayon and rotation, bfloat16."""
    import torch

    from collavo_kernels import crayon_attention
    from collavo_kernels.testing.cases.crayon_attention import AttentionCase

    case = AttentionCase("smoke", "", batch=1, length=200, head_dim=128, images=((3, 150),))

    def results(with_backend: str, to, place: str = "cpu") -> list[torch.Tensor]:
        inputs = case.make(torch.bfloat16)

        def moved(x):
            if not isinstance(x, torch.Tensor):
                return x
            return x.to(place, to if x.is_floating_point() else None)

        q, k, v, cos, sin, *rest = map(moved, inputs)
        leaves = [x.requires_grad_() for x in (q, k, v, *rest[:3])]
        options = dict(zip(inputs._fields[3:], (cos, sin, *rest), strict=True))
        out = crayon_attention(q, k, v, **options, backend=with_backend).out
        if not backward:
            return [out]
        upstream = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).bfloat16()
        return [out, *torch.autograd.grad(out, leaves, upstream.to(place, to))]

    found = results(backend, torch.bfloat16, device or "cpu")
    if device:
        low = results("reference", torch.bfloat16)
        within_budget(found, low, results("reference", torch.float64))


def within_budget(found, low, exact) -> None:
    """Allow twice the error of plain PyTorch in the same precision."""
    from collavo_kernels.testing import assert_within_budget

    for i, values in enumerate(zip(found, low, exact, strict=True)):
        assert_within_budget(values[0].cpu(), *values[1:], name=f"result {i}")


if __name__ == "__main__":
    raise SystemExit(main())
