"""What the assistant says, in chat templates with a ``generation`` block and without one."""

from __future__ import annotations

import re
from typing import Any

import pytest

from collavo.processing.chat_templates import CHAT_TEMPLATES
from collavo.processing.rendering import FilledTemplate

TURNS = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Is there a horse?"},
    {"role": "assistant", "content": "yes"},
    {"role": "user", "content": "Sure?"},
    {"role": "assistant", "content": " no, a  cow "},
]
STOP = "<|im_end|>"
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def said(template: str, turns: Any = TURNS, **variables: str) -> list[str]:
    text, spans = FilledTemplate(template, variables).with_answers(turns, "turns", [STOP, "</s>"])
    return [text[start:stop] for start, stop in spans]


# Without the block nobody knows that plain keeps a line break, or that v0 stops at ``###``.
@pytest.mark.parametrize("name", sorted(set(CHAT_TEMPLATES) - {"plain", "v0", "v0_mmtag"}))
def test_answers_are_those_of_the_generation_block(name: str) -> None:
    """The project's own templates with their blocks taken out say the same."""
    marked = CHAT_TEMPLATES[name]
    plain = re.sub(r"{%- (end)?generation -%}", "", marked)
    assert plain != marked
    stops = ["[UNUSED_TOKEN_145]", "</s>", STOP]
    texts = [
        FilledTemplate(one, {"eos_token": "</s>"}).with_answers(TURNS, "turns", stops)
        for one in (marked, plain)
    ]
    assert texts[0] == texts[1] and len(texts[0][1]) == 2


def test_an_answer_ends_with_its_stop_token() -> None:
    """The line feed behind it is the template's: the model is never to say it."""
    assert said(CHATML) == [f"yes{STOP}", f" no, a  cow {STOP}"]


def test_blanks_that_no_stop_token_precedes_belong_to_the_answer() -> None:
    template = "{% for m in messages %}{{ m['role'] + ':' + m['content'] + '\n' }}{% endfor %}"
    template += "{% if add_generation_prompt %}{{ 'assistant:' }}{% endif %}"
    assert said(template) == ["yes\n", " no, a  cow \n"]


def test_a_template_that_changes_earlier_turns_is_refused() -> None:
    """As those that take an earlier answer's thoughts out: the mask would lie elsewhere."""
    last = CHATML.replace("m['content']", "(m['content'] if loop.last else m['content'] | upper)")
    last = last.replace("upper", "replace('yes', 'yes, yes')")
    with pytest.raises(
        ValueError, match=r"turns: expected a chat template that only adds.*turn 2 "
    ):
        said(last)


def test_a_prompt_that_an_answer_does_not_follow_is_refused() -> None:
    """As of templates that put a closed thought into the prompt alone."""
    template = CHATML.replace("assistant\n'", "assistant\n<think></think>'")
    with pytest.raises(ValueError, match=r"turn 2 is not how it begins the whole; put"):
        said(template)


PARTS = (
    "{% for m in messages %}{{ m['role'] + ':' }}{% for c in m['content'] "
    "if c['type'] == 'text' %}{{ c['text'] }}{% endfor %}{{ ' ' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant:' }}{% endif %}"
)


def test_a_template_that_reads_parts_gets_parts() -> None:
    """Of a string it finds no part, and would leave the words out without a word."""
    assert said(PARTS) == ["yes ", " no, a  cow  "]


def test_words_that_a_template_leaves_out_are_named() -> None:
    short = PARTS.replace("{{ c['text'] }}", "{{ c['text'] if m['role'] == 'user' }}")
    with pytest.raises(ValueError, match=r"turns: .*leaves out the words of turn 2"):
        said(short)


@pytest.mark.parametrize("template", [CHATML, CHAT_TEMPLATES["demo"]])
def test_a_conversation_without_an_answer_is_named(template: str) -> None:
    with pytest.raises(ValueError, match=r"turns: expected an assistant's turn.*got none"):
        said(template, TURNS[:2], eos_token="</s>")


def test_a_template_that_refuses_a_beginning_is_named() -> None:
    """A conversation that the assistant opens has an empty prompt, which some templates refuse."""
    strict = "{% if not messages %}{{ raise_exception('no turns') }}{% endif %}" + CHATML
    with pytest.raises(ValueError, match=r"turns: the chat template does not take it .no turns"):
        said(strict, [{"role": "assistant", "content": "Hello"}])


MARKED_PARTS = PARTS.replace(
    "{% for c",
    "{% if m['role'] == 'assistant' %}{% generation %}{{ (m['content'] | selectattr('type', "
    "'equalto', 'text') | map(attribute='text') | join) + '#' }}{% endgeneration %}{% else %}"
    "{% for c",
).replace("{% endfor %}{{ ' ' }}", "{% endfor %}{% endif %}{{ ' ' }}")


@pytest.mark.parametrize("answer", ["no", "A", "a", ""])
@pytest.mark.parametrize(("template", "stop"), [(PARTS, " "), (MARKED_PARTS, "#")])
def test_a_short_answer_that_stands_in_the_question_is_not_left_out(
    template: str, stop: str, answer: str
) -> None:
    """Its words are in the text whatever becomes of it: ``assistant:`` has two of these."""
    asked = [{"type": "image"}, {"type": "text", "text": "yes or no? A cat"}]
    turns = [{"role": "user", "content": asked}, {"role": "assistant", "content": answer}]
    assert said(template, turns) == [f"{answer}{stop}"]
    never = PARTS.replace("{{ c['text'] }}", "{{ c['text'] if m['role'] == 'user' }}")
    with pytest.raises(ValueError, match=r"turns: .*leaves out the words of turn 1"):
        said(never, turns)
