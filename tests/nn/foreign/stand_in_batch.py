"""A batch for the stand-in, its crayon, and what the crayon's dense form makes of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from collavo_kernels.nn import CrayonPrompt, find_image_positions
from tests.nn.foreign.llava_stand_in import HIDDEN, IMAGE, SIDE

IDS = torch.tensor([[1, IMAGE, 5, 6, 7, 9], [1, 2, 4, IMAGE, 8, 0]])
MASK = (IDS != 0).long()
LABELS = IDS.masked_fill(IDS <= 0, -100)
ROWS = torch.tensor([[0, 1, 1, -1], [2, 2, 3, 0]], dtype=torch.int32)
CLASSES, NUMBERS = torch.tensor([[0, 18, 3, 5], [0, 1, 1, 2]])


def images(dtype: torch.dtype = torch.float32, count: int = 2) -> Tensor:
    made = torch.randn(count, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(1))
    return made.to(dtype)


def batch(model: nn.Module) -> dict[str, Any]:
    dtype = next(model.parameters()).dtype
    return {"input_ids": IDS, "attention_mask": MASK, "images": images(dtype)}


def where(model: nn.Module) -> Any:
    dtype = next(model.parameters()).dtype
    return find_image_positions(model, IDS, images(dtype), attention_mask=MASK)


def prompt(dtype: torch.dtype = torch.float32) -> CrayonPrompt:
    torch.manual_seed(4)
    made = CrayonPrompt(embed_dim=8, hidden_size=HIDDEN, zero_init=False)
    for parameter in made.parameters():
        nn.init.normal_(parameter, std=0.5)
    return made.to(dtype)


@contextmanager
def dense_form(layers: Any, table: Tensor, index: Tensor) -> Iterator[None]:
    """Add ``c[row]`` to the input of what makes q, k and v, by hooks; decode steps are shorter."""
    crayon = torch.where((index >= 0)[..., None], table[index.clamp_min(0).long()], 0.0)

    def add(module: nn.Module, args: tuple[Tensor]) -> tuple[Tensor] | None:
        if args[0].shape[1] != crayon.shape[1]:
            return None
        return (args[0] + crayon.repeat_interleave(len(args[0]) // len(crayon), 0),)

    names = ("q_proj", "k_proj", "v_proj", "qkv_proj", "query_key_value")
    hooks = [
        module.register_forward_pre_hook(add)
        for layer in layers
        for name, module in layer.named_modules()
        if name.rpartition(".")[2] in names
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def scattered(mask: Tensor, rows: Tensor = ROWS) -> Tensor:
    """Return the row of each token ``[B, S]``."""
    index = torch.full(mask.shape, -1, dtype=torch.int32)
    index[mask] = rows.flatten()
    return index


def results(run: Callable[[], Any], *modules: nn.Module) -> dict[str, Tensor]:
    """Return logits, loss and all gradients of a training step, by name."""
    for module in modules:
        module.zero_grad()
    found = run()
    found.loss.backward()
    named = [(f"{i}.{n}", p) for i, m in enumerate(modules) for n, p in m.named_parameters()]
    gradients = {name: p.grad for name, p in named if p.grad is not None}
    return {"logits": found.logits.detach(), "loss": found.loss.detach()[None], **gradients}
