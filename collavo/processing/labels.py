"""What a model is to say, as labels: of a conversation's token ids those of its answers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from collavo.processing.stretches import Piece, between_images, encode_pieces
from collavo.processing.tokens import TextEncoder, pad, shorten

IGNORE_INDEX = -100
"""The label of what the loss leaves out."""


class OverlongError(ValueError):
    """A conversation has more tokens than a sequence may have, and cannot or must not be cut."""


@dataclass(frozen=True)
class Measured:
    """How long a conversation is.

    Attributes:
        tokens: All of them, those of images and the special tokens around included.
        image_tokens: Those of images.
        targets: Those that the loss is on.
        cut: Whether it has been cut at its end to fit.
    """

    tokens: int
    image_tokens: int
    targets: int
    cut: bool


@dataclass(frozen=True)
class Sequences:
    """Conversations as token ids.

    Attributes:
        ids: Of each, with images' and special tokens.
        labels: As many, ``IGNORE_INDEX`` outside the answers.
        images: How many of its images each has left.
        cut: Whether each has been cut.
    """

    ids: list[list[int]]
    labels: list[list[int]]
    images: list[int]
    cut: list[bool]


class AnswerTokenizer:
    """Makes token ids and labels of conversations.

    Args:
        tokenizer: Of transformers.
        image_token: The placeholder of an image.
        apart: Whether what stands between images is tokenized by itself; else an image's place
            is a token of the whole text.
    """

    def __init__(self, tokenizer: Any, image_token: str, apart: bool) -> None:
        self.encode = TextEncoder(tokenizer)
        self.image_token = image_token
        self.image_token_id = int(tokenizer.convert_tokens_to_ids(image_token))
        self.apart = apart

    def sequences(
        self,
        samples: Sequence[Sequence[Piece]],
        image_tokens: Sequence[Sequence[Sequence[int]]],
        names: Sequence[str],
        *,
        max_length: int | None = None,
        overlong: str = "cut",
    ) -> Sequences:
        """Tokenize prompts with their answers.

        Args:
            samples: Prompts, with one placeholder per image.
            image_tokens: For each, and each of its images, the tokens that stand in its place.
            names: What to call them in messages.
            max_length: Longest sequence, images and special tokens included.
            overlong: What becomes of a longer one: ``"cut"`` behind its last whole answer that
                fits, or ``"raise"``.

        Raises:
            OverlongError: naming the conversation, if it is too long, or no whole answer of it
                fits.
            ValueError: naming the conversation, if it has nothing to learn.
        """
        if overlong not in ("cut", "raise"):
            raise ValueError(f"overlong: expected 'cut' or 'raise', got {overlong!r}")
        made = Sequences([], [], [], [])
        for pieces, runs, name in zip(samples, image_tokens, names, strict=True):
            ids, labels, ends, images = self._joined(pieces, runs)
            before, behind = self.encode.framed(ids)
            whole = len(ids)
            if max_length is not None and len(before) + whole + len(behind) > max_length:
                room = max_length - len(before) - len(behind)
                stop = _last_that_fits(ends, room, whole, overlong, max_length, name)
                ids, labels = ids[:stop], labels[:stop]
                images = [image for image in images if image <= stop]
            if labels.count(IGNORE_INDEX) == len(labels):
                raise ValueError(f"{name}: expected an answer with a token to learn, got none")
            made.ids.append([*before, *ids, *behind])
            around = [[IGNORE_INDEX] * len(part) for part in (before, behind)]
            made.labels.append([*around[0], *labels, *around[1]])
            made.images.append(len(images))
            made.cut.append(len(ids) < whole)
        return made

    def prompts(
        self,
        texts: Sequence[str],
        image_tokens: Sequence[Sequence[Sequence[int]]],
        options: Mapping[str, Any],
    ) -> list[list[int]]:
        """Tokenize prompts as ``sequences`` does what stands before an answer.

        Args:
            texts: With one placeholder per image.
            image_tokens: As of ``sequences``.
            options: Of a call: whether special tokens come around, and how to shorten.
        """
        rows = []
        for text, runs in zip(texts, image_tokens, strict=True):
            ids = self._joined([Piece(text, False)], runs)[0]
            around = options.get("add_special_tokens", True)
            before, behind = self.encode.framed(ids) if around else ([], [])
            added = len(before) + len(behind)
            rows.append([*before, *shorten(ids, options, self.encode.tokenizer, added), *behind])
        return rows

    def _joined(
        self, pieces: Sequence[Piece], image_tokens: Sequence[Sequence[int]]
    ) -> tuple[list[int], list[int], list[int], list[int]]:
        """Return ids, labels, and where every answer and every image ends."""
        ids: list[int] = []
        labels: list[int] = []
        ends: list[int] = []
        images: list[int] = []
        runs: Iterator[Sequence[int]] = iter(image_tokens)
        for piece, own in self._encoded(pieces):
            if piece.is_answer:
                ids += own
                labels += own
                if piece.ends_answer:
                    ends.append(len(ids))
                continue
            start = 0
            for _ in range(own.count(self.image_token_id)):
                place = own.index(self.image_token_id, start)
                ids += own[start:place]
                ids += next(runs, [self.image_token_id])
                images.append(len(ids))
                start = place + 1
            ids += own[start:]
            labels += [IGNORE_INDEX] * (len(ids) - len(labels))
        return ids, labels, ends, images

    def _encoded(self, pieces: Sequence[Piece]) -> Iterator[tuple[Piece, list[int]]]:
        encode = self.encode
        stretches = between_images(pieces, self.image_token) if self.apart else [pieces]
        for number, stretch in enumerate(stretches):
            if number:
                yield Piece(self.image_token, False), [self.image_token_id]
            found = encode_pieces(stretch, encode, encode.unknown, encode.isolated)
            yield from zip(stretch, found, strict=True)


def _last_that_fits(
    ends: Sequence[int], room: int, whole: int, overlong: str, most: int, name: str
) -> int:
    """Return where the last whole answer ends that fits."""
    fitting = [end for end in ends if end <= room]
    around = most - room
    if overlong == "raise":
        raise OverlongError(
            f"{name}: expected at most max_length={most} tokens, images included, got "
            f"{whole + around}; allow longer sequences, or have them cut"
        )
    if not fitting:
        first = ends[0] if ends else whole
        raise OverlongError(
            f"{name}: nothing of its answer is left within max_length={most}: it has "
            f"{whole + around} tokens, images included, and no part of an answer is kept; the "
            f"first ends at {first + around}; allow longer sequences"
        )
    return fitting[-1]


def padded_batch(
    made: Sequences, tokenizer: Any, *, pad_to_multiple_of: int | None = None
) -> dict[str, Any]:
    """Return ``input_ids``, ``attention_mask`` and ``labels``, lists ``[B][L]``.

    Args:
        made: Sequences of any lengths.
        tokenizer: It says on which side they are padded, and with what.
        pad_to_multiple_of: Pad lengths to a multiple of this.

    Raises:
        ValueError: if they have to be padded and the tokenizer has no pad token.
    """
    options: dict[str, Any] = {"padding": True}
    if pad_to_multiple_of is not None:
        options["pad_to_multiple_of"] = pad_to_multiple_of
    data = pad(made.ids, tokenizer, options)
    blanks = [[IGNORE_INDEX] * (len(data["input_ids"][0]) - len(row)) for row in made.labels]
    left = tokenizer.padding_side == "left"
    pairs = zip(blanks, made.labels, strict=True)
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


def check_left_images(
    left: Sequence[Sequence[int]], whole: Sequence[Sequence[int]], name: str
) -> None:
    """Raise unless the images before a cut have the tokens that they had beside those behind it.

    Args:
        left: The tokens of those before the cut, without the others.
        whole: The tokens of all.
        name: What to call the prompt in messages.

    Raises:
        OverlongError: naming the prompt.
    """
    if list(map(list, left)) != list(map(list, whole[: len(left)])):
        raise OverlongError(
            f"{name}: expected to be cut behind an answer, but its images have other tokens where "
            "those behind the cut are left out; allow longer sequences, or leave it out"
        )
