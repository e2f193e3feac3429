"""Any processor or tokenizer with a chat template: its folder, its tokens, its picture's tokens."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from functools import lru_cache
from os import PathLike
from pathlib import Path
from typing import Any

import collavo._requirements  # noqa: F401  (before what it checks)

import numpy as np
import torch
from PIL import Image
from transformers import AutoProcessor, AutoTokenizer

from collavo.loss_masks.answers import AnswerFinder, Reader
from collavo.processing.labels import AnswerTokenizer
from collavo.processing.processor import CollavoProcessor
from collavo.processing.rendering import FilledTemplate, Spans
from collavo.processing.stretches import Conversation, cut_tags, split_answers
from collavo.processing.tokens import special_texts

Sizes = tuple[tuple[int, int], ...]

BLANK_SIDE = 336
"""Side of the square that stands in for a picture of which nothing is known, in pixels."""
_PROCESSOR_FILES = ("processor_config.json", "preprocessor_config.json")
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json")


def load_processor(folder: str | PathLike[str]) -> Any:
    """Load the processor, or the tokenizer, of any model's folder.

    Code of the folder's own is not run, and nothing is downloaded.

    Args:
        folder: A folder that ``save_pretrained`` wrote, or a download of a whole model.

    Raises:
        FileNotFoundError: if there is no such folder, or it holds neither.
        ValueError: naming the folder, if transformers cannot read it.
    """
    path = Path(folder)
    if not path.is_dir():
        raise FileNotFoundError(f"{folder}: no such model folder")
    files = (*_PROCESSOR_FILES, *_TOKENIZER_FILES)
    there = [name for name in files if (path / name).is_file()]
    if not there:
        raise FileNotFoundError(
            f"{folder}: expected a processor or a tokenizer, got none of {', '.join(files)}"
        )
    kind: Any = AutoProcessor if there[0] in _PROCESSOR_FILES else AutoTokenizer
    try:
        loaded = kind.from_pretrained(path, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # whatever the folder's class does
        raise ValueError(f"{folder}: its processor cannot be read ({reason(error)})") from error
    if not hasattr(getattr(loaded, "tokenizer", loaded), "get_vocab"):
        raise ValueError(
            f"{folder}: expected a processor with a tokenizer, got {type(loaded).__name__}"
        )
    return loaded


class PromptSource:
    """Makes prompts with labels, and without, as one processor does.

    Args:
        processor: A ``CollavoProcessor``, a processor of transformers, or a tokenizer, which makes
            text alone. A processor of a LLaVA is taken as ``CollavoProcessor.from_llava`` does.
        template: A chat template in place of its own.

    Raises:
        TypeError: if it is neither.
        ValueError: if it has no chat template.
    """

    def __init__(self, processor: Any, template: str | None = None) -> None:
        self.tokenizer = getattr(processor, "tokenizer", processor)
        if not hasattr(self.tokenizer, "get_vocab"):
            raise TypeError(
                "processor: expected a processor with a tokenizer, or a tokenizer, got "
                f"{type(processor).__name__}"
            )
        self.name = type(processor).__name__
        self.template = template or _template_of(processor)
        if not self.template:
            raise ValueError(
                f"template: expected a chat template, got none: {self.name} has none of its own; "
                "name one, such as vicuna_v1"
            )
        self.collavo = _as_collavo(processor)
        self.wrapped = _quick(_own_processor(processor))
        if self.collavo is not None:
            self.collavo.chat_template = self.template
            if hasattr(self.collavo, "processor"):
                self.collavo.processor = self.wrapped
        whole = processor if self.collavo is None else self.collavo
        token = getattr(whole, "image_token", None)
        self.image_token = None if token is None else str(getattr(token, "content", token))
        self.image_ids = _image_ids(whole, self.tokenizer, self.image_token)
        self.filled = FilledTemplate(self.template, self.tokenizer.special_tokens_map)
        own = {self.image_token} if self.image_token else set()
        self.tags = special_texts(self.tokenizer) | own
        self.finder = AnswerFinder(self.filled, self.tags)
        # Without a placeholder of its own a tokenizer has no image; any token stands for none.
        place = self.image_token or self.tokenizer.convert_ids_to_tokens(0)
        self._answers = AnswerTokenizer(self.tokenizer, place, apart=False)
        self.reader = Reader(self._answers.encode, lru_cache(maxsize=None)(self._is_blank))
        self._run = lru_cache(maxsize=4096)(self._image_run)
        self._in_parts: bool | None = None
        self._needs_tensors = False

    @property
    def one_size(self) -> bool:
        """Whether a picture's size changes nothing."""
        return self.image_token is None or bool(getattr(self.collavo, "one_grid", False))

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of tokens, those of control among them.

        Args:
            ids: Token ids.
        """
        return str(
            self.tokenizer.decode(
                list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False
            )
        )

    def _is_blank(self, token: int) -> bool:
        return not self.decode([token]).strip()

    def labelled(
        self, conversation: Conversation, sizes: Sizes, name: str, max_length: int | None = None
    ) -> tuple[list[int], list[int]]:
        """Return a conversation's tokens and labels as training with this package has them.

        Args:
            conversation: Chat messages, with a part for each image.
            sizes: Height and width of the images.
            name: What to call it in messages.
            max_length: Longest sequence in tokens.

        Raises:
            ValueError: as ``CollavoProcessor.training_batch``.
        """
        if self.collavo is not None:
            made = self.collavo.sequence(conversation, sizes, max_length=max_length, name=name)
        else:
            words, mark = cut_tags(conversation, self.tags)
            text, spans = self._answer_spans(words, name)
            made = self._answers.sequences(
                [split_answers(text, spans, mark)],
                [self._run(sizes) if sizes else []],
                [name],
                max_length=max_length,
            )
            if made.images[0] < len(sizes) and not made.cut[0]:
                raise ValueError(
                    f"{name}: expected one {self.image_token!r} for each of {len(sizes)} images, "
                    f"got {made.images[0]}; is the chat template another model's?"
                )
        return made.ids[0], made.labels[0]

    def _answer_spans(self, conversation: Conversation, name: str) -> tuple[str, Spans]:
        try:
            return self.filled.with_answers(conversation, name, special_texts(self.tokenizer))
        except ValueError:
            # Without a block for them, templates that do more than add text turn by turn are
            # refused in training; here what stands around the answers tells all the same.
            text, answers = self.finder.find(conversation, name)
            return text, [(one.start, one.end) for one in answers]

    def as_transformers(
        self, conversation: Conversation, text: str, sizes: Sizes, *, mask: bool
    ) -> tuple[list[int], list[int]]:
        """Return a conversation's tokens, and its mask, by ``apply_chat_template`` of transformers.

        Args:
            conversation: Chat messages, with a part for each image.
            text: What the template makes of it.
            sizes: Height and width of the images.
            mask: Whether the mask of the assistant's tokens is wanted; without it it is 0.

        Raises:
            Exception: whatever transformers does.
            ValueError: if it makes another text of the conversation.
        """
        owner = self.tokenizer if self.wrapped is None else self.wrapped
        options = {"chat_template": self.template, "tokenize": True, "return_dict": True}
        if self._in_parts is None:
            self._in_parts = self._taken_form(owner, conversation, text, sizes)
        form = _with_pictures(conversation, sizes, self._in_parts)
        options["return_assistant_tokens_mask"] = mask
        if not self._needs_tensors:
            try:
                made = owner.apply_chat_template(form, **options)
            except (AttributeError, TypeError):  # some take lists for arrays, and fail
                self._needs_tensors = self.wrapped is not None
                if not self._needs_tensors:
                    raise
        if self._needs_tensors:
            made = owner.apply_chat_template(form, return_tensors="pt", **options)
        ids = _row(made["input_ids"])
        masked = _row(made["assistant_masks"]) if mask else [0] * len(ids)
        return self._expanded(ids, masked, sizes)

    def _taken_form(self, owner: Any, conversation: Conversation, text: str, sizes: Sizes) -> bool:
        """Say whether the template takes all words in parts, or strings too."""
        options = {"chat_template": self.template, "tokenize": False}
        for in_parts in (False, True):
            form = _with_pictures(conversation, sizes, in_parts)
            if owner.apply_chat_template(form, **options) == text:
                return in_parts
        raise ValueError("transformers makes another text of the conversation")

    def _expanded(
        self, ids: list[int], mask: list[int], sizes: Sizes
    ) -> tuple[list[int], list[int]]:
        """Put an image's tokens in the place of the one that a tokenizer makes of it."""
        if self.wrapped is not None or self.collavo is None or not sizes:
            return ids, mask
        height, width = self.collavo.grid
        counts = [height * width if token in self.image_ids else 1 for token in ids]
        pairs = zip(ids, mask, counts, strict=True)
        whole = [(token, kept) for token, kept, count in pairs for _ in range(count)]
        return [token for token, _ in whole], [kept for _, kept in whole]

    def _image_run(self, sizes: Sizes) -> list[list[int]]:
        """Return the tokens that stand in the place of each image of a prompt."""
        border = self.tokenizer.eos_token or self.tokenizer.pad_token
        wrapped: Any = self.wrapped
        try:
            made = wrapped(
                images=[[blank(size) for size in sizes]],
                text=[border.join([str(self.image_token)] * len(sizes))],
                add_special_tokens=False,
                return_tensors="pt",
            )
        except Exception as error:  # whatever another package's class raises
            raise ValueError(f"{self.name} takes no such picture ({reason(error)})") from error
        runs: list[list[int]] = [[]]
        for token in _row(made["input_ids"]):
            if token == self.tokenizer.convert_tokens_to_ids(border):
                runs.append([])
            else:
                runs[-1].append(token)
        return runs


