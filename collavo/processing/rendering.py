"""A conversation filled into a chat template, and where in it the assistant speaks."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from functools import lru_cache
from typing import Any

import collavo._requirements  # noqa: F401  (before what it checks)

from jinja2 import TemplateError
from transformers.utils.chat_template_utils import render_jinja_template

from collavo.processing.chat_templates import WORDS_LEFT_OUT
from collavo.processing.stretches import Conversation

Spans = list[tuple[int, int]]
# Who speaks, and the types of the parts; None where the content is a string.
_Form = tuple[str, tuple[str, ...] | None]
# Words that no template has; digits stay as they are where it trims or changes case.
_PROBE = "90718{:04}{:04}26354"


class FilledTemplate:
    """Fills a chat template.

    Args:
        template: In Jinja's language.
        variables: What it may use beside the messages: the special tokens of a tokenizer.

    Example:
        >>> each = "{{ m['role'] + ': ' + m['content'] + ' ' }}"
        >>> filled = FilledTemplate("{% for m in messages %}" + each + "{% endfor %}", {})
        >>> turns = [{"role": "user", "content": "hot?"}, {"role": "assistant", "content": "no"}]
        >>> text, spans = filled.with_answers(turns, "turns")
        >>> text, [text[start:stop] for start, stop in spans]
        ('user: hot? assistant: no ', ['assistant: no '])
    """

    def __init__(self, template: str, variables: dict[str, Any]) -> None:
        self.template = template
        self.variables = variables

    def text(
        self, conversation: Conversation, where: str, *, add_generation_prompt: bool = False
    ) -> str:
        """Return a conversation's text.

        Args:
            conversation: Chat messages.
            where: What to call them in messages.
            add_generation_prompt: Whether the assistant is to go on.

        Raises:
            ValueError: if the template refuses them or leaves out what one of them says.
        """
        return self._fill(conversation, where, add_generation_prompt=add_generation_prompt)[0]

    def with_answers(
        self, conversation: Conversation, where: str, stops: Collection[str] = ()
    ) -> tuple[str, Spans]:
        """Return a conversation's text, and first and last character of what the assistant says.

        A ``generation`` block of the template says it, the stop token included. Without one, an
        answer is what the text up to the end of its turn has beyond the prompt that the turns
        before it make, but for blanks behind a stop token.

        Args:
            conversation: Chat messages.
            where: What to call them in messages.
            stops: The tokenizer's special tokens.

        Raises:
            ValueError: as ``text``; if the assistant has no turn; or, without a ``generation``
                block, if a prompt of the conversation is not how the whole begins.
        """
        turns = [i for i, one in enumerate(conversation) if one["role"] == "assistant"]
        marked = re.search(r"{%-?\s*generation\s*-?%}", self.template) is not None
        text, spans = self._fill(conversation, where, return_assistant_tokens_mask=marked)
        if not (turns and (spans or not marked)):
            raise ValueError(
                f"{where}: expected an assistant's turn"
                + (" inside the chat template's {% generation %} block" if marked else "")
                + ", got none"
            )
        if marked:
            return text, spans
        blanks = re.compile(rf"(?:{'|'.join(map(re.escape, stops))})(\s+)$") if stops else None
        for turn in turns:
            prompt = self.text(conversation[:turn], where, add_generation_prompt=True)
            until = self.text(conversation[: turn + 1], where)
            if not (text.startswith(until) and until.startswith(prompt)):
                raise ValueError(
                    f"{where}: expected a chat template that only adds text with each turn, since "
                    "it has no {% generation %} block, but what it makes of the turns before turn "
                    f"{turn} is not how it begins the whole; put the assistant's words into a "
                    "{% generation %} block"
                )
            found = blanks.search(until, len(prompt)) if blanks else None
            spans.append((len(prompt), found.start(1) if found else len(until)))
        return text, spans

    def _fill(self, conversation: Conversation, where: str, **options: bool) -> tuple[str, Spans]:
        lost = self._never_taken(conversation)
        if lost is not None:  # a template that reads parts finds none in a string, without a word
            conversation = _in_parts(conversation)
            lost = self._never_taken(conversation)
        text, spans = self._fill_once(conversation, where, options)
        lost = self._lost_words(conversation, text) if lost is None else lost
        if lost is not None:
            raise ValueError(
                f"{where}: expected a chat template that takes what every turn says, but it leaves "
                f"out the words of turn {lost}"
            )
        return text, spans

    def _never_taken(self, conversation: Conversation) -> int | None:
        """Return the first turn that the template leaves out, whatever it says.

        Its words alone do not tell: a short answer may stand in what somebody else says.
        """
        variables = tuple(sorted((name, str(value)) for name, value in self.variables.items()))
        return _never_taken(self.template, variables, tuple(map(_form, conversation)))

    def _fill_once(
        self, conversation: Conversation, where: str, options: dict[str, bool]
    ) -> tuple[str, Spans]:
        render: Any = render_jinja_template  # its annotations are narrower than what it does
        try:
            prompts, spans = render(
                conversations=[list(conversation)],
                chat_template=self.template,
                **options,
                **self.variables,
            )
        except (TemplateError, TypeError) as error:
            raise ValueError(f"{where}: the chat template does not take it ({error})") from error
        return prompts[0], list(spans[0]) if spans else []

    def _lost_words(self, conversation: Conversation, text: str) -> int | None:
        """Return the first turn whose words a text lacks; a system prompt may be left out."""
        unchecked = ("system", "user") if WORDS_LEFT_OUT in self.template else ("system",)
        for turn, message in enumerate(conversation):
            if message["role"] in unchecked:
                continue
            content = message["content"]
            parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
            words = (part["text"].strip() for part in parts if part.get("type") == "text")
            if any(one not in text for one in words):
                return turn
        return None


def _in_parts(conversation: Conversation) -> Conversation:
    return [
        {**message, "content": [{"type": "text", "text": message["content"]}]}
        if isinstance(message["content"], str)
        else message
        for message in conversation
    ]


def _form(message: Mapping[str, Any]) -> _Form:
    content = message["content"]
    parts = None if isinstance(content, str) else tuple(str(part.get("type")) for part in content)
    return message["role"], parts


@lru_cache(maxsize=512)
def _never_taken(
    template: str, variables: tuple[tuple[str, str], ...], forms: tuple[_Form, ...]
) -> int | None:
    filled = FilledTemplate(template, dict(variables))
    conversation: list[dict[str, Any]] = []
    for turn, (role, kinds) in enumerate(forms):
        content: Any = _PROBE.format(turn, 0)
        if kinds is not None:
            content = [
                {"type": kind, "text": _PROBE.format(turn, part)} for part, kind in enumerate(kinds)
            ]
        conversation.append({"role": role, "content": content})
    try:
        text, _ = filled._fill_once(conversation, "template", {})
    except ValueError:  # what it refuses is said of the conversation itself
        return None
    return filled._lost_words(conversation, text)
