"""Labels are checked by decoding them, and what is wrong on purpose is found."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import transformers
from conversations import (
    ENDLESS_CHATML,
    HEADED_CHATML,
    MARKED_CHATML,
    ONE_TURN,
    PLAIN_CHATML,
    TWO_TURNS,
    WRONG_CHATML,
    characters,
    composing,
    records,
    turns,
)
from PIL import Image

from collavo.conversations.llava import order_images, read_llava
from collavo.loss_masks import LabelReport, inspect_labels
from collavo.loss_masks.processors import PromptSource
from collavo.panoptic.coco_index import Skipped
from collavo.processing import CHAT_TEMPLATES, CollavoProcessor
from tests.collavo.processing import golden_llava, tiny_llavas
from tests.collavo.tiny import tiny_processor, tiny_tokenizer


def only_fault(report: LabelReport) -> str:
    assert not report.passed
    (fault,) = report.failures
    return fault.reason


def golden_records() -> list[Any]:
    """The recorded conversations, read as training reads them; a few are faults."""
    made: list[Any] = []
    for one in golden_llava.recorded("conversations"):
        entry = {**one, "image": "a.png"} if one["has_image"] else one
        try:
            record = read_llava(entry, one["case"])
        except ValueError as error:
            made.append(Skipped(one["case"], str(error)))
        else:
            made.append({**record, "conversation": order_images(record["conversation"], "first")})
    return made


@pytest.mark.parametrize("name", golden_llava.TOKENIZERS)
@pytest.mark.parametrize("template", [one for one in CHAT_TEMPLATES if one != "plain"])
def test_labels_of_recorded_conversations_are_right(name: str, template: str) -> None:
    """Empty answers, stop tokens in words, several images, odd blanks: under every template."""
    processor = golden_llava.processor(name, template, object_text=False)
    report = inspect_labels(processor, golden_records())
    assert report.passed, report.failures[:2]
    assert report.conversations == 27
    for way in ("ours", "generation"):
        assert report.ways[way].wrong[1:] == (0, 0, 0), report.ways[way].example
    # Most have several answers, and every one but the last is lost.
    assert report.ways["last"].wrong.too_few > 100
    assert report.ways["copy"].wrong.too_many > report.targets


def test_captions_are_trained_with_their_line_break() -> None:
    """Without a question, a stop token is the line break behind."""
    report = inspect_labels(golden_llava.processor("spm_legacy", "plain"), golden_records())
    assert report.passed
    assert report.conversations == 9  # the template takes nothing else
    assert report.ways["last"].refused == 9


@pytest.mark.parametrize("name", list(tiny_llavas.BUILDERS))
def test_processors_of_transformers(name: str) -> None:
    """Their own tokens for a picture, folded; and none of these is a target."""
    processor = tiny_llavas.BUILDERS[name]()
    texts = records(TWO_TURNS, image=True) + records(ONE_TURN)
    report = inspect_labels(processor, texts)
    assert report.passed, report.failures
    assert (report.images, report.skipped) == (1, [])
    own = CollavoProcessor.from_llava(processor)
    made = own(images=[[_black(336)]], text=[own.image_token], return_tensors="pt")
    assert report.image_tokens == int((made["input_ids"] == own.image_token_id).sum())
    wrong = report.ways["copy"].wrong
    assert wrong.image_tokens == report.image_tokens
    # Its own tokens are these but for the start token.
    assert report.tokens - 1 <= wrong.tokens <= report.tokens


def _black(side: int) -> Image.Image:
    return Image.new("RGB", (side, side))


def idefics2() -> Any:
    images = tiny_llavas.images_of(
        "Idefics2ImageProcessorPil",
        size={"shortest_edge": 24, "longest_edge": 48},
        do_image_splitting=False,
    )
    return tiny_llavas.build(
        transformers.Idefics2Processor,
        image_processor=images,
        tokenizer=tiny_llavas.tokenizer("<fake_token_around_image>", "<end_of_utterance>"),
        image_seq_len=9,
        chat_template=tiny_llavas.template(),
    )


def gemma3() -> Any:
    names = {"image_token": "<soft>", "boi_token": "<boi>", "eoi_token": "<eoi>"}
    images = tiny_llavas.images_of("Gemma3ImageProcessorPil", size={"height": 24, "width": 24})
    return tiny_llavas.build(
        transformers.Gemma3Processor,
        image_processor=images,
        tokenizer=tiny_llavas.tokenizer(**names),
        image_seq_length=9,
        chat_template=tiny_llavas.template("<boi>"),
    )


@pytest.mark.parametrize("build", [idefics2, gemma3])
def test_processors_of_which_nothing_is_known(build: Callable[[], Any]) -> None:
    """Of no family that has a crayon: text by the template, a picture's tokens by the processor."""
    report = inspect_labels(build(), records(TWO_TURNS, image=True) + records(ONE_TURN))
    assert report.passed, report.failures
    assert (report.images, report.image_tokens, report.skipped) == (1, 9, [])
    assert report.ways["ours"].wrong[1:] == (0, 0, 0)
    assert report.ways["copy"].wrong.image_tokens == 9


