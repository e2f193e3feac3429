"""Ways of making labels: what each gets wrong is known here token by token."""

from __future__ import annotations

import re
from typing import Any

import pytest
from conversations import (
    MARKED_CHATML,
    ONE_TURN,
    PLAIN_CHATML,
    TWO_TURNS,
    characters,
    composing,
    records,
    turns,
)

from collavo.loss_masks import inspect_labels
from collavo.loss_masks.alignment import Alignment, count_wrong, first_wrong, fold
from collavo.loss_masks.answers import ANSWER, FREE, OTHERS, AnswerFinder
from collavo.processing import CHAT_TEMPLATES
from collavo.processing.rendering import FilledTemplate
from tests.collavo.processing import tiny_llavas
from tests.collavo.tiny import tiny_processor

# Characters of the prompt that are tokens, the names of control tokens being one each.
PROMPT = re.compile(r"<\|im_\w+\|>|[\s\S]")


def length(text: str) -> int:
    return len(PROMPT.findall(text))


def test_counts_of_a_conversation_of_two_questions() -> None:
    """A character is a token, so every number can be counted by hand."""
    report = inspect_labels(characters(), records(TWO_TURNS), template=MARKED_CHATML)
    whole = "".join(
        f"<|im_start|>{role}\n{words}<|im_end|>\n"
        for role, words in zip(("user", "assistant") * 2, TWO_TURNS, strict=True)
    )
    targets = len("a horse") + 1 + len("yes, red") + 1
    assert report.targets == targets
    ways = report.ways
    assert ways["ours"].wrong == ways["generation"].wrong == (length(whole), 0, 0, 0)
    assert ways["last"].wrong == (length(whole), 0, len("a horse") + 1, 0)
    # The first token has no loss, and the line breaks behind stop tokens are nobody's.
    assert ways["copy"].wrong == (length(whole), length(whole) - targets - 1 - 2, 0, 0)
    assert ways["last"].example == ("leaves out 'a horse<|im_end|>'", "records[0]")
    assert ways["copy"].conversations == ways["last"].conversations == 1


def test_a_conversation_of_one_question_is_right_after_the_last() -> None:
    report = inspect_labels(characters(), records(ONE_TURN), template=MARKED_CHATML)
    assert report.ways["last"].wrong.too_few == 0
    assert report.asks == "<|im_start|>assistant\n"


def test_words_that_ask_in_an_answer_move_the_last() -> None:
    """What stands before them in the answer is not learned."""
    texts = records(("Who?", "it says USER: and ASSISTANT: then no"))
    report = inspect_labels(characters(), texts, template=CHAT_TEMPLATES["v1"])
    assert report.passed, report.failures
    lost = len(" it says USER: and ASSISTANT:") - 1  # the first blank is nobody's
    assert report.ways["last"].wrong[1:] == (0, lost, 0)


def test_what_cannot_be_done_is_said_and_not_counted() -> None:
    report = inspect_labels(characters(), records(TWO_TURNS), template=PLAIN_CHATML)
    way = report.ways["generation"]
    assert (way.refused, way.wrong) == (1, (0, 0, 0, 0))
    assert way.reason == "the chat template has no {% generation %} block"


def test_what_transformers_refuses_is_said() -> None:
    """A placeholder in words, without a picture, is an error there and text here."""
    texts = records(("What is <image>?", "a horse"))
    processor = tiny_llavas.llava()
    processor.chat_template = CHAT_TEMPLATES["v1"]
    report = inspect_labels(processor, texts)
    assert report.passed, report.failures
    way = report.ways["generation"]
    assert way.refused == 1
    assert "<image>" in way.reason
    assert report.ways["copy"].refused == 0  # of any tokens


def test_the_mask_of_transformers_is_theirs(monkeypatch: pytest.MonkeyPatch) -> None:
    """The numbers follow the mask that transformers gives, whatever that is."""
    tokenizer = characters()
    apply = type(tokenizer).apply_chat_template

    def shifted(self: Any, *args: Any, **kwargs: Any) -> Any:
        made = apply(self, *args, **kwargs)
        if kwargs.get("return_assistant_tokens_mask"):
            made["assistant_masks"] = [0, *made["assistant_masks"][:-1]]
        return made

    monkeypatch.setattr(type(tokenizer), "apply_chat_template", shifted)
    report = inspect_labels(tokenizer, records(TWO_TURNS), template=MARKED_CHATML)
    assert report.passed
    # At each answer one too few, and none too many: a line break follows both stop tokens.
    assert report.ways["generation"].wrong[1:] == (0, 2, 0)


