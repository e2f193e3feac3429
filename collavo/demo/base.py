"""A short base training that stands in for a pretrained LLaVA: it sees, reads boxes and talks.

Two steps, both without any crayon. First the vision tower and the projector learn to say what
every patch shows, in the language model's own word vectors, and where it lies (what CLIP and
LLaVA's first stage bring). Then projector and language model learn conversations (what LLaVA's
second stage brings); two auxiliary losses on the question's key word make short work of learning
to read boxes, which takes a model of this size thousands of steps otherwise.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm.auto import trange

from collavo.demo.conversations import Talks, base_talk
from collavo.demo.language import coordinate_of
from collavo.demo.model import GRID, SLOT, patch_waves, waves
from collavo.demo.scenes import STUFF_NAMES, THING_NAMES
from collavo.demo.storage import Scenes
from collavo.demo.tuning import PhaseCollator
from collavo.model.llava import CollavoForConditionalGeneration
from collavo.panoptic import class_index
from collavo.processing.processor import CollavoProcessor
from collavo_kernels import panoptic_lookup

_CONTENT_RMS = 0.15


def set_cosine(optimizer: torch.optim.Optimizer, peak: float, step: int, steps: int) -> None:
    """Set the learning rate of a step: a short warm-up, then half a cosine down to zero.

    Args:
        optimizer: Whose rate is set.
        peak: The largest rate.
        step: 0..steps-1.
        steps: How many there are.
    """
    warm = min(1.0, (step + 1) / 30)
    for group in optimizer.param_groups:
        group["lr"] = peak * warm * 0.5 * (1.0 + math.cos(math.pi * step / steps))


@dataclass(frozen=True)
class Patches:
    """All training images with the class that each patch shows.

    Args:
        pixels: float32 ``[images, 3, H, W]``.
        labels: int64 ``[images, patches]``: position in things, then stuff.
    """

    pixels: Tensor
    labels: Tensor

    @classmethod
    def read(cls, scenes: Scenes, image_processor: Any) -> Patches:
        """Read the scenes and look up their patches with the package's operator.

        Args:
            scenes: The training scenes.
            image_processor: Gives the pixels.
        """
        samples = list(scenes)
        maps = [sample.panoptic for sample in samples]
        crayon = panoptic_lookup(
            [one.segmentation for one in maps],
            [one.segment_ids for one in maps],
            [one.segment_classes for one in maps],
            grid=(GRID, GRID),
        )
        images = [sample.image for sample in samples]
        pixels = image_processor(images=images, return_tensors="pt")["pixel_values"]
        order = torch.zeros(134, dtype=torch.long)
        for position, name in enumerate((*THING_NAMES, *STUFF_NAMES)):
            order[class_index(name) + 1] = position
        classes = crayon.row_class[crayon.row_index.long()]
        return cls(pixels, order[classes.long()])

    def words(self) -> list[str]:
        """Write every image down: what its patches show, a word each, row by row."""
        names = (*THING_NAMES, *STUFF_NAMES)
        return [" ".join(names[index] for index in row) for row in self.labels.tolist()]


def align_vision(
    model: CollavoForConditionalGeneration,
    processor: CollavoProcessor,
    patches: Patches,
    *,
    steps: int,
    seed: int,
    progress: bool = True,
) -> float:
    """Teach tower and projector what and where each patch is; then freeze the tower.

    Args:
        model: Trained in place.
        processor: Its processor.
        patches: What the patches show.
        steps: Optimizer steps of 64 images.
        seed: Of the order of the images.
        progress: Whether to show a bar.

    Returns:
        The share of the last steps' object patches that were named right.
    """
    tower, projector = model.model.vision_tower, model.model.multi_modal_projector
    words = _word_ids(processor, (*THING_NAMES, *STUFF_NAMES))
    embedding: Any = model.get_input_embeddings()
    table = embedding.weight.detach()[words, 2 * SLOT :]
    parameters = [*tower.parameters(), *projector.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=2e-3)
    generator = torch.Generator().manual_seed(seed)
    place = patch_waves()
    right: list[float] = []
    for step in trange(steps, desc="base: vision", disable=not progress, leave=False):
        set_cosine(optimizer, 2e-3, step, steps)
        chosen = torch.randint(len(patches.pixels), (64,), generator=generator)
        labels = patches.labels[chosen]
        seen = tower(patches.pixels[chosen], output_hidden_states=True).hidden_states[-1]
        features = projector(seen[:, 1:])
        content = features[..., 2 * SLOT :]
        logits = F.rms_norm(content, content.shape[-1:]) @ table.T * 2.0
        scale = content.pow(2).mean(-1).sqrt() / _CONTENT_RMS
        where = (features[..., : 2 * SLOT] - place).pow(2).mean() / place.pow(2).mean()
        loss = F.cross_entropy(logits.flatten(0, 1), labels.flatten()) + where
        loss = loss + 0.1 * (scale - 1.0).pow(2).mean()
        optimizer_step(optimizer, loss, parameters)
        things = labels < len(THING_NAMES)
        right.append(float((logits.argmax(-1) == labels)[things].float().mean()))
    tower.requires_grad_(False)
    return sum(right[-20:]) / len(right[-20:])


def train_language(
    model: CollavoForConditionalGeneration,
    processor: CollavoProcessor,
    scenes: Scenes,
    *,
    steps: int,
    seed: int,
    batch_size: int,
    learning_rate: float,
    progress: bool = True,
) -> list[float]:
    """Teach projector and language model to talk about scenes, without any crayon.

    Args:
        model: Trained in place.
        processor: Its processor.
        scenes: The training scenes.
        steps: Optimizer steps.
        seed: Of the order and the draws of the data.
        batch_size: Conversations per step.
        learning_rate: Peak of the cosine.
        progress: Whether to show a bar.

    Returns:
        The language loss, the mean of every ten steps.
    """
    parameters = [
        *model.model.multi_modal_projector.parameters(),
        *(p for n, p in model.model.language_model.named_parameters() if "crayon" not in n),
    ]
    optimizer = torch.optim.AdamW(parameters, lr=learning_rate, weight_decay=0.01)
    helper = KeyWords(processor)
    losses = []
    model.train()
    bar = trange(steps, desc="base: language", disable=not progress, leave=False)
    batches = _batches(processor, scenes, steps, seed, batch_size)
    for step, batch in zip(bar, batches, strict=True):
        set_cosine(optimizer, learning_rate, step, steps)
        labels = batch.pop("labels")
        output = model(**batch, output_hidden_states=True)
        loss = answer_loss(output.logits, labels)
        losses.append(float(loss.detach()))
        auxiliary = helper.loss(model, output.hidden_states, batch["input_ids"], labels)
        optimizer_step(optimizer, loss + auxiliary, parameters)
        bar.set_postfix(loss=f"{losses[-1]:.3f}")
    return [sum(ten) / len(ten) for ten in (losses[i : i + 10] for i in range(0, steps, 10))]


def _batches(
    processor: CollavoProcessor, scenes: Scenes, steps: int, seed: int, size: int
) -> Iterator[dict[str, Tensor]]:
    talks = Talks(scenes, base_talk, seed, rounds=-(-steps * size // len(scenes)))
    order = torch.randperm(len(talks), generator=torch.Generator().manual_seed(seed)).tolist()
    collate = PhaseCollator(processor, crayon=False)
    for step in range(steps):
        yield collate([talks[i] for i in order[step * size : (step + 1) * size]])


def answer_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy in which a short answer counts nearly as much as a long one.

    Every token of an answer of n tokens weighs ``1 / sqrt(n)``: otherwise lists of boxes would
    drown the one word that answers a question.

    Args:
        logits: float ``[B, L, V]``.
        labels: int64 ``[B, L]``, -100 outside of answers.

    Example:
        >>> labels = torch.tensor([[-100, 1, 1, -100, 1]])
        >>> round(float(answer_loss(torch.zeros(1, 5, 4), labels)), 4) == round(math.log(4), 4)
        True
    """
    target = labels[:, 1:]
    spoken = target != -100
    begins = spoken & ~F.pad(spoken, (1, 0))[:, :-1]
    number = begins.flatten().cumsum(0).reshape(spoken.shape)[spoken]
    lengths = torch.bincount(number)[number]
    weights = lengths.to(logits.dtype).rsqrt()
    each = F.cross_entropy(logits[:, :-1][spoken], target[spoken], reduction="none")
    return (each * weights).sum() / weights.sum()