@lru_cache(maxsize=4)
def blank(size: tuple[int, int]) -> Image.Image:
    """Return a black picture.

    Args:
        size: Height and width.
    """
    return Image.new("RGB", size[::-1])


def _template_of(processor: Any) -> str:
    own = getattr(processor, "chat_template", None)
    own = own or getattr(getattr(processor, "tokenizer", None), "chat_template", None) or ""
    return str(own.get("default", "") if isinstance(own, Mapping) else own)


def _own_processor(processor: Any) -> Any | None:
    """Return transformers' processor in this one; None for this package's and for a tokenizer."""
    if isinstance(processor, CollavoProcessor):
        return getattr(processor, "processor", None)
    return processor if hasattr(processor, "tokenizer") else None


def _as_collavo(processor: Any) -> CollavoProcessor | None:
    if isinstance(processor, CollavoProcessor):
        return copy.copy(processor)
    try:
        return CollavoProcessor.from_llava(processor)
    except (TypeError, ValueError, AttributeError):
        return None  # another family's, or one whose image tokens cannot be followed


def _image_ids(processor: Any, tokenizer: Any, image_token: str | None) -> frozenset[int]:
    if image_token is None:
        return frozenset()
    # A tokenizer that names the token knows better: a processor's may be what it is made of.
    named = (getattr(one, "image_token_id", None) for one in (tokenizer, processor))
    own = next((one for one in named if one is not None), None)
    return frozenset([int(tokenizer.convert_tokens_to_ids(image_token) if own is None else own)])


