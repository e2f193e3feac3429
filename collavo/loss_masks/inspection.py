"""Whether the labels of conversations are right, and what other ways of making them get wrong."""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import collavo._requirements  # noqa: F401  (before what it checks)

from PIL import Image
from tqdm.auto import tqdm

from collavo.conversations.records import check_record, record_images, record_name
from collavo.loss_masks.alignment import NONE_WRONG, Folded, Wrong, fold
from collavo.loss_masks.answers import Said, Truth, true_tokens
from collavo.loss_masks.processors import BLANK_SIDE, PromptSource, Sizes
from collavo.loss_masks.ways import WAYS, Case, Result, compare_ways
from collavo.panoptic.coco_index import Skipped
from collavo.panoptic.file_names import inner_name
from collavo.panoptic.images import read_image_size
from collavo.panoptic.json_files import shown
from collavo.panoptic.maps import PathLike
from collavo.processing.labels import IGNORE_INDEX
from collavo.processing.stretches import cut_tags, place_images

_LONGEST = 10


@dataclass
class WayReport:
    """What one way of making labels gets wrong in a data set.

    Attributes:
        name: A key of ``collavo.loss_masks.ways.WAYS``.
        wrong: Tokens, by kind of mistake, of the conversations it could be done for.
        conversations: How many of them have a wrong token.
        refused: For how many it could not be done.
        reason: Why not, of the first.
        example: The first wrong tokens as text, and the record's name; None where none is wrong.
    """

    name: str
    wrong: Wrong = NONE_WRONG
    conversations: int = 0
    refused: int = 0
    reason: str = ""
    example: tuple[str, str] | None = None

    def add(self, result: Result, name: str, decode: Callable[[list[int]], str]) -> None:
        """Count one conversation's result.

        Args:
            result: Of the way.
            name: The record's.
            decode: Returns the text of tokens.
        """
        if result.refused:
            self.refused += 1
            self.reason = self.reason or result.refused
            return
        self.wrong = self.wrong.plus(result.wrong)
        if result.first is not None:
            self.conversations += 1
            if self.example is None:
                ids, many = result.first
                self.example = (f"{'trains on' if many else 'leaves out'} {decode(ids)!r}", name)


@dataclass
class LabelReport:
    """What ``inspect_labels`` found.

    Attributes:
        processor: The class of the processor.
        asks: What asks the assistant for an answer, such as ``"ASSISTANT:"``.
        conversations: How many were inspected; those skipped are not among them.
        tokens: All their tokens, after cutting.
        targets: Those with a label.
        images: Their pictures.
        image_tokens: The tokens of these.
        unknown_sizes: Pictures whose size was not known where it matters, taken as a square.
        left_out_images: Pictures that a tokenizer has no place for.
        cut: How many conversations were cut to the largest length.
        skipped: Records that cannot be trained on, and why.
        failures: Records whose targets are not the answers and stop tokens, and what they are.
        longest: The ten longest, in tokens before cutting, and their names.
        ways: What each way of making labels gets wrong, in whole conversations.
    """

    processor: str
    asks: str = ""
    conversations: int = 0
    tokens: int = 0
    targets: int = 0
    images: int = 0
    image_tokens: int = 0
    unknown_sizes: int = 0
    left_out_images: int = 0
    cut: int = 0
    skipped: list[Skipped] = field(default_factory=list)
    failures: list[Skipped] = field(default_factory=list)
    longest: list[tuple[int, str]] = field(default_factory=list)
    ways: dict[str, WayReport] = field(
        default_factory=lambda: {name: WayReport(name) for name in WAYS}
    )
    _heap: list[tuple[int, int, str]] = field(default_factory=list, repr=False)

    @property
    def passed(self) -> bool:
        """Whether there were conversations, and the targets of all are right."""
        return self.conversations > 0 and not self.failures

    def add(self, one: Inspected, decode: Callable[[list[int]], str]) -> None:
        """Count a conversation.

        Args:
            one: What was found.
            decode: Returns the text of tokens.
        """
        self.conversations += 1
        self.tokens += sum(one.kept.counts)
        self.targets += sum(one.kept.trained)
        self.images += one.images
        self.image_tokens += one.image_tokens
        self.unknown_sizes += one.unknown_sizes
        self.left_out_images += one.left_out_images
        self.cut += one.cut
        if one.fault:
            self.failures.append(Skipped(one.name, one.fault))
        for name, result in one.ways.items():
            self.ways[name].add(result, one.name, decode)
        # Of equal lengths the first stays.
        entry = (one.length, -self.conversations, one.name)
        keep = heapq.heappush if len(self._heap) < _LONGEST else heapq.heappushpop
        keep(self._heap, entry)
        self.longest = [(length, name) for length, _, name in sorted(self._heap, reverse=True)]