class KeyWords:
    """Auxiliary losses on the key word of a question: the end of its box, or the class it names.

    After the first layer, the end of a box should know the box's centre; after the second, the key
    word should know a one-word answer (read through the model's own head).

    Args:
        processor: Its tokenizer says which tokens are key words.
    """

    def __init__(self, processor: CollavoProcessor) -> None:
        vocabulary = processor.tokenizer.get_vocab()
        self.value = torch.zeros(len(vocabulary))
        self.ends_box = torch.zeros(len(vocabulary), dtype=torch.bool)
        self.is_name = torch.zeros(len(vocabulary), dtype=torch.bool)
        self.is_name[_word_ids(processor, THING_NAMES)] = True
        for token, index in vocabulary.items():
            coordinate = coordinate_of(token)
            if coordinate is not None:
                self.ends_box[index] = coordinate[0] == 3
                self.value[index] = coordinate[1]

    def loss(
        self, model: Any, hidden: tuple[Tensor, ...], tokens: Tensor, labels: Tensor
    ) -> Tensor:
        """Return the sum of both auxiliary losses.

        Args:
            model: Gives the final norm and the head.
            hidden: The hidden states after the embedding and each layer.
            tokens: int64 ``[B, L]``.
            labels: int64 ``[B, L]``.
        """
        asked = labels == -100
        box = self.ends_box[tokens] & asked
        key = (box | self.is_name[tokens]) & asked
        answer = _one_word_answers(labels)
        key = key & (answer >= 0)
        total = hidden[0].new_zeros(())
        if bool(key.any()):
            seen = model.lm_head(model.model.language_model.norm(hidden[2][key]))
            total = total + F.cross_entropy(seen, answer[key])
        sample, end = box.nonzero(as_tuple=True)
        if len(end):
            x1, y1, x2, y2 = (self.value[tokens[sample, end - back]] for back in (3, 2, 1, 0))
            centre = torch.cat([waves((x1 + x2) / 2), waves((y1 + y2) / 2)], dim=-1)
            error = F.mse_loss(hidden[1][sample, end, : 2 * SLOT], centre)
            total = total + error / centre.pow(2).mean()
        return total


