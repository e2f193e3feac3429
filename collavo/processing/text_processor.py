"""What a processor makes of words: prompts, tokens and lengths, which no picture is needed for."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from typing import Any

import collavo._requirements  # noqa: F401  (before what it checks)

from transformers.processing_utils import ProcessorMixin

from collavo.panoptic.text import object_prefix
from collavo.processing.chat_templates import OBJECTS_MARKER, names_objects, stop_string
from collavo.processing.labels import (
    IGNORE_INDEX,
    AnswerTokenizer,
    Measured,
    Sequences,
    check_left_images,
)
from collavo.processing.prompts import count_images, with_objects
from collavo.processing.rendering import FilledTemplate
from collavo.processing.stretches import (
    Conversation,
    Piece,
    cut_tags,
    place_images,
    split_answers,
)
from collavo.processing.tokens import special_texts, tokenizer_state

_SOME_SIZE = (64, 64)  # of a picture that is never seen


class TextProcessor(ProcessorMixin):
    """The part of a processor that reads conversations and tokenizes them.

    Attributes:
        image_token: The placeholder of an image.
        image_token_id: The token that an image has many of.
        behind_image: What closes an image, where something does.
        grid: Height and width of an image in tokens.
        object_text: Whether prompts name the image's objects; None takes the chat template's way.
    """

    image_token: str
    image_token_id: int
    behind_image: str
    grid: tuple[int, int]
    object_text: bool | None
    _apart = True  # what stands between images is tokenized by itself

    @property
    def names_objects(self) -> bool:
        """Whether prompts name the image's objects where a call does not say."""
        if self.object_text is None:
            return names_objects(str(self.chat_template))
        return self.object_text

    def prompt(self, question: str | Conversation, *, num_images: int = 1) -> str:
        """Return the prompt of a question, up to where the model's answer starts.

        Args:
            question: The user's words, or a whole conversation that ends with the user's turn.
            num_images: How many images a question given as a string is about.
        """
        if isinstance(question, str):
            parts = [{"type": "image"}] * num_images + [{"type": "text", "text": question}]
            question = [{"role": "user", "content": parts}]
        return self._filled.text(question, "question", add_generation_prompt=True)

    def stopping(self) -> dict[str, Any]:
        """Return what ``generate`` has to know of the chat template's stop: nothing for a token."""
        stop = stop_string(str(self.chat_template))
        return {} if stop is None else {"stop_strings": [stop], "tokenizer": self.tokenizer}

    def stop_token(self) -> int | None:
        """Return the special token that ends an answer; None where a text does."""
        asked = [{"type": "image"}, {"type": "text", "text": "a"}]
        turns: Conversation = [
            {"role": "user", "content": asked},
            {"role": "assistant", "content": "a"},
        ]
        (labels,) = self.sequence(turns, [_SOME_SIZE]).labels
        stop = next(label for label in reversed(labels) if label != IGNORE_INDEX)
        # A text may have a template's other endings, such as a line break.
        special = stop in self.tokenizer.added_tokens_decoder
        return int(stop) if special and stop != self.tokenizer.unk_token_id else None

    def answer(self, tokens: Any) -> str:
        """Return what generated tokens say, without stop and blanks around.

        Args:
            tokens: Ids of one answer.
        """
        text = str(self.tokenizer.decode(tokens, skip_special_tokens=True))
        stop = stop_string(str(self.chat_template))
        return (text if stop is None else text.split(stop)[0]).strip()

    def measure(
        self,
        conversation: Conversation,
        sizes: Sequence[tuple[int, int]] = (),
        *,
        max_length: int | None = None,
        overlong: str = "cut",
        name: str = "conversation",
    ) -> Measured:
        """Return how long a conversation is as a training batch has it; no picture is needed.

        Args:
            conversation: As of ``training_batch``; without places, images are in the first turn.
            sizes: Height and width of each of its images in pixels. Where prompts name objects,
                those of an image without a map are counted.
            max_length: As of ``training_batch``.
            overlong: As of ``training_batch``.
            name: What to call it in messages.

        Raises:
            OverlongError: as ``training_batch``.
            ValueError: as ``training_batch``.
        """
        found = self.sequence(
            conversation, sizes, max_length=max_length, overlong=overlong, name=name
        )
        (labels,) = found.labels
        runs = self._tokens_of_sizes(sizes)
        return Measured(
            tokens=len(labels),
            image_tokens=sum(len(run) for run in runs[: found.images[0]]),
            targets=len(labels) - labels.count(IGNORE_INDEX),
            cut=found.cut[0],
        )

    def sequence(
        self,
        conversation: Conversation,
        sizes: Sequence[tuple[int, int]] = (),
        *,
        max_length: int | None = None,
        overlong: str = "cut",
        name: str = "conversation",
    ) -> Sequences:
        """Return a conversation's token ids and labels as a training batch has them, unpadded.

        Args:
            conversation: As of ``measure``; no picture is needed.
            sizes: As of ``measure``.
            max_length: As of ``training_batch``.
            overlong: As of ``training_batch``.
            name: What to call it in messages.

        Raises:
            OverlongError: as ``training_batch``.
            ValueError: as ``training_batch``.
        """
        pieces = self._render(place_images(conversation, len(sizes)), name, self._tags)
        count_images([pieces], [name], self.image_token, len(sizes), [len(sizes)])
        prefix = object_prefix([]) if self.names_objects else ""
        tokens = self._tokens_of_sizes(sizes)
        found = self._answers.sequences(
            [self._with_objects(pieces, [prefix] * len(sizes), name)],
            [tokens],
            [name],
            max_length=max_length,
            overlong=overlong,
        )
        if found.images[0] < len(sizes):
            left = self._tokens_of_sizes(sizes[: found.images[0]])
            check_left_images(left, tokens, name)
        return found

    def fingerprint(self) -> str:
        """Return what differs where another processor would make other ids, labels or lengths."""
        facts = {
            "class": type(self).__name__,
            "chat_template": self.chat_template,
            "tokenizer": tokenizer_state(self.tokenizer),
            "images": self._image_facts(),
            "object_text": self.names_objects,
        }
        text = json.dumps(facts, sort_keys=True, default=str)
        return hashlib.sha256(text.encode()).hexdigest()

    @property
    def _filled(self) -> FilledTemplate:
        return FilledTemplate(str(self.chat_template), self.tokenizer.special_tokens_map)

    @property
    def _answers(self) -> AnswerTokenizer:
        return AnswerTokenizer(self.tokenizer, self.image_token, apart=self._apart)

    @property
    def _tags(self) -> set[str]:
        return {self.image_token, OBJECTS_MARKER, *special_texts(self.tokenizer)}

    def _image_facts(self) -> Any:
        return [self.image_token, *self.grid]

    def _tokens_of_sizes(self, sizes: Sequence[tuple[int, int]]) -> list[list[int]]:
        """Return the tokens in the place of each of a prompt's images."""
        return [[self.image_token_id] * (self.grid[0] * self.grid[1])] * len(sizes)

    def _with_objects(
        self, pieces: Sequence[Piece], prefixes: Sequence[str], name: str
    ) -> list[Piece]:
        place = {"image_token": self.image_token, "behind_image": self.behind_image}
        return with_objects(pieces, prefixes, name, **place)

    def _render(self, conversation: Conversation, name: str, tags: set[str]) -> list[Piece]:
        words, mark = cut_tags(conversation, tags)
        text, spans = self._filled.with_answers(words, name, tags)
        return split_answers(text, spans, mark)
