"""qlora_linear beside bitsandbytes' base, PEFT on it, a dense layer, and what one writes by hand.

The work is the whole operator with two adapters. ``bitsandbytes``, ``dense`` and ``ours:int8`` do
the base alone, and are held against the work of that. Weights rotate past the last-level cache, and
the providers of a case take turns. ``fwd-grad`` is a forward with gradients on. Providers that end
with ``-fp32-adapters`` have float32 adapters, the default of ``apply_to_llava`` and of PEFT.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from benchmarks import memory, peers
from benchmarks.conftest import Measure, chosen_kind, turns
from benchmarks.qlora_problem import (
    BASE_ONLY,
    DTYPE,
    FLOAT32_ADAPTERS,
    Case,
    exact,
    tokens,
    weights,
)
from benchmarks.qlora_providers import Layer, make
from collavo_kernels.testing import relative_error

SHAPES = ((4096, 4096), (4096, 11008), (11008, 4096), (5120, 13824))
RANKS = (64, 16, 256)
TOKENS = {"cpu": (1, 4, 16, 128, 1024), "cuda": (1, 4, 16, 128, 2048)}
QUICK_SHAPES = {"cpu": SHAPES[:1], "cuda": SHAPES[:2]}
# The middle sizes add little where a call takes long.
QUICK_TOKENS = {
    "fwd": (1, 4, 16, 128, 1024, 2048),
    "fwd-grad": (1, 16),
    "fwd+bwd": (1, 128, 1024, 2048),
}
OURS = {"cpu": ("ours:cpu",), "cuda": ("ours:triton", "ours:cuda")}
OTHERS = ("bitsandbytes", "peft", "dense", "dense+lora", "dequantize+lora")
PLAIN = ("reference", "compile(reference)")
PLAIN_RANK = 64
INT8_TOKENS = 16
# y, or the gradients of x and of the adapters' factors.
Found = Tensor | tuple[Tensor, ...]


def providers(mode: str, kind: str, case: Case) -> list[str]:
    """List who is measured in a mode on a kind of device."""
    named = [*OURS[kind], *OTHERS]
    if mode != "fwd-grad":
        named += [f"{name}{FLOAT32_ADAPTERS}" for name in (*OURS[kind], "peft")]
    if mode == "fwd" and kind == "cpu" and case.m <= INT8_TOKENS:
        named.insert(1, "ours:int8")
    return [*named, *PLAIN] if case.rank == PLAIN_RANK else named


def in_quick(mode: str, kind: str, case: Case, provider: str) -> bool:
    """Whether the quick selection has it."""
    if (case.k, case.n) not in QUICK_SHAPES[kind] or case.m not in QUICK_TOKENS[mode]:
        return False
    slow = provider == "reference" and case.m > INT8_TOKENS and kind == "cpu"
    # A compilation takes longer than all else of a case.
    compiled = provider == "compile(reference)" and (mode != "fwd" or case.m != 1)
    # A GPU's time is short; what its adapters' dtype costs is the larger selection's.
    wide = provider.endswith(FLOAT32_ADAPTERS) and kind == "cuda"
    return case.rank == RANKS[0] and not (slow or compiled or wide)


def in_quick_gpu(mode: str, case: Case, provider: str) -> bool:
    """Whether the few rows that a borrowed GPU has time for have it."""
    if (case.k, case.n) not in SHAPES[:3] or case.rank != RANKS[0] or mode == "fwd-grad":
        return False
    if mode == "fwd+bwd":
        return case.m == 2048 and provider in (*OURS["cuda"], "dequantize+lora")
    others = {1: ("bitsandbytes", "peft"), 4: (), 16: ("bitsandbytes", "peft"), 128: ("dense",)}
    return provider in (*OURS["cuda"], *others.get(case.m, ("dense", "dequantize+lora")))


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Every case, its providers in turns, so that all of them see the same quiet or busy times."""
    kind = chosen_kind(metafunc.config)
    parameters = []
    for mode, (k, n), rank in itertools.product(QUICK_TOKENS, SHAPES, RANKS):
        for m in TOKENS[kind] if mode != "fwd-grad" else QUICK_TOKENS[mode]:
            case = Case(k, n, m, rank)
            named = providers(mode, kind, case)
            for turn, provider in itertools.product(turns(metafunc.config), named):
                marks = [] if in_quick(mode, kind, case, provider) else [pytest.mark.full]
                marks += [pytest.mark.quick_gpu] if in_quick_gpu(mode, case, provider) else []
                name = f"{mode}-{case}-{provider}-{turn}"
                parameters.append(pytest.param(mode, case, provider, turn, marks=marks, id=name))
    metafunc.parametrize(("mode", "case", "provider", "turn"), parameters)


