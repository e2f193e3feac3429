"""Two threads on one model at once: neither sees the mask or the crayon of the other."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from tiny_crayon_model import IMAGE, make_batch, make_model
from torch import Tensor

ROUNDS = 10


def other_batch() -> dict[str, Tensor]:
    """The same shapes with image tokens, crayon rows and pixels in other places."""
    batch = make_batch()
    batch["input_ids"] = torch.tensor(
        [[4, 5, 6, IMAGE, IMAGE, IMAGE, IMAGE, 7], [0, IMAGE, IMAGE, IMAGE, IMAGE, 3, 2, 9]]
    )
    batch["pixel_values"] = batch["pixel_values"].flip(0)
    batch["crayon_index"] = torch.tensor([[1, 0, 0, 1], [-1, 2, 2, 1]], dtype=torch.int32)
    batch["crayon_class"] = torch.tensor([[7, 2, -1], [4, 80, 133]], dtype=torch.int32)
    return batch


def results(model: Any, batch: dict[str, Tensor], *, gradients: bool) -> list[Tensor]:
    """Logits and, where asked for, the gradients of crayon and adapters."""
    logits = model(**batch).logits
    if not gradients:
        return [logits.detach()]
    wanted = [*model.crayon_parameters(), *model.adapter_parameters("image")]
    # Not backward(): two threads would add to one .grad.
    return [logits.detach(), *torch.autograd.grad(logits.square().sum(), wanted)]


@pytest.mark.parametrize("quantize", [None, "nf4"])
@pytest.mark.parametrize("training", [False, True], ids=["eval", "checkpointing"])
@pytest.mark.parametrize("mode", ["attention", "projection"])
def test_two_threads_run_one_model(mode: str, training: bool, quantize: str | None) -> None:
    """They meet between attention and MLP of every layer: state in a module would be mixed up."""
    model: Any = make_model(
        crayon_mode=mode,
        adapters=("image", "vl"),
        image_adapters=("image",),
        quantize=quantize,
        text={"hidden_size": 64, "intermediate_size": 64},
    )
    if training:
        model.train()
        model.gradient_checkpointing_enable({"use_reentrant": False})
    batches = (make_batch(), other_batch())
    alone = [results(model, batch, gradients=training) for batch in batches]
    assert not torch.equal(alone[0][0], alone[1][0])
    meeting = threading.Barrier(2)

    def meet(*_: Any) -> None:
        meeting.wait(60)

    for layer in model.model.language_model.layers:
        layer.self_attn.register_forward_hook(meet)

    def run(batch: dict[str, Tensor]) -> list[list[Tensor]]:
        try:
            return [results(model, batch, gradients=training) for _ in range(ROUNDS)]
        except BaseException:
            meeting.abort()  # who waits for a thread that failed need not wait long
            raise

    with ThreadPoolExecutor(2) as pool:
        together = list(pool.map(run, batches))
    for expected, rounds in zip(alone, together, strict=True):
        for found in rounds:
            assert all(map(torch.equal, expected, found))