def test_a_template_that_has_no_place_for_images_is_named() -> None:
    """Another model's writes no placeholder that the processor knows: the picture would be lost."""
    texts = records(TWO_TURNS, image=True) + records(ONE_TURN)
    report = inspect_labels(gemma3(), texts, template=CHAT_TEMPLATES["v1"])
    assert (report.conversations, report.images) == (1, 0)
    assert "expected one '<boi>' for each of 1 images, got 0; is the chat template another" in (
        report.skipped[0].reason
    )


@pytest.mark.parametrize("build", [characters, tiny_tokenizer, composing])
@pytest.mark.parametrize("template", [PLAIN_CHATML, MARKED_CHATML])
def test_tokenizers_alone(build: Callable[[], Any], template: str) -> None:
    """With a generation block and without; pictures are left out, and that is said."""
    texts = records(TWO_TURNS, ("e", "\u0301 a horse"), ONE_TURN) + records(ONE_TURN, image=True)
    report = inspect_labels(build(), texts, template=template)
    assert report.passed, report.failures
    assert (report.conversations, report.images, report.left_out_images) == (4, 0, 1)


@pytest.mark.parametrize(
    ("template", "said"),
    [
        (WRONG_CHATML, "but they are 'What is it?<|im_end|>'"),
        (ENDLESS_CHATML, "answer 1, 'a horse<|im_end|>', but they are 'a horse'"),
        (HEADED_CHATML, "they are '<|im_start|>assistant\\na horse<|im_end|>'"),
    ],
)
def test_a_template_that_is_wrong_fails(template: str, said: str) -> None:
    report = inspect_labels(characters(), records(TWO_TURNS), template=template)
    assert said in only_fault(report)
    own, theirs = report.ways["ours"], report.ways["generation"]
    assert own.wrong.too_many + own.wrong.too_few > 0
    assert own.wrong[1:] == theirs.wrong[1:]


MISTAKES: dict[str, Callable[[list[int], list[int]], list[int]]] = {
    "one to the left": lambda ids, labels: [*labels[1:], -100],
    "one to the right": lambda ids, labels: [-100, *labels[:-1]],
    "everything": lambda ids, labels: list(ids),
    "nothing of the first": lambda ids, labels: [-100] * 60 + labels[60:],
    "two runs that are one": lambda ids, labels: [
        token if labels[place] != -100 or 50 < place < len(ids) - 3 else -100
        for place, token in enumerate(ids)
    ],
}


