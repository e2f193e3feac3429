"""crayon_attention beside what it replaces, and beside attention that has neither crayon nor RoPE.

The providers of a case take turns. ``fwd-cold`` is the forward with other work between the calls.
GB/s, GFLOP/s and roof are of the operator's work: every input read and every output written once,
the products of the causal half. The error of ``fwd+bwd`` is the worst gradient's. On a GPU the
calls rotate over copies of the inputs that fill its cache twice.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from benchmarks import memory
from benchmarks.cold import COLD, OtherWork
from benchmarks.conftest import Measure, chosen_kind, turns
from benchmarks.crayon_problem import (
    ONLY_GPU,
    SHAPES,
    Shape,
    copies_of,
    exact,
    leaves,
    make,
    upstream,
)
from benchmarks.crayon_providers import alone, attention, is_alone, names
from collavo_kernels.ops.crayon_attention.inputs import AttentionInputs
from collavo_kernels.testing import relative_error

QUICK = {
    "cpu": ("demo/b32", "demo-padded/b32", "7b/s320/g8/b1", "7b/s1325/g8/b1"),
    "cuda": ("7b/s1325/g8/b1", "7b/s1325/g32/b1", "7b/s2048/g8/b1", "7b/s8192/g8/b1"),
}
# They take longest and say least; the small case shows them.
SLOW = ("compile(eager)", "released-scheme", "reference")
SLOW_CASE = "7b/s320/g8/b1"
MODES = ("fwd", "fwd+bwd")
# Enough to see that a call of this length does not depend on what was there before it.
COLD_MODE, COLD_CASE, COLD_PROVIDERS = "fwd" + COLD, "7b/s1325/g8/b1", ("ours:cpu", "eager")


def in_quick(kind: str, case: str, provider: str) -> bool:
    """Whether the quick selection has it."""
    if provider in SLOW and kind == "cpu":
        return case == SLOW_CASE and provider != "reference"
    return case in QUICK[kind] and provider != "reference"


def in_quick_gpu(mode: str, case: str, provider: str) -> bool:
    """Whether the few rows that a borrowed GPU has time for have it."""
    if case not in QUICK["cuda"] or provider in (*SLOW, "sdpa-alone", "ours-alone:cuda"):
        return False
    return mode == "fwd" or not provider.startswith("ours-alone")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Every case, its providers in turns, so that all of them see the same quiet or busy times."""
    kind = chosen_kind(metafunc.config)
    parameters = []
    cold = [(COLD_CASE, COLD_MODE)] if kind == "cpu" else []
    for case, mode in [*itertools.product(SHAPES, MODES), *cold]:
        if case in ONLY_GPU and kind == "cpu":
            continue
        named = COLD_PROVIDERS if mode == COLD_MODE else names(kind)
        for turn, provider in itertools.product(turns(metafunc.config), named):
            marks = [] if in_quick(kind, case, provider) else [pytest.mark.full]
            marks += [pytest.mark.quick_gpu] if in_quick_gpu(mode, case, provider) else []
            name = f"{mode}-{case}-{provider}-{turn}"
            parameters.append(pytest.param(mode, case, provider, turn, marks=marks, id=name))
    metafunc.parametrize(("mode", "case", "provider", "turn"), parameters)


def error_of(
    found: Tensor | tuple[Tensor, ...], case: str, provider: str, device: torch.device
) -> float:
    """Return the error on the valid rows against float64; of gradients, the worst."""
    backward = not isinstance(found, Tensor)
    expected = exact(case, device, crayon=not is_alone(provider), gradients=backward)
    if not isinstance(found, Tensor):
        pairs = zip(found, expected.gradients, strict=True)
        return max(relative_error(f, e) for f, e in pairs)
    out = found.detach()
    ranges = make(case, device).key_range
    if ranges is not None:
        valid = torch.arange(out.shape[1], device=device) < ranges[:, 1:]
        out = out * valid[:, :, None, None]
    return relative_error(out, expected.out)


def bench_crayon_attention(
    measure: Measure, device: torch.device, mode: str, case: str, provider: str, turn: int
) -> None:
    """Inference, and a training step's forward and backward."""
    shape, inputs, fn = SHAPES[case], make(case, device), attention(provider)
    grad = upstream(inputs)
    size = shape.bytes("fwd", inputs.q.element_size()) // 2
    many = memory.copies_past_cache(size, device) if device.type == "cuda" else 1
    following = itertools.cycle(copies_of(inputs, many))

    def forward() -> Tensor:
        with torch.no_grad():
            return fn(next(following))

    def both() -> tuple[Tensor, ...]:
        given = next(following)
        wanted = leaves(alone(given) if is_alone(provider) else given)
        return torch.autograd.grad(fn(given), wanted, grad)

    call: Callable[[], Tensor | tuple[Tensor, ...]] = both if mode == "fwd+bwd" else forward
    try:
        call()
    except (RuntimeError, ValueError) as reason:
        if provider in ("ours:cpu", "ours-alone:cpu", "ours:triton", "eager", "sdpa-alone"):
            raise
        pytest.skip(f"{provider}: {str(reason).splitlines()[0]}")
    measure(
        call,
        op="crayon_attention",
        provider=provider,
        case=case,
        mode=mode,
        dtype=inputs.q.dtype,
        bytes=shape.bytes(mode, inputs.q.element_size()),
        flops=shape.flops(mode),
        error=lambda: error_of(call(), case, provider, device),
        config=_config(shape, inputs),
        in_turns=True,
        before=OtherWork() if mode == COLD_MODE else None,
    )


def _config(shape: Shape, inputs: AttentionInputs) -> dict[str, object]:
    sizes = {name: getattr(shape, name) for name in Shape._fields if name != "dtype"}
    return {**sizes, "table_rows": 0 if inputs.crayon_q is None else inputs.crayon_q.shape[0]}
