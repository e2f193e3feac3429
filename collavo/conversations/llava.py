"""Records of LLaVA's format: their turns, where their images stand, and in which order.

A record is ``{"id", "image", "conversations"}``; a turn is ``{"from": "human" | "gpt", "value"}``
or ``{"role": "user" | "assistant", "content"}``. Other keys say nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeAlias, get_args

from collavo.conversations.files import read_entries
from collavo.conversations.records import Record, shown_id, whole_text
from collavo.panoptic.json_files import shown
from collavo.processing.chat_templates import IMAGE_TOKEN

ImageOrder: TypeAlias = Literal["first", "keep", "random"]
IMAGE_ORDERS: tuple[ImageOrder, ...] = get_args(ImageOrder)

_ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "system": "system",
}
_IMAGE = {"type": "image"}
# What a record is called until somebody knows better.
_RECORD = "record"


class LlavaEntry(NamedTuple):
    """An entry of a file in LLaVA's format.

    Attributes:
        number: Its place in the file, from 0.
        id: Its id as messages show it, or None.
        record: What ``read_llava`` made of it, or None.
        fault: Why it made nothing, or the empty text.
    """

    number: int
    id: str | None
    record: Record | None
    fault: str


def read_file(path: Path, on_chunk: Callable[[bytes], object] = len) -> Iterator[LlavaEntry]:
    """Read a file of records in LLaVA's format, entry by entry.

    Args:
        path: As of ``read_entries``.
        on_chunk: As of ``read_entries``.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: naming the file, if it is no list of records.
    """
    for number, entry, fault in read_entries(path, on_chunk):
        record = None
        try:
            record = None if fault else read_llava(entry, _RECORD)
        except ValueError as error:
            fault = str(error).removeprefix(f"{_RECORD}: ")
        yield LlavaEntry(number, shown_id(entry), record, fault)


def read_llava(entry: object, where: str) -> Record:
    """Make a record of one in LLaVA's format, its images at their places.

    In what a human says ``<image>`` is an image's place, if there are as many as images; else those
    that stand on a line of their own are, if these are as many. With no ``<image>`` at all images
    go first in the first question. In a record without an image, in answers, and beside places that
    are parts of a content already, ``<image>`` is text. A first turn of the assistant is dropped,
    and so is a last question without an answer, with its images.

    Args:
        entry: Of the file.
        where: What to call it in messages.

    Returns:
        ``image`` as a list of paths, ``conversation`` (the content of a turn with images is a list
        of parts, texts between them as they are in the file) and ``name``.

    Raises:
        ValueError: naming ``where`` and what is wrong.

    Example:
        >>> turns = [{"from": "human", "value": "Look: <image>"}, {"from": "gpt", "value": "Nice"}]
        >>> made = read_llava({"image": "a.png", "conversations": turns}, "chat.json: [0]")
        >>> made["image"], made["conversation"][0]["content"]
        (['a.png'], [{'type': 'text', 'text': 'Look: '}, {'type': 'image'}])
    """
    turns = entry.get("conversations") if isinstance(entry, Mapping) else None
    if not isinstance(entry, Mapping) or not isinstance(turns, list):
        raise ValueError(
            f"{where}: expected 'conversations' as a list of turns, got {shown(turns)}"
        )
    if entry.get("video"):
        raise ValueError(f"{where}: expected images, got 'video', which is not served")
    images = _images(entry.get("image"), where)
    messages = [_message(turn, f"{where}: conversations[{i}]") for i, turn in enumerate(turns)]
    messages = _answered(_with_places(messages, len(images), where), where)
    left = sum(_count_images(message) for message in messages)
    return {"image": images[:left], "conversation": messages, "name": where}


def order_images(
    conversation: Sequence[Mapping[str, Any]], order: ImageOrder, *, seed: int = 0, number: int = 0
) -> list[dict[str, Any]]:
    """Bring the images of each turn in order.

    A text beside an image loses the blanks at its ends, where the template puts a line break; turns
    without an image stay as they are.

    Args:
        conversation: As :func:`read_llava` makes it.
        order: ``"first"`` puts images before the words of their turn, as LLaVA's code does;
            ``"keep"`` leaves them at their places; ``"random"``, as LLaVA's paper, puts those of
            the first question before or behind its words, and others first.
        seed: Any; what is drawn follows from it and the number alone.
        number: The record's in its file.

    Example:
        >>> text, image = {"type": "text", "text": "What? "}, {"type": "image"}
        >>> turns = [{"role": "user", "content": [text, image]}]
        >>> order_images(turns, "first")[0]["content"]
        [{'type': 'image'}, {'type': 'text', 'text': 'What?'}]
    """
    ordered: list[dict[str, Any]] = []
    behind = order == "random" and _drawn(seed, number) % 2 == 1
    asked = False
    for message in conversation:
        parts = message["content"]
        if isinstance(parts, str):
            ordered.append(dict(message))
        else:
            own = _ordered(parts, order, last=behind and not asked)
            ordered.append({**message, "content": own})
        asked = asked or message["role"] == "user"
    return ordered


def _drawn(seed: int, number: int) -> int:
    """Return a random number, 0..2**63-1."""
    mixed = (seed * 0x9E3779B97F4A7C15 + number * 0xD1B54A32D192ED03 + 0x8CB92BA72F3D8DD7) % 2**64
    for factor in (0xBF58476D1CE4E5B9, 0x94D049BB133111EB):  # as SplitMix64 ends
        mixed = (mixed ^ (mixed >> 30)) * factor % 2**64
    return mixed >> 1


def _ordered(parts: Sequence[Mapping[str, Any]], order: ImageOrder, *, last: bool) -> list[Any]:
    images = [dict(_IMAGE) for part in parts if part["type"] == "image"]
    if order == "keep":
        kept = [dict(_IMAGE) if p["type"] == "image" else _stripped(p["text"]) for p in parts]
        return [part for part in kept if part is not None]
    # Without blanks at both ends of the whole, those inside stay: as LLaVA's code has it.
    words = _stripped("".join(part["text"] for part in parts if part["type"] == "text"))
    texts = [] if words is None else [words]
    return texts + images if last else images + texts


def _stripped(text: str) -> dict[str, Any] | None:
    words = text.strip()
    return {"type": "text", "text": words} if words else None


def _images(value: Any, where: str) -> list[str]:
    images = value if isinstance(value, list) else [value]
    if len(images) == 1 and (images[0] is None or images[0] == ""):
        return []
    for image in images:
        if not isinstance(image, str) or not image.strip():
            raise ValueError(
                f"{where}: 'image': expected a path or a list of paths, got {shown(value)}"
            )
    return [whole_text(image, f"{where}: 'image'") for image in images]


def _message(turn: object, where: str) -> dict[str, Any]:
    """Return a turn's role and its words, or the texts and images that it is given in."""
    content: object = None
    role = None
    for speaker, words in (("from", "value"), ("role", "content")):
        if isinstance(turn, Mapping) and speaker in turn and words in turn and role is None:
            role, content = _ROLES.get(str(turn[speaker])), turn[words]
    if role is None or not isinstance(content, str | list):
        raise ValueError(
            f"{where}: expected 'from' (human or gpt) and 'value' as text, or 'role' (user, "
            f"assistant or system) and 'content', got {shown(turn)}"
        )
    if isinstance(content, str):
        return {"role": role, "content": whole_text(content, where)}
    return {"role": role, "content": _joined([_part(part, role, where) for part in content])}


