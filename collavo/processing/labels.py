"""What a model is to say, as labels: batches of token ids, of which the answers' are kept."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from collavo.processing.stretches import Encode, Piece, encode_pieces

IGNORE_INDEX = -100
"""The label of what the loss leaves out."""


def special_texts(tokenizer: Any) -> set[str]:
    """Return every text that a tokenizer takes for a token of control.

    Args:
        tokenizer: Of transformers.
    """
    added = tokenizer.added_tokens_decoder.values()
    return {token.content for token in added if token.special} | set(tokenizer.all_special_tokens)


def tokenize_answers(
    tokenizer: Any,
    samples: Sequence[Sequence[Piece]],
    *,
    image_token: str,
    image_tokens: Sequence[Sequence[Sequence[int]]],
    max_length: int | None = None,
    pad_to_multiple_of: int | None = None,
) -> dict[str, Any]:
    """Tokenize prompts with their answers, cut and pad them.

    Args:
        tokenizer: Of transformers, with a pad token.
        samples: Prompts, with one image token per image.
        image_token: The placeholder of an image.
        image_tokens: For each prompt, and each of its images, the tokens that stand in its place.
        max_length: Longest sequence; longer ones are cut on the tokenizer's truncation side.
        pad_to_multiple_of: Pad lengths to a multiple of this.

    Returns:
        ``input_ids``, ``attention_mask`` and ``labels``, lists ``[B][L]``.
    """

    def encode(texts: list[str]) -> list[list[int]]:
        encoded = tokenizer(
            texts,
            add_special_tokens=False,
            return_attention_mask=False,
            return_token_type_ids=False,
            verbose=False,  # else it warns of texts that are longer than the model's
        )
        return [list(ids) for ids in encoded["input_ids"]]

    image = int(tokenizer.convert_tokens_to_ids(image_token))
    whole = "".join(piece.text for piece in samples[0])
    frame = special_frame(whole, encode, tokenizer(whole, verbose=False)["input_ids"])
    added = frozenset(tokenizer.added_tokens_decoder)
    rows, labels = [], []
    for pieces, images in zip(samples, image_tokens, strict=True):
        own = encode_pieces(pieces, encode, tokenizer.unk_token_id, added)
        ids, spoken = label_answers(pieces, own, {image: iter(images)})
        kept = cut_to_length(len(ids), frame, max_length, tokenizer.truncation_side)
        rows.append([*frame[0], *ids[kept], *frame[1]])
        around = [[IGNORE_INDEX] * len(part) for part in frame]
        labels.append([*around[0], *spoken[kept], *around[1]])
    padded = tokenizer.pad(
        {"input_ids": rows},
        pad_to_multiple_of=pad_to_multiple_of,
        return_attention_mask=True,
        verbose=False,
    )
    data = {key: padded[key] for key in ("input_ids", "attention_mask")}
    blanks = [[IGNORE_INDEX] * (len(data["input_ids"][0]) - len(row)) for row in rows]
    left = tokenizer.padding_side == "left"
    pairs = zip(blanks, labels, strict=True)
    return {**data, "labels": [blank + own if left else own + blank for blank, own in pairs]}


def check_not_cut(expected: int, image_token_id: int, ids: Sequence[int], name: str) -> None:
    """Raise unless all image tokens of a prompt are there.

    Args:
        expected: How many the prompt has.
        image_token_id: Their id.
        ids: What has become of it.
        name: What to call it in messages.

    Raises:
        ValueError: naming the prompt and both numbers.
    """
    found = list(ids).count(image_token_id)
    if found != expected:
        raise ValueError(
            f"{name}: expected {expected} image tokens after tokenizing, got {found}; a "
            "truncation must not cut images"
        )


def special_frame(text: str, encode: Encode, framed: Sequence[int]) -> tuple[list[int], list[int]]:
    """Return the special tokens that a tokenizer puts before and behind a text.

    Args:
        text: Any text.
        encode: Tokenizes without them.
        framed: The text's token ids with them.

    Raises:
        ValueError: if the text's own tokens are not among them.
    """
    bare, framed = encode([text])[0], list(framed)
    for start in range(len(framed) - len(bare) + 1):
        if framed[start : start + len(bare)] == bare:
            return framed[:start], framed[start + len(bare) :]
    raise ValueError(
        "tokenizer: expected special tokens before and behind a text's own, got other tokens with "
        f"add_special_tokens than without: {framed[:8]}..., {bare[:8]}..."
    )


def label_answers(
    pieces: Sequence[Piece],
    ids: Sequence[Sequence[int]],
    instead: Mapping[int, Iterator[Sequence[int]]],
) -> tuple[list[int], list[int]]:
    """Join the tokens of a prompt, and keep those of its answers as labels.

    Args:
        pieces: A prompt, in order.
        ids: The token ids of each piece.
        instead: What stands in the sequence in a token's place, such as an image's, each time.

    Returns:
        Token ids and labels.
    """
    joined: list[int] = []
    labels: list[int] = []
    for piece, own in zip(pieces, ids, strict=True):
        for token in own:
            run = list(next(instead[token], [token])) if token in instead else [token]
            joined += run
            labels += run if piece.is_answer else [IGNORE_INDEX] * len(run)
    return joined, labels


def cut_to_length(
    length: int, frame: tuple[list[int], list[int]], most: int | None, side: str
) -> slice:
    """Return which of a text's tokens are kept in a sequence of a largest length.

    Args:
        length: How many the text has.
        frame: Special tokens before and behind them, which stay.
        most: Largest length of all; None keeps all.
        side: ``"right"`` cuts the end off, ``"left"`` the beginning.
    """
    room = length if most is None else max(0, most - len(frame[0]) - len(frame[1]))
    return slice(0, room) if side == "right" else slice(max(0, length - room), length)