@functools.lru_cache(maxsize=1)
def kept_layers(
    shape: tuple[int, int], rank: int, training: bool, device: torch.device
) -> dict[str, list[Layer]]:
    """Return where the copies of one shape and rank are kept; the former ones are let go."""
    return {}


def layers(case: Case, provider: str, training: bool, x: Tensor) -> list[Layer]:
    """Return the provider's copies of the layer, as many as rotate past the cache."""
    device = x.device
    kept = kept_layers((case.k, case.n), case.rank, training, device)
    if provider not in kept:
        given = weights(case.k, case.n, case.rank, device)
        size = case.n * case.k * (DTYPE.itemsize if provider.startswith("dense") else 0.5)
        copies = range(memory.copies_past_cache(int(size), device))
        made = [make(provider, given, training=training) for _ in copies]
        for layer in () if training else made:
            layer.forward(x)  # bitsandbytes packs its weight anew at first use
        kept[provider] = made
    return kept[provider]


def calls(
    mode: str, provider: str, copies: list[Layer], x: Tensor, grad: Tensor
) -> list[Callable[[], Found]]:
    """Return what is timed, a call per copy."""

    def forward(layer: Layer) -> Tensor:
        return layer.forward(x)

    def both(layer: Layer) -> tuple[Tensor, ...]:
        return torch.autograd.grad(layer.forward(x), [x, *layer.leaves], grad)

    run: Callable[[Layer], Found] = both if mode == "fwd+bwd" else forward
    return [functools.partial(run, layer) for layer in copies]


def error_of(found: Found, mode: str, provider: str, case: Case, device: torch.device) -> float:
    """Return the error against float64 of what the provider computes; of gradients, the worst."""
    expected = exact(
        case,
        device,
        dense=provider.startswith("dense"),
        adapted=provider not in BASE_ONLY,
        gradients=mode == "fwd+bwd",
    )
    if isinstance(found, Tensor):
        return relative_error(found.detach(), expected.y)
    wanted = (*expected.dx, *expected.factors)
    return max(relative_error(f, e) for f, e in zip(found, wanted, strict=True))


def config(provider: str, copies: int) -> dict[str, object]:
    """Return the copies, and for a peer whether bitsandbytes has its hub kernel."""
    facts: dict[str, object] = {"copies": copies}
    if provider.startswith(("bitsandbytes", "peft")):
        facts["hub_kernel"] = peers.has_hub_kernel()
    return facts


def bench_qlora_linear(
    measure: Measure,
    device: torch.device,
    mode: str,
    case: Case,
    provider: str,
    turn: int,
) -> None:
    """Inference, a forward that keeps what a backward needs, and both."""
    training = mode != "fwd"
    x, grad = tokens(case, device)
    x = x.detach().requires_grad_(training)
    with torch.set_grad_enabled(training):
        try:
            copies = layers(case, provider, training, x)
            copies[0].forward(x)
        except (TypeError, ValueError) as reason:
            if not provider.startswith("ours"):
                raise
            pytest.skip(f"{provider}: {reason}")
        following = itertools.cycle(calls(mode, provider, copies, x, grad))
        measure(
            lambda: next(following)(),
            op="qlora_linear",
            provider=provider,
            case=str(case),
            mode=mode,
            dtype=DTYPE,
            bytes=case.bytes(mode, provider),
            flops=case.flops(mode, provider),
            error=lambda: error_of(next(following)(), mode, provider, case, device),
            config=config(provider, len(copies)),
            in_turns=True,
        )
