"""Makes the two parts anew: ``python -m collavo.demo.llava.pretraining FOLDER``.

What lies in ``parts/`` beside this file was made by it, in bfloat16. The scenes are drawn from a
stream of random numbers of their own, so the demo's scenes are new to both parts.
"""

from __future__ import annotations

import random
import sys
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm.auto import trange
from transformers import CLIPImageProcessor, PreTrainedTokenizerFast

from collavo import writing
from collavo.demo.base import Patches, answer_loss, optimizer_step, set_cosine
from collavo.demo.llava.parts import (
    LANGUAGE,
    VISION,
    make_language_model,
    make_tokenizer,
    make_tower,
)
from collavo.demo.llava.talks import Talker, caption
from collavo.demo.scenes import SIZE, STUFF_NAMES, THING_NAMES, make_scene
from collavo.demo.storage import Scenes, write_scenes
from collavo.model.files import weight_patterns
from collavo.processing.chat_templates import chat_template
from collavo.processing.rendering import FilledTemplate

_STREAM = 1536  # none that a seed of the demo draws its scenes from
_BATCH = 32
Read = tuple[list[int], list[int]]
"""Ids of a text, and its labels."""


class Reader:
    """Turns what there is to read into ids and labels: conversations, and captions by themselves.

    Args:
        talker: Writes scenes down.
        tokenizer: The language model's.
    """

    def __init__(self, talker: Talker, tokenizer: PreTrainedTokenizerFast) -> None:
        self.talker = talker
        self.tokenizer = tokenizer

    def read(self, number: int) -> Read:
        """Return text of a number: three in four are conversations.

        Args:
            number: Any; the scenes come in turn.
        """
        if random.Random(f"{self.talker.seed}/{number}").random() < 0.25:
            return self._caption(number % len(self.talker.views))
        made: Any = self.tokenizer.apply_chat_template(
            messages(self.talker, number),
            chat_template=chat_template("vicuna_v1"),
            return_dict=True,
            return_assistant_tokens_mask=True,
        )
        ids, spoken = made["input_ids"], made["assistant_masks"]
        if ids[0] != self.tokenizer.bos_token_id:
            ids, spoken = [self.tokenizer.bos_token_id, *ids], [0, *spoken]
        return ids, [i if s else -100 for i, s in zip(ids, spoken, strict=True)]

    def _caption(self, scene: int) -> Read:
        head = self.tokenizer(f"{self.talker.words[scene]}\n").input_ids
        text = f"{caption(self.talker.views[scene])}\n"
        tail = self.tokenizer(text, add_special_tokens=False).input_ids
        return head + tail, [-100] * len(head) + tail


def messages(talker: Talker, number: int) -> list[dict[str, str]]:
    """Return a conversation about a scene that is written down, as chat messages.

    Args:
        talker: Writes scenes down.
        number: Of the conversation.
    """
    (record,) = talker.about_words([number])
    roles = {"human": "user", "gpt": "assistant"}
    return [{"role": roles[t["from"]], "content": t["value"]} for t in record["conversations"]]


def padded(read: Sequence[Read]) -> dict[str, Tensor]:
    """Return texts as one batch: ``input_ids``, ``attention_mask`` and ``labels`` int64 ``[B, L]``.

    Args:
        read: Ids and labels of each.
    """
    length = max(len(ids) for ids, _ in read)
    rows = [
        (ids + [0] * (length - len(ids)), [1] * len(ids) + [0] * (length - len(ids)),
         labels + [-100] * (length - len(ids)))
        for ids, labels in read
    ]  # fmt: skip
    names = ("input_ids", "attention_mask", "labels")
    return {
        name: torch.tensor(column)
        for name, column in zip(names, zip(*rows, strict=True), strict=True)
    }


