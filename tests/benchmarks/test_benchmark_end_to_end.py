"""The benchmark of a whole model: both sides compute the same, and a step is always the same."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from benchmarks.ops import end_to_end_providers as bench
from benchmarks.ops.end_to_end_cases import MODES, Case
from collavo_kernels.testing import relative_error

CPU = torch.device("cpu")
# The peer multiplies in bfloat16 whatever the model's dtype: five of its roundings. What is left
# out (a crayon, an adapter) has to be at least twice that.
BOUND = 5 * 2**-8
# Blocks of 64 weights must not straddle rows: the intermediate size is a multiple.
TINY = Case(hidden=128, layers=2, grid=4, text=8, batch=2, rank=4, intermediate=384)


@pytest.fixture(autouse=True)
def _nothing_kept() -> Iterator[None]:
    yield
    bench.models.cache_clear()
    bench.LOGITS.clear()


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("provider", bench.PROVIDERS)
def test_both_sides_give_the_logits_of_float64(provider: str, mode: str) -> None:
    """A crayon or an adapter left out would be beyond the bound; the next test sees to that."""
    if provider != "ours":
        pytest.importorskip("bitsandbytes")
        pytest.importorskip("peft")
    pair = bench.models(TINY, torch.float32, CPU, mode == "train")
    exact = bench.exact(pair)
    if mode == "decode":
        exact = exact[:, -1:]
    step = bench.WORK[mode](pair.ours if provider == "ours" else pair.peer, pair.inputs)
    first, second = step(), step()
    assert torch.equal(first, second), "the cache or the weights have moved on"
    assert relative_error(first, exact) < (1e-4 if provider == "ours" else BOUND)


def test_the_crayon_and_the_adapters_matter() -> None:
    """Without them the logits are others."""
    pair = bench.models(TINY, torch.float32, CPU, False)
    exact = bench.exact(pair)
    inputs = {name: x for name, x in pair.inputs.items() if not name.startswith("crayon")}
    assert relative_error(bench.prefill(pair.ours, inputs)(), exact) > 2 * BOUND
    with torch.no_grad():
        for parameter in pair.ours.adapter_parameters("vl"):
            parameter.zero_()
    assert relative_error(bench.prefill(pair.ours, pair.inputs)(), exact) > 2 * BOUND


def test_the_peer_trains_through_its_base_weights() -> None:
    """Its gradients are ours: bitsandbytes' layer drops a part after a forward in ``eval``."""
    pytest.importorskip("bitsandbytes")
    pytest.importorskip("peft")
    pair = bench.models(TINY, torch.float32, CPU, True)
    gradients = {}
    for name, model in (("ours", pair.ours), ("peer", pair.peer)):
        model.train()
        model(**pair.inputs).loss.backward()
        gradients[name] = next(
            parameter.grad
            for key, parameter in model.named_parameters()
            if key.endswith("layers.0.self_attn.q_proj.lora_A.image.weight")
        )
    assert relative_error(gradients["peer"], gradients["ours"].double()) < 0.05