def _part(part: object, role: str, where: str) -> dict[str, Any]:
    kind = part.get("type") if isinstance(part, Mapping) else None
    text = part.get("text") if isinstance(part, Mapping) else None
    if kind == "image" and role == "user":
        return dict(_IMAGE)
    if kind == "text" and isinstance(text, str):
        return {"type": "text", "text": whole_text(text, where)}
    raise ValueError(
        f"{where}: expected 'content' as text, or a list of {{'type': 'text', 'text': ...}} and, "
        f"in a question, {{'type': 'image'}}, got {shown(part)}"
    )


def _joined(parts: list[dict[str, Any]]) -> str | list[dict[str, Any]]:
    """Join texts by line breaks, those that stay apart too: what templates put between parts."""
    joined: list[dict[str, Any]] = []
    texts = sum(part["type"] == "text" for part in parts)
    for part in parts:
        if part["type"] == "image":
            joined.append(part)
            continue
        texts -= 1
        text = part["text"] + ("\n" if texts else "")
        if joined and joined[-1]["type"] == "text":
            joined[-1]["text"] += text
        else:
            joined.append({"type": "text", "text": text})
    if any(part["type"] == "image" for part in joined):
        return joined
    return "".join(part["text"] for part in joined)


def _with_places(messages: list[dict[str, Any]], images: int, where: str) -> list[dict[str, Any]]:
    asked = [message for message in messages if message["role"] == "user"]
    given = sum(_count_images(message) for message in asked)
    texts = [message["content"] for message in asked if isinstance(message["content"], str)]
    tags = sum(text.count(IMAGE_TOKEN) for text in texts)
    if given == images and (given or not images):
        return messages
    if given or not texts:
        raise ValueError(
            f"{where}: expected {given} images in 'image', one for each image part, got {images}"
        )
    if not tags:
        first = next(message for message in asked if isinstance(message["content"], str))
        words = {"type": "text", "text": first["content"]}
        first["content"] = [dict(_IMAGE) for _ in range(images)] + [words]
        return messages
    lone = sum(line.strip() == IMAGE_TOKEN for text in texts for line in text.splitlines())
    if images not in (tags, lone):
        raise ValueError(
            f"{where}: expected {tags} images in 'image', one for each {IMAGE_TOKEN}, got {images}"
        )
    for message in asked:
        message["content"] = _split(message["content"], every=images == tags)
    return messages


def _split(text: str, *, every: bool) -> str | list[dict[str, Any]]:
    """Cut a question at its places: at every tag, or at those on a line of their own."""
    if every:
        texts = text.split(IMAGE_TOKEN)
    else:
        texts = [""]
        for line in text.splitlines(keepends=True):
            if line.strip() == IMAGE_TOKEN:
                texts.append("")
            else:
                texts[-1] += line
    if len(texts) == 1:
        return text
    parts: list[dict[str, Any]] = []
    for number, own in enumerate(texts):
        parts += [dict(_IMAGE)] if number else []
        parts += [{"type": "text", "text": own}] if own else []
    return parts


def _count_images(message: Mapping[str, Any]) -> int:
    content = message["content"]
    return 0 if isinstance(content, str) else sum(part["type"] == "image" for part in content)


def _answered(messages: list[dict[str, Any]], where: str) -> list[dict[str, Any]]:
    """Return the questions that have an answer, each with it, and the system's words."""
    first = 1 if messages and messages[0]["role"] == "system" else 0
    start = first
    if len(messages) > start and messages[start]["role"] == "assistant":
        start += 1
    turns = messages[start:]
    for number, message in enumerate(turns):
        expected = "user" if number % 2 == 0 else "assistant"
        if message["role"] != expected:
            raise ValueError(
                f"{where}: conversations[{start + number}]: expected the {expected}'s turn, since "
                f"questions and answers alternate, got the {message['role']}'s"
            )
    turns = turns[: len(turns) // 2 * 2]
    if not turns:
        raise ValueError(
            f"{where}: expected a question with an answer in 'conversations', got none"
        )
    return messages[:first] + turns
