"""Where in a filled template the answers stand, told by their words alone.

Labels are made from a template's ``generation`` block, or from how a prompt grows turn by turn. To
check them takes another way: the conversation is filled in once more with each answer replaced by a
character that is no text, and what stands around that character is the template's. What follows the
last answer, blanks at its end left off, is the stop token.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from collavo.processing.rendering import FilledTemplate
from collavo.processing.stretches import Conversation, Piece, encode_pieces, split_answers
from collavo.processing.tokens import TextEncoder

OTHERS, ANSWER, FREE = 0, 1, 2
"""What a token is: no target, a target, or one that nobody has to miss or to have (blanks)."""

# A template has one or two ways of asking; one that copies words there has any number.
_MOST_LEADS = 16
# Code points that Unicode sets aside for a program's own use; they are no text.
_NO_TEXT = tuple(chr(point) for point in range(0xFDEF, 0xFDCF, -1))


@dataclass(frozen=True)
class Answer:
    """Where an answer stands in a text.

    Args:
        start: Where the prompt that asks for it ends.
        words: Where its words start.
        end: Where its stop token ends.
        rest: Where ends what the template has behind that at the end of a conversation; it may be
            learned too.
    """

    start: int
    words: int
    end: int
    rest: int


class AnswerFinder:
    """Finds the answers in what one template makes of conversations.

    Args:
        filled: The template.
        tags: What control tokens look like.

    Example:
        >>> each = "{{ m['role'] + ': ' + m['content'] + ('#' if loop.index0 % 2 else ' ') }}"
        >>> filled = FilledTemplate("{% for m in messages %}" + each + "{% endfor %}", {})
        >>> turns = [{"role": "user", "content": "hot?"}, {"role": "assistant", "content": "no"}]
        >>> text, answers = AnswerFinder(filled).find(turns, "turns")
        >>> text, [text[one.words : one.end] for one in answers]
        ('user: hot? assistant: no#', ['no#'])
    """

    def __init__(self, filled: FilledTemplate, tags: Collection[str] = ()) -> None:
        self.filled = filled
        self.tags = tags
        self._known_stop: str | None = None
        # What asks for an answer, and what stands between that and its words.
        self._known: list[tuple[str, str]] = []

    @property
    def asks(self) -> str:
        """What the template adds where the assistant is to go on, once a conversation was read."""
        return self._known[0][0] if self._known else ""

    def find(self, conversation: Conversation, where: str) -> tuple[str, list[Answer]]:
        """Return a conversation's text and where its answers stand.

        Args:
            conversation: Chat messages.
            where: What to call them in messages.

        Raises:
            ValueError: if the template refuses them, the assistant has no turn, or what the
                template makes of the rest depends on the answers' words.
        """
        turns = [i for i, one in enumerate(conversation) if one["role"] == "assistant"]
        if not turns:
            raise ValueError(f"{where}: expected an assistant's turn, got none")
        text = self.filled.text(conversation, where)
        probe = next((one for one in _NO_TEXT if one not in text), None)
        if probe is None:
            raise ValueError(f"{where}: expected text, got every noncharacter U+FDD0 to U+FDEF")
        probed = [_probed(m, probe) if m["role"] == "assistant" else m for m in conversation]
        between = self.filled.text(probed, where).split(probe)
        places = _places(text, between, [conversation[turn] for turn in turns])
        if places is None:
            raise ValueError(
                f"{where}: expected a chat template that writes each answer once and all else as "
                "it does for any answer; what it makes of these cannot be followed"
            )
        ending = between[-1]
        if turns[-1] + 1 < len(conversation):
            ending = self.filled.text(probed[: turns[-1] + 1], where).split(probe)[-1]
        stop = self._stop(probe) or ending.rstrip() or ending
        answers = []
        for turn, (words, end), behind in zip(turns, places, between[1:], strict=True):
            own = end + (len(stop) if behind.startswith(stop) else 0)
            rest = max(own, end + (len(ending) if behind == ending else 0))
            answers.append(
                Answer(self._start(conversation[:turn], text[:words], where), words, own, rest)
            )
        return text, answers

    def _stop(self, probe: str) -> str:
        """Return what the template has behind every answer, or "" where that does not tell.

        Behind the last one there may be more, such as a token that ends the whole.
        """
        if self._known_stop is None:
            turn = [{"role": "user", "content": "a"}, {"role": "assistant", "content": probe}]
            try:
                _, behind, ending = self.filled.text(turn * 2, "template").split(probe)
            except ValueError:  # it takes no such conversation
                behind = ending = ""
            pairs = enumerate(zip(behind, ending, strict=False))
            most = min(len(behind), len(ending))
            shared = ending[: next((i for i, (one, other) in pairs if one != other), most)]
            # A token of control is there as a whole or not at all.
            cuts = [
                start
                for tag in self.tags
                for start in range(max(0, len(shared) - len(tag) + 1), len(shared))
                if ending.startswith(tag, start) or behind.startswith(tag, start)
            ]
            shared = shared[: min(cuts, default=len(shared))]
            self._known_stop = shared.rstrip() or (shared if not ending.strip() else "")
        return self._known_stop

    def _start(self, turns: Conversation, before: str, where: str) -> int:
        """Return where the prompt ends of an answer whose words follow ``before``."""
        for asks, lead in self._known:
            if before.endswith(asks + lead):
                return len(before) - len(lead)
        try:
            prompt = self.filled.text(turns, where, add_generation_prompt=True)
            asks = prompt[len(self.filled.text(turns, where)) :]
        except ValueError:  # no template has to take a conversation without a turn
            return len(before.rstrip())
        if not before.startswith(prompt):
            return len(before.rstrip())
        asks = asks or _behind_words(turns, prompt)
        if asks and len(self._known) < _MOST_LEADS:
            self._known.append((asks, before[len(prompt) :]))
        return len(prompt)


def _behind_words(turns: Conversation, prompt: str) -> str:
    """Return what a prompt has behind the last words: of some templates it asks for the answer."""
    words = _spellings(turns[-1]["content"])[1] if turns else ""
    place = prompt.rfind(words) if words else -1
    return prompt[place + len(words) :].lstrip() if place >= 0 else ""


def _probed(message: Mapping[str, Any], probe: str) -> dict[str, Any]:
    content = message["content"]
    if isinstance(content, str):
        return {**message, "content": probe}
    others = [part for part in content if part.get("type") != "text"]
    return {**message, "content": [*others, {"type": "text", "text": probe}]}


def _places(
    text: str, between: Sequence[str], messages: Sequence[Mapping[str, Any]]
) -> list[tuple[int, int]] | None:
    """Return where the words of each answer start and end, given what stands around them."""
    if len(between) != len(messages) + 1 or not text.startswith(between[0]):
        return None
    places, position = [], len(between[0])
    for number, (message, behind) in enumerate(zip(messages, between[1:], strict=True)):
        last = number + 1 == len(messages)
        found = -1
        for words in _spellings(message["content"]):
            end = position + len(words)
            whole = text[end:] == behind if last else text.startswith(behind, end)
            if text.startswith(words, position) and whole:
                found = end
                break
        if found < 0:
            found = len(text) - len(behind) if last else text.find(behind, position)
        if found < position or not text.startswith(behind, found):
            return None
        places.append((position, found))
        position = found + len(behind)
    return places


def _spellings(content: Any) -> list[str]:
    """Return what a template may make of an answer's words: blanks at their ends may go."""
    if not isinstance(content, str):
        content = "".join(part["text"] for part in content if part.get("type") == "text")
    return [content, content.strip(), content.lstrip(), content.rstrip()]


