"""panoptic_lookup beside the released algorithm, NumPy and torch; CrayonPrompt per row and token.

A case is size / segments / batch, on a grid of 35 x 35 unless it ends with another. In the modes
``majority`` and ``nearest`` one call follows the other; with ``-cold`` at the end other work comes
between (``cold.py``), as in a program that makes one such call per batch.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch

from benchmarks import memory
from benchmarks.cold import COLD, OtherWork, require_cpu
from benchmarks.conftest import Measure, chosen_kind
from benchmarks.panoptic_problem import Batch
from benchmarks.panoptic_providers import PROVIDERS, call_of
from collavo_kernels import panoptic_lookup
from collavo_kernels.nn import CrayonPrompt

QUICK = ("480x640/s15/b1", "480x640/s15/b16", "480x640/s15/b64")
FULL = tuple(
    name
    for size in ("480x640", "960x1280")
    for segments in (5, 15, 60)
    for batch in (1, 16, 64)
    for grid in ("", "/g24")
    if (name := f"{size}/s{segments}/b{batch}{grid}") not in QUICK
)
COLD_CASES = ("480x640/s15/b1", "480x640/s15/b16")
COLD_PROVIDERS = [name for name, (_, kind) in PROVIDERS.items() if kind != "cuda"]
COLD_PROVIDERS.remove("reference")


def marked(provider: str, case: str) -> Any:
    """Return the parameters, marked as the selections want them."""
    marks = [pytest.mark.full] if case in FULL else []
    few = case == QUICK[-1] and provider in ("ours:triton", "torch")
    marks += [pytest.mark.quick_gpu] if few else []
    return pytest.param(provider, case, marks=marks)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Every provider and case of the warm benchmark, marked."""
    if metafunc.function is bench_panoptic_lookup:
        both = [marked(p, c) for p in PROVIDERS for c in (*QUICK, *FULL)]
        metafunc.parametrize(("provider", "case"), both)


def run(
    measure: Measure,
    fn: Callable[[], object],
    *,
    provider: str,
    case: str,
    batch: Batch,
    before: Callable[[], None] | None = None,
) -> None:
    """Measure a call of a provider."""
    # A row says what was read: three bytes a pixel, or four.
    coloured = provider.endswith("-colours")
    measure(
        fn,
        op="panoptic_lookup",
        provider=provider,
        case=case,
        mode=PROVIDERS[provider][0] + (COLD if before else ""),
        dtype=torch.uint8 if coloured else torch.int32,
        bytes=batch.maps.numel() * (3 if coloured else 4),
        config={"grid": batch.grid, "threads": torch.get_num_threads()},
        # The others read values from the device.
        capture=provider.startswith("ours"),
        before=before,
    )


def bench_panoptic_lookup(
    measure: Measure,
    device: torch.device,
    pytestconfig: pytest.Config,
    provider: str,
    case: str,
) -> None:
    needs, kind = PROVIDERS[provider][1], chosen_kind(pytestconfig)
    if needs and kind != needs:
        pytest.skip(f"{provider} runs on {needs}, the device is {kind}")
    batch = Batch(case)
    run(measure, call_of(provider, batch, device), provider=provider, case=case, batch=batch)


@pytest.mark.parametrize("case", COLD_CASES)
@pytest.mark.parametrize("provider", COLD_PROVIDERS)
def bench_panoptic_lookup_cold(
    measure: Measure, device: torch.device, pytestconfig: pytest.Config, provider: str, case: str
) -> None:
    """Other work between the calls, and other maps at each."""
    require_cpu(chosen_kind(pytestconfig))
    batch = Batch(case)
    copies = range(memory.copies_past_cache(batch.maps.nbytes, device))
    calls = itertools.cycle([call_of(provider, batch.copy(), device) for _ in copies])
    run(
        measure,
        lambda: next(calls)(),
        provider=provider,
        case=case,
        batch=batch,
        before=OtherWork(),
    )


@pytest.mark.parametrize("case", ["d128", pytest.param("d1024", marks=pytest.mark.full)])
@pytest.mark.parametrize("provider", ["ours", "per-token"])
def bench_crayon_prompt(measure: Measure, device: torch.device, provider: str, case: str) -> None:
    """Forward and backward for 16 images of 35x35 tokens; hidden size is four times the width."""
    batch, width = Batch("480x640/s15/b16"), int(case[1:])
    maps = batch.maps.to(device)
    crayon = panoptic_lookup(maps, batch.ids, batch.classes, grid=batch.grid)
    module = CrayonPrompt(embed_dim=width, hidden_size=4 * width, zero_init=False).to(device)
    index = crayon.row_index.long()

    def call() -> None:
        module.zero_grad(set_to_none=True)
        if provider == "ours":
            table = module(crayon)
        else:
            table = module.project(crayon.row_class[index], crayon.row_number[index])
        table.sum().backward()

    measure(
        call,
        op="crayon_prompt",
        provider=provider,
        case=case,
        mode="fwd+bwd",
        # The work there is: forward, weight gradient and input gradient of both layers, per row.
        flops=2 * 3 * crayon.num_rows * (4 * width * width + 16 * width * width),
        config={
            "rows": crayon.num_rows,
            "tokens": index.numel(),
            "embed_dim": width,
            "hidden_size": 4 * width,
        },
    )