def _one_word_answers(labels: Tensor) -> Tensor:
    """Return at every position the next answer's token if it is one word and a stop, else -1."""
    spoken = labels != -100
    begins = spoken & ~F.pad(spoken, (1, 0))[:, :-1]
    length = labels.shape[1]
    position = torch.where(begins, torch.arange(length), length)
    following = position.flip(1).cummin(1).values.flip(1)
    padded = F.pad(labels, (0, 3), value=-100)
    word, stop, after = (padded.gather(1, following + k) for k in range(3))
    single = (word >= 0) & (stop >= 0) & (after == -100)
    return torch.where(single, word, -1)


def _word_ids(processor: CollavoProcessor, names: tuple[str, ...]) -> Tensor:
    ids = processor.tokenizer.convert_tokens_to_ids([f" {name}" for name in names])
    return torch.tensor(ids)


def optimizer_step(
    optimizer: torch.optim.Optimizer, loss: Tensor, parameters: list[torch.nn.Parameter]
) -> None:
    """Take one step along a loss, its gradient's norm cut to 1.

    Args:
        optimizer: Of the parameters.
        loss: With its graph.
        parameters: What is trained.
    """
    optimizer.zero_grad()
    loss.backward()  # type: ignore[no-untyped-call]
    torch.nn.utils.clip_grad_norm_(parameters, 1.0)
    optimizer.step()