@pytest.mark.parametrize("mistake", list(MISTAKES))
def test_labels_that_are_wrong_fail(mistake: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The check does not follow from what made the labels."""
    labelled = PromptSource.labelled

    def wrong(self: PromptSource, *args: Any) -> tuple[list[int], list[int]]:
        ids, labels = labelled(self, *args)
        return ids, MISTAKES[mistake](ids, labels)

    texts = records(TWO_TURNS)
    assert inspect_labels(characters(), texts, template=PLAIN_CHATML).passed
    monkeypatch.setattr(PromptSource, "labelled", wrong)
    report = inspect_labels(characters(), texts, template=PLAIN_CHATML)
    only_fault(report)
    wrong_tokens = report.ways["ours"].wrong
    assert wrong_tokens.too_many + wrong_tokens.too_few > 0


def test_an_image_token_among_the_targets_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    labelled = PromptSource.labelled

    def wrong(self: PromptSource, *args: Any) -> tuple[list[int], list[int]]:
        ids, labels = labelled(self, *args)
        return ids, [
            t if t in self.image_ids else label for t, label in zip(ids, labels, strict=True)
        ]

    monkeypatch.setattr(PromptSource, "labelled", wrong)
    report = inspect_labels(tiny_processor(), records(TWO_TURNS, image=True))
    assert only_fault(report) == "an image token is a target"
    assert report.ways["ours"].wrong.image_tokens == 16


def test_an_answer_that_the_template_reads_is_not_passed_over() -> None:
    """What cannot be followed is a failure, not something that passes."""
    reads = "{{ 'A' if 'red' in messages[-1]['content'] else 'B' }}" + MARKED_CHATML
    report = inspect_labels(characters(), records(TWO_TURNS), template=reads)
    assert "cannot be followed" in only_fault(report)


def test_what_a_tokenizer_cannot_give_back_is_no_failure() -> None:
    """A tab that is unknown, at the start of an answer where blanks are nobody's; an accent."""
    texts = records(("Is it?", "\tno"), ("Is it?", "\t"), ("e\u0301?", "\u65e5 e\u0301"))
    for tokenizer in (characters(), composing()):
        report = inspect_labels(tokenizer, texts, template=PLAIN_CHATML)
        assert report.passed, report.failures


def test_what_ends_the_whole_is_no_stop_token() -> None:
    """Behind the last answer a template may have more; it is learned or not, as the block says."""
    footer = MARKED_CHATML + "{{ '</s>' }}"
    report = inspect_labels(characters(), records(TWO_TURNS, ONE_TURN), template=footer)
    assert report.passed, report.failures
    at_the_end_alone = (
        "{% for m in messages %}{{ m['role'] + ': ' }}{% if m['role'] == 'assistant' %}"
        "{% generation %}{{ m['content'] + (eos_token if loop.last else '') }}{% endgeneration %}"
        "{% else %}{{ m['content'] }}{% endif %}{{ '\n' if not loop.last else '' }}{% endfor %}"
    )
    report = inspect_labels(characters(), records(TWO_TURNS, ONE_TURN), template=at_the_end_alone)
    assert report.passed, report.failures


THINKING = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}"
    "{{ '<think></think>' if m['role'] == 'assistant' and loop.last else '' }}"
    "{{ m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{{ '<|im_start|>assistant\n' if add_generation_prompt else '' }}"
)
ENDING = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' }}"
    "{% endfor %}{{ '<|im_start|>assistant\n' if add_generation_prompt else eos_token }}"
)


@pytest.mark.parametrize("template", [THINKING, ENDING])
def test_templates_that_do_more_than_add_text(template: str) -> None:
    """The last answer is written in another way than those before, or the whole has an end."""
    report = inspect_labels(characters(), records(TWO_TURNS, ONE_TURN), template=template)
    assert report.passed, report.failures
    assert (report.conversations, report.skipped) == (2, [])
    assert report.ways["ours"].wrong[1:] == (0, 0, 0)
    # What training with this package refuses is left out and said.
    processor = tiny_processor(chat_template=template)
    report = inspect_labels(processor, records(TWO_TURNS, ("Is it?", "no")))
    assert "put the assistant's words into a {% generation %} block" in report.skipped[0].reason


def test_blanks_that_a_template_trims_are_nobodys() -> None:
    trims = MARKED_CHATML.replace(
        "m['content'] + '<|im_end|>'", "m['content'] | trim + '<|im_end|>'"
    )
    texts = records((" Is it? ", " yes \n"), ("What?", "no"))
    report = inspect_labels(characters(), texts, template=trims)
    assert report.passed, report.failures
    assert report.ways["generation"].wrong[1:] == (0, 0, 0)


