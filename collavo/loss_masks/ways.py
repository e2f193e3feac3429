"""Four common ways of making labels, and what each of them gets wrong."""

from __future__ import annotations

import re
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass

from collavo.loss_masks.alignment import (
    NONE_WRONG,
    Alignment,
    Folded,
    Wrong,
    count_wrong,
    first_wrong,
    fold,
)
from collavo.loss_masks.answers import ANSWER, FREE, OTHERS, Truth
from collavo.loss_masks.processors import PromptSource, Sizes, reason
from collavo.processing.stretches import Conversation

OURS, GENERATION, LAST, COPY = "ours", "generation", "last", "copy"
WAYS = {
    OURS: "answers and stop tokens (collavo)",
    GENERATION: "{% generation %} mask (transformers)",
    LAST: "everything after the last {asks}",
    COPY: "copy of input_ids",
}
"""Ways of making labels, and what reports call them."""


@dataclass(frozen=True)
class Result:
    """What one way makes of one conversation.

    Args:
        wrong: How many tokens it gets wrong.
        first: Its first wrong tokens, and whether they have labels too many; None if none is.
        refused: Why it cannot be done; then nothing is counted.
    """

    wrong: Wrong = NONE_WRONG
    first: tuple[list[int], bool] | None = None
    refused: str = ""


@dataclass(frozen=True)
class Case:
    """One conversation, to be labelled in every way.

    Args:
        conversation: Chat messages, with a part for each image.
        text: What the template makes of it.
        sizes: Height and width of its images.
        truth: What is to be learned.
        labelled: The tokens and labels of training with this package.
    """

    conversation: Conversation
    text: str
    sizes: Sizes
    truth: Truth
    labelled: Folded


def compare_ways(source: PromptSource, case: Case, asks: str) -> dict[str, Result]:
    """Label a conversation in all four ways and count what is wrong.

    Args:
        source: Makes the prompts.
        case: The conversation.
        asks: What asks the assistant for an answer, such as ``"ASSISTANT:"``.
    """
    truth = case.truth
    own = Alignment(truth.ids, case.labelled.ids, source.reader.is_blank)
    results = {OURS: _judge(source, case.labelled, own.carry(truth.kinds))}
    marked = re.search(r"{%-?\s*generation\s*-?%}", source.template) is not None
    refused = "" if marked else "the chat template has no {% generation %} block"
    labelled: tuple[list[int], list[int]] | None = None
    made: Folded | None
    try:
        labelled = source.as_transformers(case.conversation, case.text, case.sizes, mask=marked)
    except Exception as error:  # whatever another package's class raises is what is to be said
        refused = refused or reason(error)
        if marked:
            with suppress(Exception):
                labelled = source.as_transformers(
                    case.conversation, case.text, case.sizes, mask=False
                )
    if labelled is None:  # the other two are rules about any tokens
        made = None
        whole = case.labelled._replace(trained=case.labelled.counts)
    else:
        made = fold(labelled[0], list(map(bool, labelled[1])), source.image_ids)
        whole = made._replace(trained=made.counts)
    beside = own
    if whole.ids != case.labelled.ids:
        beside = Alignment(truth.ids, whole.ids, source.reader.is_blank)
    kinds = beside.carry(truth.kinds)
    results[GENERATION] = (
        Result(refused=refused) if refused or made is None else _judge(source, made, kinds)
    )
    after = _after_last(source, truth, beside, whole, asks)
    results[LAST] = (
        Result(refused="the chat template adds nothing that asks for an answer")
        if after is None
        else _judge(source, after, kinds)
    )
    results[COPY] = _judge(source, whole, kinds)
    return results


def _judge(source: PromptSource, labelled: Folded, kinds: Sequence[int]) -> Result:
    wrong = count_wrong(labelled, kinds, source.image_ids)
    return Result(wrong, first_wrong(labelled, kinds) if wrong.too_many or wrong.too_few else None)


def _after_last(
    source: PromptSource, truth: Truth, beside: Alignment, whole: Folded, asks: str
) -> Folded | None:
    """Label what follows the last words that ask for an answer, wherever these stand."""
    cut = truth.text.rfind(asks) + len(asks) if asks and asks in truth.text else 0
    if not cut:
        return None
    first = truth.last
    if cut != truth.answers[-1].start:  # the words stand in an answer
        parts = [(truth.text[:cut], OTHERS), (truth.text[cut:], FREE)]
        ids, _, (_, first) = source.reader.tokens(parts, truth.mark)
        beside = Alignment(ids, whole.ids, source.reader.is_blank)
        values = [OTHERS] * first + [ANSWER] * (len(ids) - first)
    else:
        values = [OTHERS] * first + [ANSWER] * (len(truth.ids) - first)
    pairs = zip(whole.counts, beside.carry(values), strict=True)
    return whole._replace(trained=[0 if label == OTHERS else count for count, label in pairs])
