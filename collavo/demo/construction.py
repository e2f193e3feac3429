"""What a phase of VL-CIT steps must leave as it was, by construction: checked bit for bit."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from collavo.demo.storage import Scenes
from collavo.demo.tuning import same_bits, snapshot
from collavo.model.llava import CollavoForConditionalGeneration
from collavo.processing.processor import CollavoProcessor
from collavo_kernels.nn import DualQLoRALinear


class Before:
    """The model as it was before the vl phase, to be compared with what it is afterwards.

    Args:
        model: After its image phase.
        processor: Its processor.
        scenes: Held-out scenes; the outputs for the first few are kept.
    """

    def __init__(
        self,
        model: CollavoForConditionalGeneration,
        processor: CollavoProcessor,
        scenes: Scenes,
    ) -> None:
        samples = [scenes[i] for i in range(min(8, len(scenes)))]
        prompt = processor.prompt("Describe the image.")
        self.batch = processor(
            [sample.image for sample in samples],
            [prompt] * len(samples),
            [sample.panoptic for sample in samples],
            return_tensors="pt",
            padding=True,
        )
        self.model = model
        self.crayon = snapshot(model.crayon_parameters())
        self.image = snapshot(model.adapter_parameters("image"))
        self.logits = self._logits()
        with only_adapter(model, "image"):
            self.image_logits = self._logits()

    def compare(self) -> dict[str, Any]:
        """Return what the vl phase left as it was; the crayon is trained in it and moves.

        With the crayon of the image phase put back and the vl adapter switched off, the outputs
        must be those of the image phase.
        """
        model = self.model
        facts: dict[str, Any] = {
            "image_adapter_identical": same_bits(self.image, model.adapter_parameters("image")),
            "crayon_moved_in_vl_phase": _largest_change(self.crayon, model),
        }
        with only_adapter(model, "image"):
            moved = self._logits()
        now = snapshot(model.crayon_parameters())
        _restore(model, self.crayon)
        with only_adapter(model, "image"):
            restored = self._logits()
        _restore(model, now)
        facts["image_outputs_restored"] = torch.equal(restored, self.image_logits)
        facts["image_outputs_difference"] = float((restored - self.logits).abs().max())
        facts["image_outputs_difference_with_moved_crayon"] = float(
            (moved - self.logits).abs().max()
        )
        return facts

    @torch.no_grad()
    def _logits(self) -> Tensor:
        self.model.train(False)
        logits: Tensor = self.model(**self.batch).logits
        return logits


@contextmanager
def only_adapter(model: CollavoForConditionalGeneration, name: str) -> Iterator[None]:
    """Switch every adapter but one off, by the adapter mask of each linear layer.

    Args:
        model: A model with adapters.
        name: The adapter that stays on.
    """
    bit = 1 << tuple(model.config.adapters).index(name)

    def mask(_: Any, args: tuple[Tensor, ...], kwargs: dict[str, Any]) -> Any:
        x = args[0]
        kwargs["adapter_mask"] = torch.full(x.shape[:-1], bit, dtype=torch.uint8, device=x.device)
        return args[:1], kwargs

    hooks = [
        module.register_forward_pre_hook(mask, with_kwargs=True)
        for module in model.modules()
        if isinstance(module, DualQLoRALinear)
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def base_state(model: CollavoForConditionalGeneration) -> dict[str, Tensor]:
    """Copy what belongs neither to the crayon nor to an adapter, 4-bit weights as they are stored.

    Args:
        model: With or without adapters.
    """
    own = ("crayon_prompt", "lora_A", "lora_B")
    state = model.state_dict()
    return {n: t.clone() for n, t in state.items() if not any(part in n for part in own)}


def same_state(before: Mapping[str, Tensor], now: Mapping[str, Tensor]) -> bool:
    """Say whether two states are the same, to the last bit.

    Args:
        before: From :func:`base_state`.
        now: The same, later.
    """
    return before.keys() == now.keys() and all(torch.equal(t, now[n]) for n, t in before.items())


def _largest_change(before: list[Tensor], model: CollavoForConditionalGeneration) -> float:
    pairs = zip(before, model.crayon_parameters(), strict=True)
    return max(float((old - new.detach()).abs().max()) for old, new in pairs)


@torch.no_grad()
def _restore(model: CollavoForConditionalGeneration, values: list[Tensor]) -> None:
    for parameter, value in zip(model.crayon_parameters(), values, strict=True):
        parameter.copy_(value)