def test_counts_cuts_and_what_is_skipped() -> None:
    texts: list[Any] = records(TWO_TURNS, ONE_TURN, ("Is it red?", "a horse " * 40))
    texts += [Skipped("data.json: [3]", "no turns"), {"conversation": turns("Who?")}]
    tokenizer = characters()
    whole = inspect_labels(tokenizer, texts, template=PLAIN_CHATML)
    lengths = sorted((length for length, _ in whole.longest), reverse=True)
    assert [name for _, name in whole.longest] == ["records[2]", "records[0]", "records[1]"]
    assert (whole.tokens, whole.cut, len(whole.skipped)) == (sum(lengths), 0, 2)
    assert whole.targets == len("a horse") + len("yes, red") + len("no") + len("a horse " * 40) + 4
    cut = inspect_labels(tokenizer, texts, template=PLAIN_CHATML, max_length=lengths[1] - 2)
    assert cut.passed, cut.failures
    assert (cut.conversations, cut.cut) == (2, 1)
    assert [one.name for one in cut.skipped] == ["records[2]", "data.json: [3]", "records[4]"]
    assert cut.targets == len("a horse") + len("no") + 2


def test_the_ten_longest_are_named() -> None:
    texts = records(*(("Is it red?", "no " * (i % 13)) for i in range(40)))
    report = inspect_labels(characters(), texts, template=PLAIN_CHATML)
    assert [name for _, name in report.longest[:3]] == ["records[12]", "records[25]", "records[38]"]
    assert len(report.longest) == 10


def test_sizes_of_pictures_count(tmp_path: Any) -> None:
    """Where a picture's tokens depend on its size it is read; without a folder that is said."""
    _black(24).save(tmp_path / "none.png")
    processor = tiny_llavas.llava_next()
    texts = records(ONE_TURN, image=True)
    assert inspect_labels(processor, texts).unknown_sizes == 1
    report = inspect_labels(processor, texts, images=tmp_path)
    assert report.unknown_sizes == 0
    own = processor(images=[_black(24)], text=["<image>"])["input_ids"][0]
    assert report.image_tokens == list(own).count(processor.image_token_id)
    gone = inspect_labels(processor, texts * 2 + records(ONE_TURN), images=tmp_path / "gone")
    assert [one.name for one in gone.skipped] == ["records[0]", "records[1]"]


def test_labels_are_those_of_a_training_batch() -> None:
    """What is inspected without a picture is what a batch with one has."""
    processor = tiny_processor(object_text=True)
    conversation = [
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Is it red?"}]},
        {"role": "assistant", "content": "no"},
    ]
    batch = processor.training_batch([conversation], [[_black(16)]])
    made = processor.sequence(conversation, [(16, 16)])
    assert made.ids == batch["input_ids"].tolist()
    assert made.labels == batch["labels"].tolist()


@pytest.mark.parametrize(
    ("processor", "texts", "kind", "said"),
    [
        (3, records(ONE_TURN), TypeError, "expected a processor with a tokenizer, or a tokenizer"),
        (characters(), records(ONE_TURN), ValueError, "expected a chat template, got none"),
        (tiny_processor(), [], ValueError, "expected a conversation with an answer, got none"),
        (tiny_processor(), [{"conversation": turns("Who?")}], ValueError, "records\\[0\\]: "),
    ],
)
def test_bad_input(processor: Any, texts: Any, kind: type[Exception], said: str) -> None:
    with pytest.raises(kind, match=said):
        inspect_labels(processor, texts)


def test_no_length_of_nothing() -> None:
    with pytest.raises(ValueError, match="max_length: expected at least 1, got 0"):
        inspect_labels(tiny_processor(), records(ONE_TURN), max_length=0)


def test_what_another_class_raises_is_a_fault_of_its_record(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """One picture that a processor cannot take does not end the look at all the others."""
    processor = idefics2()

    def fails(*args: Any, **kwargs: Any) -> Any:
        raise KeyError("tile")

    monkeypatch.setattr(type(processor), "__call__", fails)
    report = inspect_labels(processor, records(TWO_TURNS, image=True) + records(ONE_TURN))
    assert report.passed and report.conversations == 1
    assert report.skipped[0].reason == "Idefics2Processor takes no such picture ('tile')"