@pytest.mark.parametrize("template", ["v1", "mpt", "llama_2", "demo"])
def test_the_mask_of_transformers_of_a_llava(template: str) -> None:
    """Its processor's own mask, pictures expanded, agrees under every kind of template."""
    processor = tiny_llavas.llava()
    processor.chat_template = CHAT_TEMPLATES[template].replace("<objects>", "")
    report = inspect_labels(processor, records(TWO_TURNS, image=True) + records(ONE_TURN))
    assert report.passed, report.failures
    assert report.ways["generation"].refused == 0
    assert report.ways["generation"].wrong[1:] == (0, 0, 0)


def test_tokens_across_a_border_are_not_counted_for_or_against() -> None:
    """A whole text's token ``:y`` holds the prompt's end and the answer's start."""
    straddling = (
        "{% for m in messages %}{{ m['role'] + ':' }}{% if m['role'] == 'assistant' %}"
        "{% generation %}{{ m['content'] + eos_token }}{% endgeneration %}"
        "{% else %}{{ m['content'] }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}assistant:{% endif %}"
    )
    texts = records(("Is it?", "yes"))
    report = inspect_labels(characters(":y"), texts, template=straddling)
    assert report.passed, report.failures
    assert report.targets == len("yes") + 1
    assert report.ways["generation"].wrong[1:] == (0, 0, 0)
    assert report.ways["copy"].wrong.too_many == len("user:Is it?assistant") - 1


def test_an_accent_that_composes_with_the_prompt() -> None:
    """The answer starts with an accent, and the whole text's token is the letter's before it."""
    template = MARKED_CHATML.replace("assistant\n", "e")
    report = inspect_labels(composing(), records(("Is it?", "\u0301 yes")), template=template)
    assert report.passed, report.failures


def test_a_start_token_stands_once_and_is_not_counted() -> None:
    """A tokenizer's start token is there where a processor puts it, and has no loss."""
    processor = tiny_processor()
    report = inspect_labels(processor, records(ONE_TURN, image=True))
    copy = report.ways["copy"].wrong
    assert copy.tokens - copy.too_many == report.targets + 1


def test_folding_keeps_every_label() -> None:
    folded = fold([7, 7, 5, 7, 7, 7, 6], [True, False, True, False, True, True, False], {7})
    assert folded == ([7, 5, 7, 6], [2, 1, 3, 1], [1, 1, 2, 0])
    assert fold([], [], {7}) == ([], [], [])
    wrong = count_wrong(folded, [OTHERS, ANSWER, OTHERS, ANSWER], {7})
    # The first of all has no loss.
    assert wrong == (7, 2, 1, 2)
    assert first_wrong(folded, [OTHERS, ANSWER, OTHERS, ANSWER]) == ([7], True)
    assert first_wrong(folded, [FREE] * 4) is None


@pytest.mark.parametrize(
    ("known", "values", "others", "carried"),
    [
        ([1, 2], [OTHERS, ANSWER], [1, 2], [OTHERS, ANSWER]),
        ([1, 2], [OTHERS, ANSWER], [9, 1, 2], [OTHERS, OTHERS, ANSWER]),
        ([1, 2], [OTHERS, ANSWER], [1, 2, 9], [OTHERS, ANSWER, FREE]),
        ([1, 2, 3], [OTHERS, ANSWER, ANSWER], [1, 2, 9, 3], [OTHERS, ANSWER, ANSWER, ANSWER]),
        ([1, 2, 3], [OTHERS, ANSWER, OTHERS], [1, 2, 9, 3], [OTHERS, ANSWER, FREE, OTHERS]),
        ([1, 2, 3], [OTHERS, OTHERS, ANSWER], [1, 8, 3], [OTHERS, OTHERS, ANSWER]),
        ([1, 2, 3], [OTHERS, OTHERS, ANSWER], [1, 8], [OTHERS, FREE]),
        ([1, 2, 3], [OTHERS, ANSWER, ANSWER], [1, 0, 3], [OTHERS, FREE, ANSWER]),
        ([1, 2, 3], [OTHERS, ANSWER, ANSWER], [1], [OTHERS]),
    ],
)
def test_alignment(
    known: list[int], values: list[int], others: list[int], carried: list[int]
) -> None:
    assert Alignment(known, others, lambda token: token == 0).carry(values) == carried


@pytest.mark.parametrize("last", ["no", "", " ", "USER: no</s>", "\ufdef no", "no" * 500])
def test_answers_are_found_by_what_stands_around_them(last: str) -> None:
    filled = FilledTemplate(CHAT_TEMPLATES["v1"], {"eos_token": "</s>"})
    conversation = turns("Is it? no", "no", "no", last)
    text, answers = AnswerFinder(filled).find(conversation, "turns")
    assert [text[one.words : one.end] for one in answers] == ["no</s>", f"{last}</s>"]
    assert [text[one.start : one.words] for one in answers] == [" ", " "]
    assert answers[-1].rest == len(text)