@dataclass(frozen=True)
class Inspected:
    """What was found of one conversation.

    Attributes:
        name: The record's.
        kept: Tokens and labels, an image's tokens in one entry, after cutting.
        length: Tokens before cutting.
        cut: Whether it was cut.
        images: Its pictures.
        image_tokens: Their tokens.
        unknown_sizes: Those whose size was not known where it matters.
        left_out_images: Those that a tokenizer has no place for.
        fault: What the targets are in place of the answers and stop tokens; "" if they are right.
        ways: What each way of making labels makes of it.
    """

    name: str
    kept: Folded
    length: int
    cut: bool
    images: int
    image_tokens: int
    unknown_sizes: int
    left_out_images: int
    fault: str = ""
    ways: Mapping[str, Result] = field(default_factory=dict)


class LabelInspector:
    """Inspects conversations one by one.

    Args:
        processor: As of ``inspect_labels``.
        template: As of ``inspect_labels``.
        max_length: As of ``inspect_labels``.
        images: As of ``inspect_labels``.
    """

    def __init__(
        self,
        processor: Any,
        *,
        template: str | None = None,
        max_length: int | None = None,
        images: PathLike | None = None,
    ) -> None:
        if max_length is not None and max_length < 1:
            raise ValueError(f"max_length: expected at least 1, got {max_length}")
        self.source = PromptSource(processor, template)
        self.max_length = max_length
        self.images = None if images is None else Path(images)

    def inspect(self, record: Mapping[str, Any], name: str) -> Inspected:
        """Look at one record.

        Args:
            record: As of ``ConversationDataset``; its images are not opened but for their size.
            name: What to call it.

        Raises:
            ValueError: naming it, if it cannot be trained on.
        """
        source = self.source
        images, _ = record_images(record)
        left_out = 0 if source.image_token else len(images)
        sizes, unknown = self._sizes(images[left_out:])
        conversation = place_images(record["conversation"], len(sizes))
        if left_out:
            conversation = [_without_images(message) for message in conversation]
        ids, labels = source.labelled(conversation, sizes, name)
        whole = kept = self._folded(ids, labels)
        if self.max_length is not None and len(ids) > self.max_length:
            kept = self._folded(*source.labelled(conversation, sizes, name, self.max_length))
        places = zip(kept.ids, kept.counts, strict=True)
        seen = Inspected(
            name,
            kept,
            length=len(ids),
            cut=kept is not whole,
            images=len(sizes),
            image_tokens=sum(count for token, count in places if token in source.image_ids),
            unknown_sizes=unknown,
            left_out_images=left_out,
        )
        words, mark = cut_tags(conversation, source.tags)
        try:
            text, answers = self.source.finder.find(words, name)
        except ValueError as error:  # it can be trained on, and nobody can say that it is right
            return replace(seen, fault=str(error).removeprefix(f"{name}: "))
        truth = true_tokens(text, mark, answers, source.reader)
        case = Case(conversation, truth.plain(text), sizes, truth, whole)
        return replace(
            seen,
            fault=find_fault(source, kept, truth, cut=seen.cut),
            ways=compare_ways(source, case, self.source.finder.asks),
        )

    def _folded(self, ids: Sequence[int], labels: Sequence[int]) -> Folded:
        return fold(ids, [label != IGNORE_INDEX for label in labels], self.source.image_ids)

    def _sizes(self, images: Sequence[Any]) -> tuple[Sizes, int]:
        square = (BLANK_SIDE, BLANK_SIDE)
        found = [self._size(image) for image in images]
        if self.source.one_size:
            return (square,) * len(found), 0
        return tuple(one or square for one in found), found.count(None)

    def _size(self, image: Any) -> tuple[int, int] | None:
        if isinstance(image, str | Path):
            if self.images is None:
                return None
            return read_image_size(self.images / inner_name(str(image), "image"))
        if isinstance(image, Image.Image):
            return image.height, image.width
        return image.shape[0], image.shape[1]


