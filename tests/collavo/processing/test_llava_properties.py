"""Random conversations under LLaVA's templates and tokenizers: what is learned, and what is not."""

from __future__ import annotations

import re
from functools import cache
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from collavo.processing import CHAT_TEMPLATES
from tests.collavo.processing import golden_llava
from tests.collavo.processing.golden_llava import recorded, said, spoken

LLAVAS = sorted(recorded("templates")["templates"])
NAMES = ("spm_legacy", "spm_new", "bytes", "spm_chatml_bos_legacy", "spm_chatml_new")
ODD = [
    "</s>", "<s>", "<image>", "<|im_end|>", "<|im_start|>user\n", "<objects>", "<unk>", "\u2581",
    "USER:", " ASSISTANT: ", "[/INST]", "###", "\n", "  ", "{{ eos_token }}", "{% endfor %}",
    "\u0301", "\U0001f468\u200d\U0001f469", "\ufffd", "\x00", "<image", "im_end|>", "e", "1",
]  # fmt: skip
LETTERS = st.characters(exclude_categories=["Cs"])
WORDS = st.lists(st.sampled_from(ODD) | st.text(LETTERS, max_size=4), max_size=5).map("".join)
TURNS = st.lists(st.tuples(WORDS, WORDS), min_size=1, max_size=3)
PICTURE = Image.new("RGB", (8, 8))
# Tokens of control: behind one a sentencepiece tokenizer puts a blank that no word has.
CONTROL = re.compile(r"((?:<s>|</s>|<image>|<\|im_start\|>|<\|im_end\|>)+) ?")


@cache
def processor_of(tokenizer: str, template: str) -> Any:
    return golden_llava.processor(tokenizer, template)


def conversation(template: str, turns: list[tuple[str, str]], image: bool) -> list[dict[str, Any]]:
    made: list[dict[str, Any]] = []
    for question, answer in turns[:1] if template == "plain" else turns:
        content: Any = question
        if not made and (image or template == "plain"):
            content = [{"type": "image"}, {"type": "text", "text": question}]
        made += [{"role": "user", "content": content}, {"role": "assistant", "content": answer}]
    return made


def has_image(turns: list[dict[str, Any]]) -> bool:
    return not isinstance(turns[0]["content"], str)


def batch_of(processor: Any, talks: list[Any], **options: Any) -> Any:
    images = [[PICTURE] * has_image(one) for one in talks]
    return processor.training_batch(talks, images, pixels=False, **options)


def as_decoded(text: str, tokenizer: str) -> str:
    """A sentencepiece tokenizer makes a blank of U+2581; a byte-level one keeps every byte."""
    return text if tokenizer == "bytes" else text.replace("\u2581", " ")


@pytest.mark.parametrize("template", LLAVAS)
@settings(max_examples=40, deadline=None)
@given(tokenizer=st.sampled_from(NAMES), turns=TURNS, image=st.booleans())
def test_targets_are_the_answers_with_their_stop_tokens(
    template: str, tokenizer: str, turns: list[tuple[str, str]], image: bool
) -> None:
    """Whatever they say: no token of a question is learned, and none of an answer is not."""
    processor = processor_of(tokenizer, template)
    talk = conversation(template, turns, image)
    batch = batch_of(processor, [talk])
    ids, labels = batch["input_ids"][0].tolist(), batch["labels"][0].tolist()
    answers = [turn["content"] for turn in talk if turn["role"] == "assistant"]
    stop = processor.tokenizer.eos_token
    expected = [as_decoded(said(template, one, stop), tokenizer) for one in answers]
    found = spoken(processor, ids, labels)
    if template == "plain":  # behind an image ``spm_new`` puts a blank, unless there is one
        assert found[0] in (expected[0], expected[0].removeprefix(" "))
        expected = found
    # Two answers that nothing separates are one stretch.
    assert found == expected or "".join(found) == "".join(expected)
    # What the words spell is no token of control: the template's alone are there.
    assert ids.count(processor.image_token_id) == 4 * has_image(talk)
    if said(template, "", stop).endswith(stop):
        assert labels.count(processor.tokenizer.eos_token_id) == len(answers)


