"""A conversation's tokens and labels: text in stretches whose borders no token straddles.

A token of the whole text may hold the end of a question and the start of its answer (``":▁yes"``,
two line feeds, an accent and its letter), and where a tokenizer says its tokens stand depends on
its normaliser. So nothing here asks for positions. A stretch's tokens are those that the text up to
its end has beyond the text up to its start: what comes before an answer is, token by token, the
prompt that generation would be given. Only where the longer text's tokens do not begin with the
shorter one's is a border forced, and the stretch tokenized as a continuation.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, TypeAlias

Encode: TypeAlias = Callable[[list[str]], list[list[int]]]
Conversation: TypeAlias = Sequence[Mapping[str, Any]]

# Code points that Unicode sets aside for a program's own use; they are no text.
_NONCHARACTERS = tuple(chr(point) for point in range(0xFDD0, 0xFDF0))
# What a continuation may follow, of the kind of the character that it follows in truth.
_BLANKS, _LETTERS, _SIGNS = "\n\t ", "aeioqxz01", ".:,;!?)]}>\"'-"


@dataclass(frozen=True)
class Piece:
    """A stretch of a prompt.

    Args:
        text: Its characters.
        is_answer: Whether the model has to say them.
        inside_tag: Whether its start cuts a control token's name that stands there as text.
        ends_answer: Whether with it a turn of the model's is complete.
    """

    text: str
    is_answer: bool
    inside_tag: bool = False
    ends_answer: bool = False


def cut_tags(conversation: Conversation, tags: Iterable[str]) -> tuple[Conversation, str]:
    """Mark where the words of a conversation spell a control token, which they do not mean.

    Args:
        conversation: Chat messages.
        tags: What control tokens and markers look like.

    Returns:
        The messages, with a mark after the first character of every such word; and the mark, or
        the empty text where nothing was to be marked.

    Raises:
        ValueError: if the words hold every character that could mark a place.
    """
    pattern = _spelled(frozenset(tags))
    words = "".join(text for message in conversation for text in _texts(message["content"]))
    if pattern is None or pattern.search(words) is None:
        return conversation, ""
    mark = next((one for one in _NONCHARACTERS if one not in words), None)
    if mark is None:
        raise ValueError("conversation: expected text, got every noncharacter U+FDD0 to U+FDEF")

    def cut(text: str) -> str:
        while pattern.search(text):
            text = pattern.sub(lambda found: f"{found[0][0]}{mark}{found[0][1:]}", text)
        return text

    return [{**m, "content": _with_texts(m["content"], cut, mark)} for m in conversation], mark


@lru_cache(maxsize=16)
def _spelled(tags: frozenset[str]) -> re.Pattern[str] | None:
    names = sorted((tag for tag in tags if len(tag) > 1), key=lambda tag: (-len(tag), tag))
    return re.compile("|".join(map(re.escape, names))) if names else None


def _texts(content: Any) -> Iterator[str]:
    if isinstance(content, str):
        yield content
    else:
        yield from (part["text"] for part in content if part.get("type") == "text")


def _with_texts(content: Any, cut: Callable[[str], str], mark: str) -> Any:
    if isinstance(content, str):
        return cut(content)
    # A template may write the parts one behind the other, so that a word begins in one of them.
    rest = cut("".join(_texts(content)))
    parts = []
    for part in content:
        if part.get("type") == "text":
            words = re.match(rf"(?:{mark}?[^{mark}]){{{len(part['text'])}}}", rest, re.DOTALL)
            part = {**part, "text": words[0] if words else rest}
            rest = rest[len(part["text"]) :]
        parts.append(part)
    return parts


def split_answers(text: str, spans: Sequence[tuple[int, int]], mark: str) -> list[Piece]:
    """Split a filled template into what the model says and what it does not.

    Args:
        text: The whole.
        spans: First and one-past-last character of each thing that it says, in order.
        mark: What ``cut_tags`` put into it; taken out.
    """
    pieces: list[Piece] = []

    def add(part: str, is_answer: bool) -> None:
        parts = part.split(mark) if mark else [part]
        for number, own in enumerate(parts):
            if own:
                ends = is_answer and not any(parts[number + 1 :])
                pieces.append(Piece(own, is_answer, inside_tag=number > 0, ends_answer=ends))

    position = 0
    for start, stop in spans:
        add(text[position:start], False)
        add(text[start:stop], True)
        position = stop
    add(text[position:], False)
    return pieces


def between_images(pieces: Sequence[Piece], image_token: str) -> list[list[Piece]]:
    """Cut a prompt at its images.

    Args:
        pieces: A prompt, in order; answers have no image.
        image_token: The placeholder of an image.

    Returns:
        The pieces before, between and behind the images; one list more than there are images.

    Example:
        >>> [[p.text for p in part] for part in between_images([Piece("a<i>b", False)], "<i>")]
        [['a'], ['b']]
    """
    stretches: list[list[Piece]] = [[]]
    for piece in pieces:
        if piece.is_answer or image_token not in piece.text:
            stretches[-1].append(piece)
            continue
        first, *rest = piece.text.split(image_token)
        if first:
            stretches[-1].append(replace(piece, text=first))
        stretches += [[Piece(part, False)] if part else [] for part in rest]
    return stretches


def place_images(conversation: Conversation, count: int) -> list[dict[str, Any]]:
    """Put images into the first user turn, unless the turns have their own.

    A conversation that nobody but the model speaks in has them in its first turn.

    Args:
        conversation: Chat messages.
        count: How many images there are.
    """
    turns = [dict(turn) for turn in conversation]
    own = any(
        part.get("type") == "image"
        for turn in turns
        if not isinstance(turn["content"], str)
        for part in turn["content"]
    )
    if own or not count:
        return turns
    spoken = [turn for turn in turns if turn["role"] != "system"]
    first = next((turn for turn in spoken if turn["role"] == "user"), spoken[0])
    parts = first["content"]
    if isinstance(parts, str):
        parts = [{"type": "text", "text": parts}]
    first["content"] = [{"type": "image"}] * count + list(parts)
    return turns


def encode_pieces(
    pieces: Sequence[Piece],
    encode: Encode,
    unknown: int | None = None,
    isolated: Mapping[int, str] | None = None,
) -> list[list[int]]:
    """Return the token ids of each piece; none has a character of another piece in it.

    Args:
        pieces: A prompt, in order.
        encode: Tokenizes texts, each by itself, without the special tokens around them.
        unknown: The tokenizer's unknown token, which may take in what follows.
        isolated: Texts of tokens that are found before all else, such as stop tokens: what follows
            one does not depend on what it follows, so that a long conversation is not read again
            and again.

    Example:
        >>> def encode(texts):  # a character a token, but for two pairs
        ...     words = [re.findall(":y|ab|.", text) for text in texts]
        ...     return [[sum(map(ord, word)) for word in line] for line in words]
        >>> encode_pieces([Piece("q:", False), Piece("yes", True)], encode)
        [[113, 58], [121, 101, 115]]
        >>> encode(["q:yes"])
        [[113, 179, 101, 115]]
    """
    ids: list[list[int]] = []
    start, before = "", list[int]()
    for piece in pieces:
        whole = encode([start + piece.text])[0]
        own = whole[len(before) :]
        if start and (
            piece.inside_tag
            or whole[: len(before)] != before
            or (not own and piece.text.strip())
            or before[-1:] == [unknown]
            or _drops_end(start, encode)
        ):
            own = _continuation(start, piece.text, encode, unknown)
        ids.append(own)
        start, before = start + piece.text, whole
        stop = isolated.get(whole[-1]) if whole and isolated else None
        if stop and piece.text.endswith(stop) and encode([stop])[0] == whole[-1:]:
            start, before = stop, whole[-1:]
    return ids


def _drops_end(text: str, encode: Encode) -> bool:
    """Say whether blanks that end a text have no token; those before another word may have one."""
    blanks = text[len(text.rstrip()) :]
    if not blanks:
        return False
    letter, both = encode([_LETTERS[0], _LETTERS[0] + blanks])
    return letter == both


def _continuation(before: str, text: str, encode: Encode, unknown: int | None) -> list[int]:
    """Tokenize a text as it would follow another, none of whose characters it shares a token with.

    By itself a text may get what only a beginning gets (a blank, no ``##``), so it is tokenized
    behind a character of the same kind as the one before it, the first that stays by itself.
    """
    for anchor in _anchors(before[-1:]):
        start, both = encode([anchor, anchor + text])
        own = both[len(start) :]
        if both[: len(start)] == start and start[-1:] != [unknown] and (own or not text.strip()):
            return own
    return encode([text])[0]


def _anchors(last: str) -> str:
    kinds = [_SIGNS, _LETTERS, _BLANKS]
    own = _BLANKS if last.isspace() else _LETTERS if last.isalnum() else _SIGNS
    kinds.sort(key=lambda kind: kind != own)
    return last + "".join(kinds)