def train_language_model(model: nn.Module, reader: Reader, steps: int, rate: float = 3e-3) -> None:
    """Teach the language model to read scenes that are written down and to talk about them.

    Args:
        model: Trained in place.
        reader: Gives the texts.
        steps: Optimizer steps.
        rate: Peak of the cosine.
    """
    parameters = list(model.parameters())
    optimizer = torch.optim.AdamW(parameters, lr=rate, weight_decay=0.01)
    bar = trange(steps, desc="language model")
    for step in bar:
        set_cosine(optimizer, rate, step, steps)
        batch = padded([reader.read(step * _BATCH + i) for i in range(_BATCH)])
        labels = batch.pop("labels")
        loss = answer_loss(model(**batch).logits, labels)
        optimizer_step(optimizer, loss, parameters)
        bar.set_postfix(loss=f"{float(loss.detach()):.3f}")


def train_tower(tower: Any, patches: Patches, steps: int, rate: float = 2e-3) -> float:
    """Teach the tower what each patch shows, in the layer that a LLaVA reads.

    Args:
        tower: Trained in place.
        patches: What the patches show.
        steps: Optimizer steps of 64 images.
        rate: Peak of the cosine.

    Returns:
        The share of the last steps' object patches that were named right.
    """
    head = nn.Sequential(
        nn.LayerNorm(tower.config.hidden_size, elementwise_affine=False),
        nn.Linear(tower.config.hidden_size, len(THING_NAMES) + len(STUFF_NAMES)),
    )
    parameters = [*tower.parameters(), *head.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=rate)
    right: list[float] = []
    bar = trange(steps, desc="vision tower")
    for step in bar:
        set_cosine(optimizer, rate, step, steps)
        chosen = torch.randint(len(patches.pixels), (64,))
        labels = patches.labels[chosen]
        seen = tower(patches.pixels[chosen], output_hidden_states=True).hidden_states[-2]
        logits = head(seen[:, 1:])
        loss = F.cross_entropy(logits.flatten(0, 1), labels.flatten())
        optimizer_step(optimizer, loss, parameters)
        things = labels < len(THING_NAMES)
        right.append(float((logits.argmax(-1) == labels)[things].float().mean()))
        bar.set_postfix(loss=f"{float(loss.detach()):.3f}", right=f"{right[-1]:.2f}")
    return sum(right[-20:]) / len(right[-20:])


def pretrain(folder: Path, *, scenes: int, language_steps: int, vision_steps: int) -> float:
    """Make both parts and write them as folders of transformers.

    Args:
        folder: Gets ``language`` and ``vision``.
        scenes: How many to learn from.
        language_steps: Of the language model.
        vision_steps: Of the tower.

    Returns:
        The share of object patches that the tower names right.
    """
    images = CLIPImageProcessor(
        size={"shortest_edge": SIZE}, crop_size={"height": SIZE, "width": SIZE}
    )
    torch.manual_seed(0)
    with TemporaryDirectory() as name:
        rng = np.random.default_rng(_STREAM)
        write_scenes(Path(name), (make_scene(rng) for _ in range(scenes)))
        drawn = Scenes(Path(name))
        patches = Patches.read(drawn, images)
        talker = Talker(drawn, patches.words(), seed=0)
    tower = make_tower()
    seen = train_tower(tower, patches, vision_steps)
    filled = FilledTemplate(chat_template("vicuna_v1"), {})
    talks = [messages(talker, number) for number in range(min(scenes, 500))]
    tokenizer = make_tokenizer(filled.text(one, "a talk") for one in talks)
    model = make_language_model(tokenizer)
    train_language_model(model, Reader(talker, tokenizer), language_steps)
    parts: tuple[tuple[str, Any, Any], ...] = (
        (VISION, tower, images),
        (LANGUAGE, model, tokenizer),
    )
    for part, own, companion in parts:
        with writing.written_folder(folder / part, weight_patterns()) as partial:
            own.to(torch.bfloat16).save_pretrained(partial)
            companion.save_pretrained(partial)
    return seen


def main() -> None:
    """Make the parts in the folder that is named."""
    if len(sys.argv) != 2:
        raise SystemExit("expected: python -m collavo.demo.llava.pretraining FOLDER")
    seen = pretrain(Path(sys.argv[1]), scenes=4000, language_steps=450, vision_steps=400)
    print(f"the tower names {seen:.0%} of the objects' patches")


if __name__ == "__main__":
    main()
