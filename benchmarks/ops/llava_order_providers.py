"""Orders of an epoch: the trainer's own, and a random one, with the same samples and model."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.ops.llava_order_cases import MICRO_BATCHES, MIXES, NAMES, SAMPLES, Mix
from benchmarks.ops.llava_training_providers import Setting, loss
from benchmarks.registry import Call, Row
from collavo.train.grouping import GroupedSchedule, deal

Batches = list[list[int]]


def grouped(mix: Mix) -> Batches:
    """Return the trainer's micro-batches."""
    lengths = mix.lengths()
    sizes = {"image": mix.images, "text": mix.texts}
    schedule = GroupedSchedule(sizes, SAMPLES * MICRO_BATCHES, seed=0, lengths=lengths)
    steps = [schedule.samples(step) for step in range(schedule.steps_per_epoch)]
    dealt = [each for step in steps for each in deal(step, lengths, 1, MICRO_BATCHES)]
    return [each for each in dealt if each]


def in_any_order(mix: Mix) -> Batches:
    """Return micro-batches of a random order, of both kinds."""
    order = np.random.default_rng(1).permutation(mix.images + mix.texts).tolist()
    return [order[start : start + SAMPLES] for start in range(0, len(order), SAMPLES)]


PROVIDERS: dict[str, Callable[[Mix], Batches]] = dict(
    zip(NAMES, (grouped, in_any_order), strict=True)
)


def padded_batch(mix: Mix, samples: list[int], device: torch.device) -> dict[str, Tensor]:
    """Return a micro-batch, padded at the right to its longest sample."""
    lengths, cells = mix.lengths(), mix.model.grid**2
    own = torch.from_numpy(lengths[samples])
    places = torch.arange(int(own.max()))
    mask = places < own[:, None]
    images = torch.tensor(samples) < mix.images
    is_image = images[:, None] & (places < cells)
    tokens = torch.randint(1, mix.model.vocabulary - 1, mask.shape)
    tokens = torch.where(is_image, mix.model.vocabulary - 1, tokens)
    inputs = {
        "input_ids": torch.where(mask, tokens, 0),
        "attention_mask": mask.long(),
        "labels": torch.where(mask & ~is_image, tokens, -100),
    }
    if bool(images.any()):
        side = 4 * mix.model.grid
        pixels = torch.randn(int(images.sum()), 3, side, side)
        inputs["pixel_values"] = pixels.to(torch.bfloat16)
    return {name: value.to(device) for name, value in inputs.items()}


@functools.lru_cache(maxsize=1)
def model_of(mix: Mix, device: torch.device) -> nn.Module:
    """Return the model of both orders: 4 bits and LoRA."""
    return Setting(mix.model, "instruct", device).model("ours")


def epoch(
    model: nn.Module, batches: list[dict[str, Tensor]], device: torch.device
) -> Callable[[], Any]:
    """Return an epoch; its rate is zero, so that every one is the same."""
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=0.0, weight_decay=0.0, fused=True)

    def run() -> None:
        for number, batch in enumerate(batches):
            loss(model, batch, device).backward()
            if number % MICRO_BATCHES:
                optimizer.step()
                optimizer.zero_grad()
        optimizer.zero_grad()

    return run


def prepare(row: Row, device: torch.device) -> Call:
    """Return the row's call; ``padded`` is the share of its tokens that are padding."""
    mix = MIXES[row.case]
    chosen = PROVIDERS[row.provider](mix)
    batches = [padded_batch(mix, samples, device) for samples in chosen]
    tokens = int(mix.lengths().sum())
    places = sum(batch["input_ids"].numel() for batch in batches)
    return Call(
        epoch(model_of(mix, device), batches, device),
        dtype=torch.bfloat16,
        capture=False,
        config={
            "tokens": tokens,
            "padded": round(1 - tokens / places, 4),
            "micro_batches": len(batches),
            "with_image": sum("pixel_values" in batch for batch in batches),
        },
    )