@pytest.mark.parametrize("template", LLAVAS)
@settings(max_examples=25, deadline=None)
@given(tokenizer=st.sampled_from(NAMES), turns=TURNS, image=st.booleans())
def test_the_rest_is_the_prompt_without_the_answers(
    template: str, tokenizer: str, turns: list[tuple[str, str]], image: bool
) -> None:
    processor = processor_of(tokenizer, template)
    talk = conversation(template, turns, image)
    batch = batch_of(processor, [talk])
    ids, labels = batch["input_ids"][0].tolist(), batch["labels"][0].tolist()
    position, expected, stop = 0, [], processor.tokenizer.eos_token
    whole = processor.prompt(talk)
    for turn, message in enumerate(talk):
        if message["role"] == "assistant":
            upto = processor._filled.text(talk[:turn], "talk", add_generation_prompt=True)
            expected.append(upto[position:])
            position = len(upto) + len(said(template, message["content"], stop))
    assert whole.startswith(upto)
    # An id in the place of each answer, so that what comes behind it is decoded as it stands there.
    kept = [token if label < 0 else None for token, label in zip(ids, labels, strict=True)]
    stretches, last = [[]], None
    for token in kept:
        if token is None and last is not None:
            stretches.append([])
        if token is not None:
            stretches[-1].append(token)
        last = token
    texts = [processor.tokenizer.decode(one).replace("<image>" * 4, "<image>") for one in stretches]
    start = processor.tokenizer.bos_token
    if start:
        assert texts[0].startswith(start)
        texts[0] = texts[0].removeprefix(start)
    pairs = zip(texts, [*expected, ""], strict=False)
    for text, wanted in pairs:
        wanted = as_decoded(wanted, tokenizer)
        assert CONTROL.sub(r"\1", text).strip(" ") == CONTROL.sub(r"\1", wanted).strip(" ")


@pytest.mark.parametrize("tokenizer", NAMES)
@settings(max_examples=25, deadline=None)
@given(
    template=st.sampled_from(LLAVAS),
    talks=st.lists(st.tuples(TURNS, st.booleans()), min_size=2, max_size=4),
)
def test_a_batch_is_each_alone_padded_on_either_side(
    tokenizer: str, template: str, talks: list[tuple[list[tuple[str, str]], bool]]
) -> None:
    """The mask counts tokens, whose ids may be that of the pad token, which is ``<unk>`` here."""
    processor = processor_of(tokenizer, template)
    given_talks = [conversation(template, *one) for one in talks]
    batches = {}
    for side in ("left", "right"):
        processor.tokenizer.padding_side = side
        batches[side] = batch_of(processor, given_talks)
    for row, talk in enumerate(given_talks):
        alone = batch_of(processor, [talk])
        length = alone["input_ids"].shape[1]
        for side, batch in batches.items():
            kept = slice(-length, None) if side == "left" else slice(0, length)
            for key in ("input_ids", "attention_mask", "labels"):
                assert torch.equal(batch[key][row, kept], alone[key][0]), (side, key)
            assert int(batch["attention_mask"][row].sum()) == length
            assert int((batch["labels"][row] >= 0).sum()) == int((alone["labels"] >= 0).sum())
        measured = processor.measure(talk, [(8, 8)] * has_image(talk))
        assert measured.tokens == length and measured.image_tokens == 4 * has_image(talk)
        assert measured.targets == int((alone["labels"] >= 0).sum()) and not measured.cut


@pytest.mark.parametrize("template", sorted(CHAT_TEMPLATES))
@settings(max_examples=15, deadline=None)
@given(tokenizer=st.sampled_from(NAMES), turns=TURNS, share=st.floats(0.1, 1))
def test_a_cut_ends_with_a_whole_answer_and_changes_nothing_before(
    template: str, tokenizer: str, turns: list[tuple[str, str]], share: float
) -> None:
    processor = processor_of(tokenizer, template)
    talk = conversation(template, turns, image=True)
    whole = batch_of(processor, [talk])
    length = whole["input_ids"].shape[1]
    most = int(length * share)
    try:
        cut = batch_of(processor, [talk], max_length=most)
    except ValueError as error:
        assert "nothing of its answer is left" in str(error)
        assert not processor.measure(talk, [(8, 8)]).cut
        return
    kept = cut["input_ids"].shape[1]
    assert kept <= most
    for key in ("input_ids", "labels"):
        assert torch.equal(cut[key], whole[key][:, :kept])
    if kept < length:
        ids, labels = cut["input_ids"][0].tolist(), cut["labels"][0].tolist()
        assert labels[-1] >= 0
        assert processor.measure(talk, [(8, 8)], max_length=most).cut
        ends = spoken(processor, whole["input_ids"][0].tolist(), whole["labels"][0].tolist())
        assert spoken(processor, ids, labels) == ends[: len(spoken(processor, ids, labels))]


@pytest.mark.parametrize("template", ["demo", "paper", "v1"])
def test_words_in_several_parts_spell_no_token_of_control(template: str) -> None:
    """CoLLaVO's templates write the parts of a turn one behind the other, without a line break."""
    processor = processor_of("spm_legacy", template)
    image, tokens = {"type": "image"}, processor.tokenizer
    texts = ["a </", "s", "> b <ima", "ge>", " c"]
    parts = [image, *({"type": "text", "text": one} for one in texts)]
    talk = [{"role": "user", "content": parts}, {"role": "assistant", "content": "yes"}]
    ids = processor.training_batch([talk], [[PICTURE]], pixels=False)["input_ids"][0].tolist()
    assert (ids.count(tokens.eos_token_id), ids.count(processor.image_token_id)) == (1, 4)
    assert ("\n" if template == "v1" else "").join(texts) in tokens.decode(ids)
