"""A tiny model that is built as the original LLaVA is: it merges its images by itself.

Written from the signatures alone: ``prepare_inputs_labels_for_multimodal`` takes and returns what
LLaVA's does, ``forward`` and ``generate`` take ``images``.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, LlamaModel

IMAGE, IGNORED = -200, -100
HIDDEN, PATCHES, SIDE = 32, 4, 4
SIZES: dict[str, Any] = {
    "vocab_size": 24,
    "hidden_size": HIDDEN,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
    "eos_token_id": None,
}


class Tower(nn.Module):
    """Pictures ``[N, 3, 4, 4]`` to ``[N, 4, 16]``; its attention has a decoder's names."""

    num_patches_per_side = 2

    def __init__(self) -> None:
        super().__init__()
        self.patch = nn.Conv2d(3, 16, kernel_size=2, stride=2)
        layer = nn.Module()
        layer.self_attn = nn.ModuleDict({f"{n}_proj": nn.Linear(16, 16) for n in "qkv"})
        self.layers = nn.ModuleList([layer])

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        x = self.patch(images).flatten(2).transpose(1, 2)
        for layer in self.layers:
            x = x + sum(part(x) for part in layer.self_attn.values())
        return x


class StandInModel(LlamaModel):
    def __init__(self, config: LlamaConfig) -> None:
        super().__init__(config)
        self.vision_tower = Tower()
        self.mm_projector = nn.Linear(16, config.hidden_size)
        self.image_newline = nn.Parameter(torch.randn(config.hidden_size))


class StandIn(LlamaForCausalLM):
    """Images are ``[N, 3, 4, 4]``, or a list: more than one picture of an image are its crops."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__(config)
        self.model = StandInModel(config)
        self.post_init()

    def get_vision_tower(self) -> Tower:
        return self.model.vision_tower

    def features(self, images: Any) -> list[Tensor]:
        merged = []
        for image in images:
            crops = self.model.mm_projector(self.model.vision_tower(image.view(-1, 3, SIDE, SIDE)))
            if len(crops) == 1:
                merged.append(crops[0])
            else:  # the whole picture, then each crop and a newline
                newline = self.model.image_newline[None]
                parts = [torch.cat([crop, newline]) for crop in crops[1:]]
                merged.append(torch.cat([crops[0], *parts]))
        return merged

    def prepare_inputs_labels_for_multimodal(
        self, input_ids, position_ids, attention_mask, past_key_values, labels, images,
        image_sizes=None,
    ):  # fmt: skip
        if images is None or input_ids.shape[1] == 1:
            return input_ids, position_ids, attention_mask, past_key_values, None, labels
        found, taken, lines = self.features(images), 0, []
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        known = torch.full_like(input_ids, IGNORED) if labels is None else labels
        for ids, names, valid in zip(input_ids, known, mask.bool(), strict=True):
            parts: list[tuple[Tensor, Tensor]] = []
            for token, name in zip(ids[valid], names[valid], strict=True):
                if token == IMAGE:
                    ignored = torch.full((len(found[taken]),), IGNORED)
                    parts.append((found[taken], ignored))
                    taken += 1
                else:
                    parts.append((self.model.embed_tokens(token[None]), name[None]))
            taken += int(not (ids[valid] == IMAGE).any())  # a picture that is not shown
            longest = getattr(self.config, "tokenizer_model_max_length", None)
            lines.append([torch.cat(each)[:longest] for each in zip(*parts, strict=True)])
        length = max(len(x) for x, _ in lines)
        embeds = torch.zeros(len(lines), length, self.config.hidden_size, dtype=lines[0][0].dtype)
        merged_labels = torch.full((len(lines), length), IGNORED)
        merged_mask = torch.zeros(len(lines), length, dtype=mask.dtype)
        left = getattr(self.config, "tokenizer_padding_side", "right") == "left"
        for i, (x, names) in enumerate(lines):
            places = slice(length - len(x), length) if left else slice(len(x))
            embeds[i, places], merged_labels[i, places], merged_mask[i, places] = x, names, 1
        return (
            None,
            position_ids,
            None if attention_mask is None else merged_mask,
            past_key_values,
            embeds,
            None if labels is None else merged_labels,
        )

    def forward(
        self, input_ids=None, attention_mask=None, position_ids=None, past_key_values=None,
        inputs_embeds=None, labels=None, images=None, image_sizes=None, **kwargs,
    ):  # fmt: skip
        if inputs_embeds is None:
            prepared = self.prepare_inputs_labels_for_multimodal(
                input_ids, position_ids, attention_mask, past_key_values, labels, images
            )
            input_ids, position_ids, attention_mask, past_key_values, inputs_embeds, labels = (
                prepared
            )
        return super().forward(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            labels=labels,
            **kwargs,
        )

    @torch.no_grad()
    def generate(self, inputs=None, images=None, image_sizes=None, **kwargs):
        prepared = self.prepare_inputs_labels_for_multimodal(
            inputs, None, kwargs.pop("attention_mask", None), None, None, images
        )
        return super().generate(attention_mask=prepared[2], inputs_embeds=prepared[4], **kwargs)


def stand_in(dtype: torch.dtype = torch.float32) -> StandIn:
    """Return a model of two layers with weights large enough that no two logits are alike."""
    torch.manual_seed(3)
    config = LlamaConfig(**SIZES, attention_bias=True)
    model = StandIn(config)
    for parameter in model.parameters():
        parameter.data.add_(torch.randn_like(parameter), alpha=0.15)
    return model.to(dtype).eval()
