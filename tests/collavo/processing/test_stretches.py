"""Labels under every kind of tokenizer, and words of a conversation that look like control tokens.

``tests/fuzz/fuzz_text.py`` draws tokenizers at random; here are the kinds that models come with.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from PIL import Image
from tokenizers import Tokenizer, decoders, models, normalizers, processors, trainers
from tokenizers import pre_tokenizers as pre
from transformers import ByT5Tokenizer, PreTrainedTokenizerFast

from collavo.processing import CollavoProcessor, make_image_processor
from collavo.processing.chat_templates import CHAT_TEMPLATES, SYSTEM
from collavo.processing.stretches import Piece, encode_pieces
from collavo.processing.tokens import special_frame
from collavo.train.collator import CrayonCollator

SPECIAL = ["<unk>", "<pad>", "<s>", "</s>", "<image>"]
# What runs over the border of question and answer makes tokens that lie across it.
_BORDERS = "ASSISTANT: yes  no\n\nassistant\n\n Sure, it is #1 horse. caf\u00e9 ASSISTANT: \n"
TEXTS = [SYSTEM, "USER: What < / > object", *[_BORDERS] * 9]
BLANK = (
    "{% for m in messages %}{% if m['role'] == 'user' %}{{ 'USER: ' + m['content'] }}{% else %}"
    "{{ ' ASSISTANT: ' }}{% generation %}{{ m['content'] + eos_token }}{% endgeneration %}"
    "{% endif %}{% endfor %}{% if add_generation_prompt %}{{ ' ASSISTANT: ' }}{% endif %}"
)
SENTENCEPIECE = decoders.Sequence(
    [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()]
)


def trained(model: Any, trainer: Any, normalizer: Any, pre_tokenizer: Any, decoder: Any) -> Any:
    core = Tokenizer(model)
    core.normalizer, core.pre_tokenizer, core.decoder = normalizer, pre_tokenizer, decoder
    core.train_from_iterator(TEXTS, trainer)
    return core


def sentencepiece_bpe(normalizer: Any, pre_tokenizer: Any) -> Any:
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=SPECIAL, show_progress=False)
    model = models.BPE(unk_token="<unk>", fuse_unk=True)
    return trained(model, trainer, normalizer, pre_tokenizer, SENTENCEPIECE)


def byte_level() -> Any:
    trainer = trainers.BpeTrainer(
        vocab_size=500,
        special_tokens=SPECIAL,
        show_progress=False,
        initial_alphabet=pre.ByteLevel.alphabet(),
    )
    core = trained(
        models.BPE(), trainer, None, pre.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    )
    core.post_processor = processors.ByteLevel(trim_offsets=True)
    return core


def unigram() -> Any:
    trainer = trainers.UnigramTrainer(
        vocab_size=120, special_tokens=SPECIAL, unk_token="<unk>", show_progress=False
    )
    return trained(models.Unigram(), trainer, normalizers.NFKC(), pre.Metaspace(), SENTENCEPIECE)


def wordpiece() -> Any:
    trainer = trainers.WordPieceTrainer(vocab_size=200, special_tokens=SPECIAL, show_progress=False)
    return trained(
        models.WordPiece(unk_token="<unk>"),
        trainer,
        normalizers.NFC(),
        pre.BertPreTokenizer(),
        decoders.WordPiece(cleanup=False),
    )


def legacy() -> Any:
    """As Llama's was converted: a blank before every text, no pre-tokenizer."""
    marks = [normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")]
    return sentencepiece_bpe(normalizers.Sequence(marks), None)


def modern() -> Any:
    return sentencepiece_bpe(None, pre.Metaspace(prepend_scheme="first", split=False))


KINDS = {
    "legacy": legacy,
    "modern": modern,
    "byte level": byte_level,
    "unigram": unigram,
    "wordpiece": wordpiece,
}


def processor_of(kind: str, template: str | None = None) -> CollavoProcessor:
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=KINDS[kind](),
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
    )
    return CollavoProcessor(make_image_processor(8), tokenizer, grid=(2, 2), chat_template=template)