@dataclass(frozen=True)
class Reader:
    """How a tokenizer reads text.

    Args:
        encode: The tokenizer without the special tokens around.
        is_blank: Whether a token is nothing but blanks.
    """

    encode: TextEncoder
    is_blank: Callable[[int], bool]

    def tokens(
        self, regions: Sequence[tuple[str, int]], mark: str
    ) -> tuple[list[int], list[int], list[int]]:
        """Return the tokens of a text, what each is, and the place of each region's first.

        Blanks where an answer starts or has ended do no harm, and packages differ in whose they
        are: they are ``FREE``.

        Args:
            regions: The text in parts, each with what it is.
            mark: What ``cut_tags`` put into it; taken out.
        """
        pieces: list[Piece] = []
        sizes = []
        for part, kind in regions:
            made = split_answers(part, [(0, len(part))] if kind == ANSWER else [], mark)
            pieces += made
            sizes.append(len(made))
        each = iter(encode_pieces(pieces, self.encode, self.encode.unknown, self.encode.isolated))
        ids: list[int] = []
        kinds: list[int] = []
        places = []
        for (_, kind), size in zip(regions, sizes, strict=True):
            own = [token for _ in range(size) for token in next(each)]
            blanks = 0
            if (kind == ANSWER) != (kinds[-1:] == [ANSWER]):
                blanks = next((i for i, one in enumerate(own) if not self.is_blank(one)), len(own))
            if kind == ANSWER and blanks == len(own):
                blanks = 0
            places.append(len(ids))
            ids += own
            kinds += [FREE] * blanks + [kind] * (len(own) - blanks)
        return ids, kinds, places


