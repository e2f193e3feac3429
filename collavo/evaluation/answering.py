"""Let a model answer questions about the images of a data set, in batches."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor
from tqdm.auto import tqdm

from collavo._arguments import expect_like
from collavo.evaluation.questions import ObjectQuestion
from collavo.panoptic.coco import CocoPanopticDataset
from collavo.processing.processor import CollavoProcessor

CrayonUse = Literal["on", "off", "shuffled"]
CRAYON_USES: tuple[CrayonUse, ...] = ("on", "off", "shuffled")

_CRAYON_KEYS = ("crayon_index", "crayon_class", "crayon_number")


def answer_questions(
    model: Any,
    processor: CollavoProcessor,
    samples: CocoPanopticDataset,
    questions: Sequence[ObjectQuestion],
    *,
    crayon: CrayonUse = "on",
    object_text: bool = False,
    suffix: str = "",
    batch_size: int = 64,
    max_new_tokens: int = 8,
    seed: int = 0,
    progress: str | None = None,
) -> list[str]:
    """Return the model's greedy answers, in the order of the questions.

    Args:
        model: A ``CollavoForConditionalGeneration``; its mode (train, eval) is restored.
        processor: The model's processor.
        samples: The images with their panoptic maps.
        questions: What to ask; ``ObjectQuestion.image`` is a position in ``samples``.
        crayon: ``"on"``: the image's own crayon. ``"off"``: none. ``"shuffled"``: the rows of each
            image change places, so the same amount of input tells the wrong objects (a control).
        object_text: Whether the prompt also names the objects, which gives the answers away.
        suffix: Appended to every question, such as a request for a single word.
        batch_size: Questions per batch.
        max_new_tokens: Longest answer.
        seed: Of the shuffled rows.
        progress: Label of a progress bar; None shows none.

    Raises:
        ValueError: if ``crayon`` is unknown.
    """
    if crayon not in CRAYON_USES:
        raise ValueError(f"crayon: expected one of {', '.join(CRAYON_USES)}, got {crayon!r}")
    expect_like("model", model, "a model", has=("generate", "training"))
    expect_like("processor", processor, "a CollavoProcessor", has=("tokenizer", "prompt"))
    expect_like("samples", samples, "a CocoPanopticDataset", has=("panoptic_map", "__len__"))
    answers = [""] * len(questions)
    generator = torch.Generator().manual_seed(seed)
    was_training = model.training
    model.eval()
    bar = tqdm(total=len(questions), desc=progress, disable=progress is None, leave=False)
    try:
        for positions in _batches(questions, batch_size):
            batch = _inputs(
                processor, samples, [questions[i] for i in positions], object_text, suffix
            )
            batch = with_crayon(batch, crayon, generator)
            texts = _generate(model, processor, batch, max_new_tokens)
            for position, text in zip(positions, texts, strict=True):
                answers[position] = text
            bar.update(len(positions))
    finally:
        bar.close()
        model.train(was_training)
    return answers


def with_crayon(
    batch: Mapping[str, Tensor], use: CrayonUse, generator: torch.Generator | None = None
) -> dict[str, Tensor]:
    """Return a batch with its crayon, without it, or with the rows of each sample shuffled.

    Args:
        batch: The model's inputs.
        use: ``"on"``, ``"off"`` or ``"shuffled"``.
        generator: Where the shuffle comes from.
    """
    if use == "off":
        return {key: value for key, value in batch.items() if key not in _CRAYON_KEYS}
    changed = dict(batch)
    if use == "shuffled" and "crayon_class" in changed:
        classes, numbers = changed["crayon_class"].clone(), changed["crayon_number"].clone()
        for sample in range(classes.shape[0]):
            rows = (classes[sample] > 0).nonzero().flatten()
            order = _derangement(len(rows), generator)
            classes[sample, rows] = classes[sample, rows[order]]
            numbers[sample, rows] = numbers[sample, rows[order]]
        changed |= {"crayon_class": classes, "crayon_number": numbers}
    return changed


def _derangement(count: int, generator: torch.Generator | None) -> Tensor:
    """Draw an order in which nothing stays where it was: one random cycle through all."""
    cycle = torch.randperm(count, generator=generator)
    order = torch.empty_like(cycle)
    order[cycle] = cycle.roll(-1)
    return order


def _batches(questions: Sequence[ObjectQuestion], size: int) -> Iterator[list[int]]:
    """Group questions of like length, so that little is padded; the order is fixed."""
    order = sorted(range(len(questions)), key=lambda i: (len(questions[i].text.split()), i))
    for start in range(0, len(order), size):
        yield order[start : start + size]


def _inputs(
    processor: CollavoProcessor,
    samples: CocoPanopticDataset,
    questions: Sequence[ObjectQuestion],
    object_text: bool,
    suffix: str,
) -> dict[str, Tensor]:
    asked = [samples[question.image] for question in questions]
    prompts = [processor.prompt(question.text + suffix) for question in questions]
    batch = processor(
        [sample.image for sample in asked],
        prompts,
        [sample.panoptic for sample in asked],
        object_text=object_text,
        return_tensors="pt",
        padding=True,
        padding_side="left",
    )
    return dict(batch)


@torch.no_grad()
def _generate(
    model: Any, processor: CollavoProcessor, batch: Mapping[str, Tensor], max_new_tokens: int
) -> list[str]:
    inputs = {key: value.to(model.device) for key, value in batch.items()}
    if "pixel_values" in inputs:
        inputs["pixel_values"] = inputs["pixel_values"].to(model.dtype)
    options = {"max_new_tokens": max_new_tokens, "do_sample": False, **processor.stopping()}
    tokens = model.generate(**inputs, **options)
    return [processor.answer(new) for new in tokens[:, inputs["input_ids"].shape[1] :]]