def talk(question: str, answer: str) -> list[dict[str, Any]]:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def spoken(processor: CollavoProcessor, turns: list[dict[str, Any]], **record: Any) -> str:
    """What the labels of one record say, after what comes before them."""
    batch = CrayonCollator(processor, object_text=False)([{"conversation": turns, **record}])
    ids, labels = batch["input_ids"][0], batch["labels"][0]
    kept = labels != -100
    assert torch.equal(labels[kept], ids[kept])
    first, last = kept.nonzero()[0, 0], kept.nonzero()[-1, 0]
    before, upto = (processor.tokenizer.decode(ids[:stop]) for stop in (first, last + 1))
    assert upto.startswith(before)
    return str(upto[len(before) :])


@pytest.mark.parametrize(
    "answer", ["yes", "yes  no", "\n\nyes", "\u0301 caf\u00e9", "\U0001f600", "Sure,\r\nit is #1"]
)
@pytest.mark.parametrize("kind", ["byte level", "legacy", "modern"])
def test_labels_are_the_answer_and_nothing_else(kind: str, answer: str) -> None:
    """The answer of two blanks lost one where offsets are trimmed; ":" and "yes" share a token."""
    if kind != "byte level":  # without bytes, what was not trained on is unknown
        answer = answer.replace("\u0301", "").replace("\U0001f600", "1").replace("\r", "")
    assert spoken(processor_of(kind), talk("What", answer)) == f" {answer}</s>"
    assert spoken(processor_of(kind, BLANK), talk("What", answer)) == f"{answer}</s>"


@pytest.mark.parametrize("kind", ["unigram", "wordpiece"])
def test_labels_under_tokenizers_that_do_not_keep_blanks(kind: str) -> None:
    for template in (None, BLANK, CHAT_TEMPLATES["demo"]):
        text = spoken(processor_of(kind, template), talk("no", "yes  Sure"))
        assert "".join(text.split()) == "yesSure</s>"


@pytest.mark.parametrize("template", ["demo", "blank"])
@pytest.mark.parametrize("kind", KINDS)
def test_what_stands_before_an_answer_is_the_prompt(kind: str, template: str) -> None:
    """In training the model sees, token by token, what generation will give it."""
    processor = processor_of(kind, BLANK if template == "blank" else None)
    batch = CrayonCollator(processor)([{"conversation": talk("What", "yes")}])
    length = int((batch["labels"][0] != -100).nonzero()[0])
    prompt = processor(text=processor.prompt(talk("What", "")[:1]), return_tensors="pt")
    assert batch["input_ids"][0, :length].tolist() == prompt["input_ids"][0].tolist()


@pytest.mark.parametrize("tag", ["<image>", "</s>", "<s>", "<objects>", "<image><image>"])
@pytest.mark.parametrize("kind", ["byte level", "legacy", "modern"])
def test_words_that_spell_a_control_token_are_words(kind: str, tag: str) -> None:
    """In the answer and in the question; an image there is stays the only one."""
    processor = processor_of(kind)
    text = f"no{tag} yes"
    image = Image.new("RGB", (8, 8))
    assert spoken(processor, talk(text, text), image=image) == f" {text}</s>"
    batch = CrayonCollator(processor)([{"conversation": talk(text, text), "image": image}])
    ids = batch["input_ids"][0].tolist()
    assert ids.count(processor.image_token_id) == 4
    assert ids.count(processor.tokenizer.eos_token_id) == 1


def test_a_tag_is_no_place_for_objects(tiny_processor: Any) -> None:
    """``<objects>`` in a question had the object text put there, or was deleted."""
    processor = tiny_processor()
    batch = CrayonCollator(processor)(
        [{"conversation": talk("What is <objects>", "yes"), "image": Image.new("RGB", (8, 8))}]
    )
    text = processor.tokenizer.decode(batch["input_ids"][0])
    assert text.count("None of detailed object information") == 1
    assert "USER: None of detailed object" in text and "What is <" in text


