"""Training records: what one is, and what messages call it.

A record is a mapping: ``image`` (an RGB image, a path, a list of them, or None), ``panoptic`` (a
``PanopticMap``, a ``CrayonMap`` or None for each image), ``conversation`` (messages with ``role``
and ``content``) and, optionally, ``object_text`` (whether the prompt names the image's objects) and
``name`` (what messages call it).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

from collavo.panoptic.json_files import flag, shown
from collavo.panoptic.maps import MapInput
from collavo.processing.batch import flatten_images
from collavo.processing.chat_templates import IMAGE_TOKEN

Record: TypeAlias = dict[str, Any]


def record_images(record: Mapping[str, Any]) -> tuple[list[Any], list[MapInput | None]]:
    """Return a record's images and, for each, its map, crayon or None.

    Args:
        record: A training record. An empty path is no image.

    Raises:
        ValueError: if an image or a map is something else, or there are maps and their number is
            another.
    """
    images = _as_list(record.get("image"))
    if len(images) == 1 and isinstance(images[0], str) and not images[0].strip():
        images = []
    for image in images:
        try:
            known = list(flatten_images(image))
        except TypeError:
            known = []
        empty = isinstance(image, str) and not image.strip()
        if len(known) != 1 or isinstance(image, list | tuple) or empty:
            raise ValueError(
                f"'image': expected an RGB image, a path or a list of them, got {shown(image)}"
            )
    maps = _as_list(record.get("panoptic")) or [None] * len(images)
    if len(maps) != len(images):
        raise ValueError(f"panoptic: expected {len(images)} maps for 'image', got {len(maps)}")
    for one in maps:
        if one is not None and not isinstance(one, MapInput):
            raise ValueError(
                f"panoptic: expected a PanopticMap, a CrayonMap or None, got {type(one).__name__}"
            )
    return images, maps


def shown_id(entry: object) -> str | None:
    """Return the id of an entry of a file as messages show it, or None where it has none.

    Args:
        entry: The entry.
    """
    return shown(entry["id"], 60) if isinstance(entry, Mapping) and "id" in entry else None


def place_name(place: str, id_: str | None) -> str:
    """Return what to call an entry of a file in messages: its place, and its id where it has one.

    Args:
        place: Its file and number.
        id_: As ``shown_id`` returns it.

    Example:
        >>> place_name("chat.json: [17]", shown_id({"id": "000000033471", "conversations": []}))
        "chat.json: [17] (id '000000033471')"
    """
    return place if id_ is None else f"{place} (id {id_})"


def record_name(record: object, place: str) -> str:
    """Return what to call a record in messages: its name, or as an entry without one.

    Args:
        record: What is to be a record.
        place: Where it stands.
    """
    name = record.get("name") if isinstance(record, Mapping) else None
    return name if isinstance(name, str) else place_name(place, shown_id(record))


def check_record(record: object, where: str) -> Record:
    """Check a training record's form.

    Args:
        record: What is to be one.
        where: What to call it in messages.

    Returns:
        The record with its name.

    Raises:
        ValueError: naming ``where`` and the key.
    """
    if not isinstance(record, Mapping):
        raise ValueError(f"{where}: expected a mapping, got {type(record).__name__}")
    turns = record.get("conversation")
    if not isinstance(turns, Sequence) or isinstance(turns, str) or not turns:
        raise ValueError(
            f"{where}: expected 'conversation' as a list of messages, got {shown(turns)}"
        )
    messages = [_message(turn, f"{where}: conversation[{i}]") for i, turn in enumerate(turns)]
    if not any(turn["role"] == "assistant" for turn in messages):
        raise ValueError(f"{where}: expected an assistant's turn in 'conversation', got none")
    try:
        images, _ = record_images(record)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error
    _check_places(messages, len(images), where)
    checked = {**record, "conversation": messages, "name": where}
    wanted = checked.pop("object_text", None)
    if wanted is None:
        return checked
    if flag(wanted) is None:
        raise ValueError(f"{where}: expected 'object_text' as true or false, got {shown(wanted)}")
    return {**checked, "object_text": flag(wanted)}


def _message(turn: object, where: str) -> dict[str, Any]:
    role = turn.get("role") if isinstance(turn, Mapping) else None
    if (
        not isinstance(turn, Mapping)
        or role not in ("system", "user", "assistant")
        or "content" not in turn
    ):
        raise ValueError(
            f"{where}: expected 'role' (system, user or assistant) and 'content', got {shown(turn)}"
        )
    content = turn["content"]
    if isinstance(content, str):
        text = whole_text(content, where)
        if text == content and isinstance(turn, dict):
            return turn  # a file has millions
        return {**turn, "content": text}
    parts = content if isinstance(content, list | tuple) else [content]
    return {**turn, "content": [_part(part, where) for part in parts]}


def _part(part: object, where: str) -> dict[str, Any]:
    kind = part.get("type") if isinstance(part, Mapping) else None
    text = part.get("text") if isinstance(part, Mapping) else None
    if isinstance(part, Mapping) and kind == "image":
        return dict(part)
    if isinstance(part, Mapping) and kind == "text" and isinstance(text, str):
        return {**part, "text": whole_text(text, where)}
    raise ValueError(
        f"{where}: expected 'content' as a string, or a list of {{'type': 'image'}} and "
        f"{{'type': 'text', 'text': ...}}, got {shown(part)}"
    )


def whole_text(text: str, where: str) -> str:
    """Return a text whose surrogates, which JSON can hold, are joined in pairs to characters.

    Args:
        text: Any.
        where: What to call it in messages.

    Raises:
        ValueError: naming ``where``, if one is left over, which no tokenizer takes.
    """
    if text.isascii():
        return text
    try:
        return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le")
    except UnicodeDecodeError as error:
        place = error.start // 2
        raise ValueError(
            f"{where}: expected text, got half of a surrogate pair near character {place} of "
            f"{shown(text)}"
        ) from error


def _check_places(messages: Sequence[Mapping[str, Any]], images: int, where: str) -> None:
    places = sum(part["type"] == "image" for turn in messages for part in _parts(turn))
    if places not in (0, images) or (places and not images):
        raise ValueError(
            f"{where}: expected no image part in 'content', or one for each of {images} images in "
            f"'image', got {places}"
        )
    for position, turn in enumerate(messages):
        texts = [turn["content"]] if isinstance(turn["content"], str) else []
        if images and not places and turn["role"] == "user" and any(map(_lone_tags, texts)):
            raise ValueError(
                f"{where}: conversation[{position}]: {IMAGE_TOKEN!r} on a line of its own is text "
                "here, and the record has an image; leave it out (images go first), or write "
                "'content' as a list with {'type': 'image'}"
            )


def _parts(turn: Mapping[str, Any]) -> list[Any]:
    return [] if isinstance(turn["content"], str) else list(turn["content"])


def _lone_tags(text: str) -> int:
    """Count the lines that are an image's placeholder and nothing else."""
    return sum(line.strip() == IMAGE_TOKEN for line in text.splitlines())


def _as_list(value: Any) -> list[Any]:
    if value is None:
        return []
    return list(value) if isinstance(value, list | tuple) else [value]
