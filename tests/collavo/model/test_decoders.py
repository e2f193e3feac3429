"""Every decoder that carries the crayon, in every mode, against plain hooks on the stock model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from test_apply_to_llava import assert_same, generate, make_batch, plain, snapshot
from tiny_decoder_llavas import ADAPTERS, MODES, TEXTS, hooked, inputs, make_llava, patched
from torch import Tensor, nn

import collavo
from collavo import apply_to_llava
from collavo.model.decoders import DECODERS
from collavo_kernels.testing import assert_within_budget
from tests.fuzz.stock_crayon import StockWithCrayon

pytestmark = pytest.mark.usefixtures("one_thread")


def results(model: nn.Module, batch: dict[str, Tensor], names: dict[str, str]) -> list[Tensor]:
    """Return logits, and the gradients of what was added, in one vector."""
    valid = make_batch()["attention_mask"].bool()
    logits = model(**batch).logits[valid]
    pull = torch.randn(logits.shape, generator=torch.Generator().manual_seed(2))
    (logits * pull.to(logits.dtype)).sum().backward()
    own = dict(model.named_parameters())
    grads = []
    for name in names.values():
        (found,) = (p for n, p in own.items() if n == name or n.endswith(f".{name}"))
        grads.append(found.grad)
    return [logits.detach(), *grads]


def assert_as_hooks(kind: str, model: Any) -> StockWithCrayon:
    """Assert that a patched model computes what the hooks do; return these in float32."""
    low, eager = hooked(kind, model), hooked(kind, model)
    eager.model.set_attn_implementation("eager")
    exact = hooked(kind, model, torch.float64)
    own = {name: name for name in low.names}
    hooks = {name: f"extra.{key}" for name, key in low.names.items()}
    truth = results(exact.model, inputs(torch.float64), hooks)
    found = results(model, make_batch(), own)
    theirs = [results(stock.model, inputs(torch.float32), hooks) for stock in (low, eager)]
    # On one scale, and the mean error: the largest of a few thousand, which went through a whole
    # model, is a matter of luck, now ours and now PyTorch's by a factor of three.
    scales = [float(x.abs().max()) for x in truth]
    errors = [
        torch.cat([((x - y) / by).flatten() for x, y, by in zip(each, truth, scales, strict=True)])
        for each in (found, *theirs)
    ]
    ours, *torchs = (float(error.square().mean().sqrt()) for error in errors)
    assert ours <= 2 * max(torchs), (ours, torchs)
    return low


def test_the_printed_table_is_what_these_tests_run() -> None:
    """Every decoder is in the code's table, in the printed one and here; no cell says less."""
    page = (Path(collavo.__file__).parent / "README.md").read_text(encoding="utf-8")
    lines = page.split("## Which decoders")[1].split("\n## ")[0].splitlines()
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines if line[:1] == "|"]
    head, _, *printed = rows
    assert head[:3] == ["decoder", "attention", "layer and MLP"]
    assert head[3:5] == [f"crayon: {mode}" for mode in MODES if mode != "none"]
    assert {row[0]: tuple(row[1:3]) for row in printed} == DECODERS
    assert all(cell == "yes" for row in printed for cell in row[3:7])
    assert set(TEXTS) == set(DECODERS)


@pytest.mark.parametrize("quantize", [None, "nf4"])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", list(TEXTS))
def test_a_decoder_carries_crayon_and_adapters(kind: str, mode: Any, quantize: Any) -> None:
    """Forward, gradients and greedy answers are those of the dense form, with both adapters."""
    model = patched(kind, mode, quantize=quantize, **ADAPTERS)
    low = assert_as_hooks(kind, model)
    assert torch.equal(generate(model, make_batch()), generate(low.model, inputs(torch.float32)))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", list(TEXTS))
def test_what_is_fresh_changes_nothing_and_undo_brings_all_back(kind: str, mode: Any) -> None:
    """Crayon and adapters of zero, and then the model as it was, to the last bit."""
    model, batch = make_llava(kind), make_batch()
    valid = batch["attention_mask"].bool()
    logits, before = model(**plain(batch)).logits, snapshot(model)
    tokens = generate(model, plain(batch))
    handle = apply_to_llava(model, crayon_mode=mode, crayon_rank=4, **ADAPTERS)
    keys = {k for k in model.state_dict() if "crayon" not in k and "lora" not in k}
    assert keys == set(before[0])
    exact = make_llava(kind).double()(**inputs(torch.float64)).logits
    pair = (logits[valid].detach(), exact[valid].detach())
    assert_within_budget(model(**batch).logits[valid].detach(), *pair)
    assert torch.equal(generate(model, batch), tokens)
    assert handle.undo() is model
    assert_same(before, snapshot(model))
    assert torch.equal(model(**plain(batch)).logits, logits)
