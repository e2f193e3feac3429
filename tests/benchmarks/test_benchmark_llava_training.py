"""The benchmark of LLaVA's stages: every side trains, and trains the same."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from benchmarks.ops import llava_training_providers as bench
from benchmarks.ops.llava_training_cases import CRAYON, MODES, NAMES, OP, QLORA, Case
from benchmarks.registry import Row
from collavo_kernels.testing import relative_error

CPU = torch.device("cpu")
TINY = Case(128, 384, 2, 4, 8, 2, 64, head_dim=64)
SIDES = [(mode, provider) for mode in MODES for provider in NAMES[mode]]


@pytest.fixture(autouse=True)
def _tiny(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setitem(bench.CASES, str(TINY), TINY)
    yield
    bench.settings.cache_clear()


def prepared(mode: str, provider: str) -> Any:
    if "bitsandbytes" in provider:
        pytest.importorskip("bitsandbytes")
    if "peft" in provider:
        pytest.importorskip("peft")
    row = Row(OP, mode, str(TINY), provider, dtype="bfloat16")
    return bench.prepare(row, CPU), bench.settings(TINY, mode, CPU).model(provider)


@pytest.mark.parametrize(("mode", "provider"), SIDES)
def test_every_side_trains_the_stages_parts_in_float32(mode: str, provider: str) -> None:
    call, model = prepared(mode, provider)
    call.run()
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert {p.dtype for p in trained.values()} == {torch.float32}
    adapters = {name for name in trained if "lora_" in name}
    crayon = {name for name in trained if "crayon" in name}
    projector = {name for name in trained if "multi_modal_projector" in name}
    assert len(projector) == 4
    assert len(adapters) == (2 * 7 * TINY.layers if mode == "instruct" else 0)
    assert bool(crayon) == (provider == CRAYON)
    assert trained.keys() == adapters | crayon | projector
    assert call.config["tokens"] == 2 * (16 + 8)


@pytest.mark.parametrize("mode", MODES)
def test_a_step_is_always_the_same(mode: str) -> None:
    """Its rate is zero, so that no call finds other weights than the one before."""
    call, model = prepared(mode, "ours")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    call.run()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("provider", ["ours", QLORA])
def test_the_projectors_gradient_is_that_of_float64(mode: str, provider: str) -> None:
    call, _ = prepared(mode, provider)
    assert call.error() < bench.FAR


def test_a_peer_that_leaves_the_base_out_is_not_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    """What bitsandbytes' CPU layer does after a forward without gradients is seen, and said."""
    pytest.importorskip("bitsandbytes")
    pytest.importorskip("peft")
    made = bench.PROVIDERS[QLORA]

    def evaluated(setting: bench.Setting) -> torch.nn.Module:
        model = made(setting).eval()
        with torch.no_grad():
            bench.loss(model, setting.inputs, CPU)
        for module in model.modules():  # wherever the layer would have followed all the same
            if type(module).__name__ == "Linear4bit":
                module.register_forward_hook(lambda _, __, out: out.detach())
        return model

    monkeypatch.setitem(bench.PROVIDERS, QLORA, evaluated)
    with pytest.raises(RuntimeError, match=r"expected the projector's gradient within|got none"):
        prepared("instruct", QLORA)


def test_adapters_and_crayon_matter() -> None:
    """Without them the gradient is another: a side that left them out would be beyond the bound."""
    setting = bench.settings(TINY, "instruct", CPU)
    exact = setting.exact
    assert exact is not None
    model: Any = setting.model("ours")
    with torch.no_grad():
        for parameter in model.adapter_parameters(bench.ADAPTER):
            parameter.zero_()
    bench.loss(model, setting.inputs, CPU).backward()
    assert relative_error(bench.projector_gradient(model), exact) > 2 * bench.FAR