def _with_pictures(conversation: Conversation, sizes: Sizes, in_parts: bool) -> list[Any]:
    """Return messages as transformers' processors take them: pictures in their parts."""
    pictures = iter(sizes)
    made = []
    for message in conversation:
        content = message["content"]
        if isinstance(content, str):
            content = [{"type": "text", "text": content}] if in_parts else content
        else:
            content = [
                {**part, "image": blank(next(pictures))} if part["type"] == "image" else part
                for part in content
            ]
        made.append({**message, "content": content})
    return made


def _row(values: Any) -> list[int]:
    """Return the only row of a batch, or what is no batch."""
    if hasattr(values, "tolist"):
        values = values.tolist()
    return list(values[0] if values and isinstance(values[0], Sequence) else values)


def reason(error: Exception) -> str:
    """Return what an error says, on one line.

    Args:
        error: Of another package.
    """
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 160 else f"{text[:157]}..."


def _quick(processor: Any | None) -> Any | None:
    """Return a processor whose image processor makes nothing twice of pictures of the same sizes.

    What stands in for pictures is black, so their sizes tell all; and of what is made only shapes
    are looked at, so pixels take no memory.
    """
    images = getattr(processor, "image_processor", None)
    if processor is None or images is None:
        return processor
    own, known = type(images), dict[str, Any]()

    def remembered(self: Any, images: Any, *args: Any, **kwargs: Any) -> Any:
        key = repr((_sizes(images), args, sorted(kwargs.items(), key=lambda pair: pair[0])))
        if key not in known:
            if len(known) >= 4096:
                known.clear()
            known[key] = own.__call__(self, images, *args, **kwargs)
            for name, value in known[key].items():
                known[key][name] = _hollow(value)
        return copy.copy(known[key])

    quick, quick_images = copy.copy(processor), copy.copy(images)
    # Of the same name and module: a family is told by them.
    names = {"__module__": own.__module__, "__call__": remembered}
    quick_images.__class__ = type(own.__name__, (own,), names)
    quick.image_processor = quick_images
    return quick


def _sizes(images: Any) -> Any:
    if isinstance(images, Image.Image):
        return images.size
    return [_sizes(one) for one in images]


def _hollow(value: Any) -> Any:
    """Return zeros of an array's shape that take no memory; small arrays are kept."""
    if isinstance(value, torch.Tensor) and value.is_floating_point() and value.ndim > 2:
        return value.new_zeros(()).expand(value.shape)
    if isinstance(value, np.ndarray) and value.dtype.kind == "f" and value.ndim > 2:
        return np.broadcast_to(value.dtype.type(0), value.shape)
    if isinstance(value, list | tuple):
        return type(value)(_hollow(one) for one in value)
    return value
