"""The benchmark of orders: both take every sample once, and padding is counted."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from benchmarks.ops import llava_order_providers as bench
from benchmarks.ops.llava_order_cases import MODE, NAMES, OP, SAMPLES, SMALL, Mix
from benchmarks.ops.llava_training_cases import Case
from benchmarks.registry import Row

CPU = torch.device("cpu")
TINY = Mix(5, 4, Case(128, 384, 1, 2, 0, SAMPLES, 64, head_dim=64))


@pytest.fixture(autouse=True)
def _tiny(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setitem(bench.MIXES, str(TINY), TINY)
    yield
    bench.model_of.cache_clear()


@pytest.mark.parametrize("provider", NAMES)
@pytest.mark.parametrize("mix", [TINY, SMALL], ids=str)
def test_an_epoch_takes_every_sample_once(provider: str, mix: Mix) -> None:
    batches = bench.PROVIDERS[provider](mix)
    taken = sorted(sample for batch in batches for sample in batch)
    assert taken == list(range(mix.images + mix.texts))
    kinds = {len({sample < mix.images for sample in batch}) for batch in batches}
    assert max(kinds) == (1 if provider == "ours:grouped" else 2)


@pytest.mark.parametrize("provider", NAMES)
def test_an_epoch_runs_and_says_how_much_is_padding(provider: str) -> None:
    row = Row(OP, MODE, str(TINY), provider, dtype="bfloat16")
    call = bench.prepare(row, CPU)
    call.run()
    batches = [bench.padded_batch(TINY, each, CPU) for each in bench.PROVIDERS[provider](TINY)]
    real = sum(int(batch["attention_mask"].sum()) for batch in batches)
    assert call.config["tokens"] == real == int(TINY.lengths().sum())
    whole = sum(batch["attention_mask"].numel() for batch in batches)
    assert call.config["padded"] == pytest.approx(1 - real / whole, abs=1e-4)