def test_more_markers_than_images_are_named(tiny_processor: Any) -> None:
    image = Image.new("RGB", (8, 8))
    with pytest.raises(ValueError, match=r"text\[0\]: expected no '<objects>', or one for each of"):
        tiny_processor()(text="<image> <objects> What is <objects>", images=image)


@pytest.mark.parametrize("kind", KINDS)
def test_a_long_conversation_is_tokenized_in_parts_alike(kind: str) -> None:
    """Behind a stop token a stretch is the same whatever lies before: linear, not quadratic."""
    processor = processor_of(kind)

    def encode(texts: list[str]) -> list[list[int]]:
        return list(processor.tokenizer(texts, add_special_tokens=False)["input_ids"])

    pieces = [
        Piece(text, answer)
        for _ in range(3)
        for text, answer in ((" USER: What no ASSISTANT:", False), (" yes  no</s>", True))
    ]
    stop = processor.tokenizer.eos_token_id
    lengths: list[int] = []

    def counted(texts: list[str]) -> list[list[int]]:
        lengths.extend(len(text) for text in texts)
        return encode(texts)

    in_parts = encode_pieces(pieces, counted, isolated={stop: "</s>"})
    assert in_parts == encode_pieces(pieces, encode)
    assert max(lengths) < 2 * sum(len(piece.text) for piece in pieces[:2])


def test_a_tokenizer_in_plain_python() -> None:
    """It cannot tell where its tokens stand in the text, which nothing asks for."""
    tokenizer = ByT5Tokenizer()
    tokenizer.add_tokens(["<image>"], special_tokens=True)
    processor = CollavoProcessor(make_image_processor(8), tokenizer, grid=(2, 2))
    assert spoken(processor, talk("H\u00e9?", "caf\u00e9")) == " caf\u00e9</s>"


@pytest.mark.parametrize("side", ["left", "right"])
def test_the_tokens_around_a_text_stay_when_it_is_cut(side: str) -> None:
    """A start token and a second stop token of the tokenizer's own; neither is labelled.

    The end is cut off on whatever side the tokenizer cuts texts: behind a whole answer.
    """
    processor = processor_of("byte level")
    core = processor.tokenizer.backend_tokenizer
    ids = [(name, core.token_to_id(name)) for name in ("<s>", "</s>")]
    core.post_processor = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=ids)
    processor.tokenizer.truncation_side = side
    record = {"conversation": [*talk("What", "yes no"), *talk("What", "no")]}
    whole = CrayonCollator(processor)([record])
    length = whole["input_ids"].shape[1]
    cut = CrayonCollator(processor, max_length=length - 1)([record])
    begin, end = (dict(ids)[name] for name in ("<s>", "</s>"))
    for batch in (whole, cut):
        row, labels = batch["input_ids"][0].tolist(), batch["labels"][0].tolist()
        assert (row[0], row[-1]) == (begin, end) and (labels[0], labels[-1]) == (-100, -100)
    stops = (whole["labels"][0] == end).nonzero()[:, 0].tolist()
    assert len(stops) == 2 and cut["input_ids"].shape[1] == stops[0] + 2
    assert torch.equal(cut["input_ids"][0, :-1], whole["input_ids"][0, : stops[0] + 1])


def test_a_frame_that_is_none() -> None:
    with pytest.raises(ValueError, match="tokenizer: expected special tokens before and behind"):
        special_frame([1, 2], [0, 1, 3])


def test_a_conversation_that_the_template_refuses_is_named(tiny_processor: Any) -> None:
    """A jinja error is no error that a run survives, nor does it say which record it was."""
    turns = [*talk("What", "yes"), {"role": "system", "content": "no"}]
    with pytest.raises(ValueError, match=r"a\.json: \[3\]: the chat template does not take it"):
        CrayonCollator(tiny_processor())([{"conversation": turns, "name": "a.json: [3]"}])