def inspect_labels(
    processor: Any,
    records: Iterable[Mapping[str, Any] | Skipped],
    *,
    template: str | None = None,
    max_length: int | None = None,
    images: PathLike | None = None,
    progress: bool = False,
) -> LabelReport:
    """Check that what is trained on is the answers and their stop tokens, and nothing else.

    The labels of training are decoded and compared with the answers' words, which are found in the
    prompt without what made the labels. Three other ways of making labels are counted beside.

    Args:
        processor: A ``CollavoProcessor``, any processor of transformers, or a tokenizer.
        records: As ``ConversationDataset`` takes them, gone through once; and those that somebody
            has left out already.
        template: A chat template in place of the processor's own.
        max_length: Longest sequence in tokens; longer ones are cut.
        images: Folder that image paths start from, where sizes are read; None takes pictures that
            are paths for squares.
        progress: Whether to show a bar.

    Raises:
        TypeError: if the processor is neither.
        ValueError: if it has no chat template, or no record has an answer.

    Example:
        >>> from tokenizers import Tokenizer, models, pre_tokenizers
        >>> from transformers import PreTrainedTokenizerFast
        >>> words = ["hot?", "no", "</s>", "[UNK]"]
        >>> core = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, "[UNK]"))
        >>> core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
        >>> tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="</s>")
        >>> each = "{{ m['content'] + ' ' + (eos_token if m['role'] == 'assistant' else '') }}"
        >>> tokenizer.chat_template = "{% for m in messages %}" + each + "{% endfor %}"
        >>> turns = [{"role": "user", "content": "hot?"}, {"role": "assistant", "content": "no"}]
        >>> report = inspect_labels(tokenizer, [{"conversation": turns}])
        >>> report.passed, report.tokens, report.targets, report.ways["copy"].wrong.too_many
        (True, 3, 2, 0)
    """
    inspector = LabelInspector(processor, template=template, max_length=max_length, images=images)
    report = LabelReport(inspector.source.name)
    for number, record in enumerate(tqdm(records, unit="record", disable=not progress)):
        if isinstance(record, Skipped):
            report.skipped.append(record)
            continue
        name = record_name(record, f"records[{number}]")
        try:
            one = inspector.inspect(check_record(record, name), name)
            report.add(one, inspector.source.decode)
        except (ValueError, OSError) as error:
            report.skipped.append(Skipped(name, str(error).removeprefix(f"{name}: ")))
    report.asks = inspector.source.finder.asks
    if not report.conversations:
        first = f": {report.skipped[0].name}: {report.skipped[0].reason}" if report.skipped else ""
        raise ValueError(f"records: expected a conversation with an answer, got none{first}")
    return report


def find_fault(source: PromptSource, kept: Folded, truth: Truth, *, cut: bool) -> str:
    """Return what is wrong with a conversation's targets, as they decode; "" if nothing is.

    Args:
        source: Whose tokens they are.
        kept: Tokens and labels.
        truth: Where the answers are.
        cut: Whether answers at the end may be missing.
    """
    for token, trained in zip(kept.ids, kept.trained, strict=True):
        if trained and token in source.image_ids:
            return "an image token is a target"
    runs, expected = _runs(kept), truth.said(source.reader)
    if len(runs) != len(expected):
        runs = [run for run in runs if source.decode(run).strip()]
        expected = [one for one in expected if one.words.strip()]
    for number, (run, said) in enumerate(zip(runs, expected, strict=False), start=1):
        if not _says(source, run, said):
            return (
                f"expected the targets to be answer {number}, {shown(said.words, 60)}, but they "
                f"are {shown(source.decode(run), 60)}"
            )
    if len(runs) > len(expected) or (len(runs) < len(expected) and not cut):
        return f"expected {len(expected)} answers among the targets, got {len(runs)}"
    return ""


def _runs(kept: Folded) -> list[list[int]]:
    runs: list[list[int]] = []
    before = 0
    for token, trained in zip(kept.ids, kept.trained, strict=True):
        if trained and not before:
            runs.append([])
        if trained:
            runs[-1].append(token)
        before = trained
    return runs


def _says(source: PromptSource, run: Sequence[int], said: Said) -> bool:
    """Say whether tokens decode to an answer, blanks around it aside.

    A tokenizer may not give a text back (it composes accents, knows no capitals, lacks a sign);
    then what it gives for the answer by itself is what counts.
    """
    spoken = source.decode(run)
    for own in (said.words, source.decode(said.ids)):
        words = own.lstrip() or own
        place = spoken.rfind(words)
        behind = spoken[place + len(words) :].strip()
        before = spoken[:place].strip()
        if place < 0 or not said.lead.strip().endswith(before):
            continue
        if said.rest.strip().startswith(behind):
            return True
    return False


def _without_images(message: Mapping[str, Any]) -> dict[str, Any]:
    """Return a message as the chat template of a text model takes it."""
    content = message["content"]
    if not isinstance(content, str):
        content = "\n".join(part["text"] for part in content if part["type"] == "text")
    return {**message, "content": content}
