"""A CoLLaVO model of a few thousand parameters, and records for it, without files or tokenizer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from tiny import tiny_vision
from torch import Tensor
from torch.utils.data import Dataset

from collavo.configuration import CollavoConfig
from collavo.model.llava import CollavoForConditionalGeneration

VOCABULARY, IMAGE_TOKEN, CELLS = 40, 39, 4


def make_collavo(
    crayon_mode: str = "projection",
    *,
    adapters: bool = True,
    quantize: bool = True,
    classes: int = 8,
    numbers: int = 4,
    vocabulary: int = VOCABULARY,
) -> CollavoForConditionalGeneration:
    """Build a model with random weights; its adapters' B and its crayon begin away from zero."""
    torch.manual_seed(5)
    vision = tiny_vision()
    text = {
        "vocab_size": vocabulary,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "pad_token_id": 0,
    }
    config = CollavoConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=IMAGE_TOKEN,
        vision_feature_layer=-1,
        crayon_mode=crayon_mode,
        crayon_rank=4,
        num_crayon_classes=classes,
        max_crayon_number=numbers,
    )
    model = CollavoForConditionalGeneration(config)
    if adapters:
        model.add_dual_qlora(rank=4, alpha=4.0, quantize=quantize)
        for name in ("image", "vl"):
            for parameter in model.adapter_parameters(name):
                parameter.data.normal_(0.0, 0.2)
    for parameter in model.crayon_parameters():
        parameter.data.normal_(0.0, 0.2)
    return model


class CollavoRecords(Dataset[dict[str, Tensor]]):
    """Model inputs that follow from the index; every ``text_every``-th record is text alone."""

    def __init__(self, kind: str, size: int = 8, *, text_every: int = 0) -> None:
        self.kind, self.size, self.text_every = kind, size, text_every

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(index + 1000 * (self.kind == "vl"))
        tokens = torch.randint(1, IMAGE_TOKEN, (6 + CELLS,), generator=generator)
        labels = tokens.clone()
        labels[: 2 + CELLS] = -100
        record = {"attention_mask": torch.ones_like(tokens), "labels": labels}
        if not self.text_every or index % self.text_every:
            tokens[1 : 1 + CELLS] = IMAGE_TOKEN
            record["pixel_values"] = torch.randn(3, 8, 8, generator=generator)
            record["crayon_index"] = torch.tensor([0, 1, 2, 1], dtype=torch.int32)
            record["crayon_class"] = torch.tensor([0, 1 + index % 7, 3], dtype=torch.int32)
            record["crayon_number"] = torch.tensor([0, 1, 1], dtype=torch.int32)
        return {"input_ids": tokens, **record}


class MixedRecords(Dataset[dict[str, Tensor]]):
    """Records with and without images, which say so and how long they are."""

    def __init__(self, size: int = 10, *, text_every: int = 0, texts_of_five: int = 0) -> None:
        numbers = np.arange(size)
        self.with_image = numbers % 5 >= texts_of_five
        if text_every:
            self.with_image = numbers % text_every != 0
        self.lengths = 6 + CELLS + numbers % 3  # what they would be: batches are not padded here
        self.kinds = [CollavoRecords("image", size, text_every=every) for every in (1, 0)]

    def __len__(self) -> int:
        return len(self.with_image)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return self.kinds[int(self.with_image[index])][index]

    def file_name(self, index: int) -> str:
        return f"mixed.json: [{index}]"


def collate(records: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Lay images one after another; a record without one has no crayon."""
    names = ("input_ids", "labels", "attention_mask")
    batch = {name: torch.stack([record[name] for record in records]) for name in names}
    pictures = [record["pixel_values"] for record in records if "pixel_values" in record]
    if pictures:
        batch["pixel_values"] = torch.stack(pictures)
        empty = {"crayon_index": (CELLS, -1), "crayon_class": (3, -1), "crayon_number": (3, 0)}
        for name, (count, value) in empty.items():
            none = torch.full((count,), value, dtype=torch.int32)
            batch[name] = torch.stack([record.get(name, none) for record in records])
    return batch