@dataclass(frozen=True)
class Truth:
    """A conversation's text and tokens, an image being one, and what is to be learned of them.

    Args:
        text: The filled template, with the mark.
        mark: What ``cut_tags`` put into it.
        answers: Where the answers stand.
        ids: Token ids, without the special tokens around them.
        kinds: ``OTHERS``, ``ANSWER`` or ``FREE`` for each.
        last: The place of the last answer's first token.
    """

    text: str
    mark: str
    answers: Sequence[Answer]
    ids: Sequence[int]
    kinds: Sequence[int]
    last: int

    def said(self, reader: Reader) -> list[Said]:
        """Return what is said in each answer; answers that touch are one.

        Args:
            reader: Its tokenizer.
        """
        made: list[tuple[str, str]] = []
        end = -1
        for one in self.answers:
            lead, words = self.text[one.start : one.words], self.text[one.words : one.end]
            if made and one.start == end:
                made[-1] = (made[-1][0], made[-1][1] + lead + words)
            elif words:
                made.append((lead, words))
            end = one.end
        rests = [""] * len(made)
        rests[-1:] = [self.text[end : self.answers[-1].rest]]
        ids = [reader.tokens([(words, ANSWER)], self.mark)[0] for _, words in made]
        return [
            Said(self.plain(lead), self.plain(words), rest, own)
            for (lead, words), rest, own in zip(made, rests, ids, strict=False)
        ]

    def plain(self, part: str) -> str:
        """Return a part of the text without the mark.

        Args:
            part: Any.
        """
        return part.replace(self.mark, "") if self.mark else part


@dataclass(frozen=True)
class Said:
    """An answer.

    Args:
        lead: What may stand before its words.
        words: They, with the stop token.
        rest: What may stand behind the last answer.
        ids: The tokens of these alone.
    """

    lead: str
    words: str
    rest: str
    ids: Sequence[int]


def true_tokens(text: str, mark: str, answers: Sequence[Answer], reader: Reader) -> Truth:
    """Return which tokens of a text are to be learned.

    Args:
        text: A filled template.
        mark: What ``cut_tags`` put into it.
        answers: Where its answers stand.
        reader: Its tokenizer.
    """
    regions = []
    position = 0
    for one in answers:
        # A blank belongs to the word behind it.
        own = one.start + len(text[one.start : one.words].rstrip())
        regions += [
            (text[position : one.start], OTHERS),
            (text[one.start : own], FREE),
            (text[own : one.end], ANSWER),
            (text[one.end : one.rest], FREE),
        ]
        position = one.rest
    ids, kinds, places = reader.tokens([*regions, (text[position:], OTHERS)], mark)
    return Truth(text, mark, answers, ids, kinds, places[-3])
