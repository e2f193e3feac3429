"""A model in miniature with what the trainer looks at: crayon, two adapters, frozen bytes."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import Dataset
from transformers import PretrainedConfig, PreTrainedModel

VOCABULARY, WIDTH = 16, 8


class ToyConfig(PretrainedConfig):
    model_type = "toy_crayon"


class ToyCrayonModel(PreTrainedModel):
    """Next-token model: a frozen embedding, plus LoRA "image" and "vl", plus a crayon vector."""

    config_class = ToyConfig

    def __init__(self, config: ToyConfig) -> None:
        super().__init__(config)
        self.adapters: tuple[str, ...] = ("image", "vl")
        self.embedding = nn.Embedding(VOCABULARY, WIDTH)
        self.crayon = nn.Embedding(4, WIDTH)
        self.codes = nn.Parameter(torch.arange(6, dtype=torch.uint8), requires_grad=False)
        self.lora_a = nn.ModuleDict({k: nn.Linear(WIDTH, 2, bias=False) for k in ("image", "vl")})
        self.lora_b = nn.ModuleDict({k: nn.Linear(2, WIDTH, bias=False) for k in ("image", "vl")})
        self.head = nn.Linear(WIDTH, VOCABULARY)
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Linear | nn.Embedding):
            module.weight.data.normal_(0.0, 0.3)

    def crayon_parameters(self) -> Iterable[nn.Parameter]:
        return self.crayon.parameters()

    def adapter_parameters(self, name: str) -> Iterable[nn.Parameter]:
        if name not in self.adapters:
            raise ValueError(f"name: no adapter {name!r}")
        return [*self.lora_a[name].parameters(), *self.lora_b[name].parameters()]

    def forward(
        self, input_ids: Tensor, crayon_row: Tensor, labels: Tensor, **kwargs: Any
    ) -> dict[str, Tensor]:
        hidden = self.embedding(input_ids)
        if bool((crayon_row >= 0).any()):
            mask = (crayon_row >= 0)[:, None, None]
            hidden = hidden + mask * self.crayon(crayon_row.clamp_min(0))[:, None]
        for name in ("image", "vl"):
            hidden = hidden + self.lora_b[name](self.lora_a[name](hidden))
        logits = self.head(hidden)[:, :-1].flatten(0, 1)
        count = kwargs.get("num_items_in_batch")
        loss = F.cross_entropy(logits, labels[:, 1:].flatten(), reduction="sum")
        return {"loss": loss / (labels[:, 1:].numel() if count is None else count)}


class ToyData(Dataset[dict[str, Tensor]]):
    """Random sequences that follow from the index; VL samples have no image (row -1)."""

    def __init__(self, kind: str, size: int = 11) -> None:
        self.kind, self.size = kind, size

    def __len__(self) -> int:
        return self.size

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(index + 1000 * (self.kind == "vl"))
        tokens = torch.randint(VOCABULARY, (6,), generator=generator)
        row = index % 4 if self.kind == "image" else -1
        return {"input_ids": tokens, "crayon_row": torch.tensor(row), "labels": tokens.clone()}


def make_toy() -> ToyCrayonModel:
    torch.manual_seed(7)
    return ToyCrayonModel(ToyConfig())
