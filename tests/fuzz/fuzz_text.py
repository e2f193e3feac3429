"""Random tokenizers and random conversations: what is labelled is the answer, all of it, and once.

    python -m tests.fuzz.fuzz_text --seconds 120 --seed 0

A case is a tokenizer (model, normaliser, pre-tokenizer, decoder and special tokens around a text,
drawn and trained on a few sentences), a chat template, and a conversation of odd texts. Checked is
what labels are, and not how they are found: the decoded text grows by each answer and its stop
token exactly where labels stand, the stop token is labelled once, what stands before the first
answer are the tokens of the prompt, and no word of a conversation becomes a token of control.
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

from PIL import Image
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, processors, trainers
from tokenizers import pre_tokenizers as pre
from transformers import PreTrainedTokenizerFast

from collavo.processing import CollavoProcessor, make_image_processor
from collavo.processing.chat_templates import CHAT_TEMPLATES, SYSTEM
from collavo.train.collator import CrayonCollator
from tests.fuzz.command_line import run_for_a_time

CORPUS = [
    SYSTEM,
    "USER: What is in this picture? ASSISTANT: Sure, it is #1 horse, #2 horse, #1 sky",
    " ASSISTANT: yes  no\n\n [UNUSED_TOKEN_146]user\n[UNUSED_TOKEN_145]\n assistant\n\n yes: no.",
    "(#1 horse) [0.06, 0.38, 0.27, 0.91], Q:yes A:no 1234 12 What\u2019s caf\u00e9 cafe\u0301",
    "an <image> tag, <objects>, </s> ends; \u5927\u5bb6\u597d \u0645\u0631\u062d \U0001f600",
] * 4
TURN_ENDS = ("[UNUSED_TOKEN_145]", "[UNUSED_TOKEN_146]")
LLAVA_ENDS = ("<|im_start|>", "<|im_end|>")
SPECIAL = ("<unk>", "<pad>", "<s>", "</s>", "<image>", "[CLS]", "[SEP]", *TURN_ENDS, *LLAVA_ENDS)
ODD = [
    "\u0301", "e\u0301", "\u00e9", "\u200b", "\u200d", "\u202e", "\u0645\u0631\u062d\u0628\u0627",
    "\U0001f468\u200d\U0001f469\u200d\U0001f467", "\U0001f1e9\U0001f1ea", "\ufe0f", "\r\n", "\n",
    "\t", "  ", " ", "\u00a0", "\u3000", "\ufeff", "\x00", "\x07", "\ufb01", "\u00bd", "\u0130",
    "\u1e9e", "\uac00", "\u1100\u1161", "\ufdd0", "\U0010ffff", "\u5927\u5bb6", "<", ">", ":", ".",
    "1234", "0.06", "yes", "no", " no", "yes ", "horse", "#1", "What", "?", "[", "]", "\\",
    "{{", "%}",
]  # fmt: skip
TAGS = ["<image>", "</s>", "<s>", "<objects>", "[SEP]", "<unk>", "<image", "image>"]
LLAVAS = ("v1", "llama_2", "mistral_instruct", "mpt")
_TURNS = (
    "{{%- for m in messages -%}}{{%- set text = m['content'] if m['content'] is string else "
    "(m['content'] | selectattr('type', 'eq', 'text') | map(attribute='text') | join) -%}}"
    "{{%- if m['content'] is not string -%}}{{%- for p in m['content'] if p['type'] == 'image' -%}}"
    "{{{{- '<image>' -}}}}{{%- endfor -%}}{{%- endif -%}}"
    "{{%- if m['role'] == 'user' -%}}{{{{- '{user}' + text -}}}}"
    "{{%- else -%}}{{{{- '{start}' -}}}}{{%- generation -%}}{{{{- text + eos_token -}}}}"
    "{{%- endgeneration -%}}{{%- endif -%}}{{%- endfor -%}}"
    "{{%- if add_generation_prompt -%}}{{{{- '{start}' -}}}}{{%- endif -%}}"
)
TEMPLATES = {
    "demo": CHAT_TEMPLATES["demo"],
    "eval": CHAT_TEMPLATES["eval"],
    "blank": _TURNS.format(user="USER: ", start=" ASSISTANT: "),
    "bare": _TURNS.format(user="", start=""),
    "letters": _TURNS.format(user="Q", start="A"),
    "lines": _TURNS.format(user="\\n", start="\\n"),
    # Those of LLaVA that stop with a token; a caption takes no conversation.
    **{name: CHAT_TEMPLATES[name] for name in LLAVAS},
}
NORMALIZERS: dict[str, Any] = {
    "none": lambda: None,
    "legacy": lambda: normalizers.Sequence(
        [normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")]
    ),
    "nfc": normalizers.NFC,
    "nfd": normalizers.NFD,
    "nfkc": normalizers.NFKC,
    "nfkd lower": lambda: normalizers.Sequence([normalizers.NFKD(), normalizers.Lowercase()]),
    "bert": normalizers.BertNormalizer,
    "accents": lambda: normalizers.Sequence([normalizers.NFD(), normalizers.StripAccents()]),
    "strip": normalizers.Strip,
    "nmt": lambda: normalizers.Sequence(
        [normalizers.Nmt(), normalizers.NFKC(), normalizers.Replace(Regex(" {2,}"), " ")]
    ),
}
PRE_TOKENIZERS: dict[str, Any] = {
    "none": lambda: None,
    "bytes": lambda: pre.ByteLevel(add_prefix_space=False),
    "bytes blank": lambda: pre.ByteLevel(add_prefix_space=True),
    "bytes whole": lambda: pre.ByteLevel(add_prefix_space=False, use_regex=False),
    "bytes digits": lambda: pre.Sequence(
        [
            pre.Split(Regex(r"\p{N}{1,3}|\s+(?!\S)|\s+|[^\s\p{N}]+"), "isolated"),
            pre.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    ),
    "metaspace first": lambda: pre.Metaspace(prepend_scheme="first", split=False),
    "metaspace always": lambda: pre.Metaspace(prepend_scheme="always"),
    "metaspace never": lambda: pre.Metaspace(prepend_scheme="never"),
    "whitespace": pre.Whitespace,
    "whitespace split": pre.WhitespaceSplit,
    "bert": pre.BertPreTokenizer,
    "punctuation": pre.Punctuation,
    "digits": lambda: pre.Digits(individual_digits=True),
    "scripts": pre.UnicodeScripts,
    "blanks": lambda: pre.CharDelimiterSplit(" "),
    "lengths": lambda: pre.FixedLength(length=3),
}
# Parts that nobody builds together give back no text: bytes of what is no byte, "##" of a blank.
_WORDS = ("whitespace", "whitespace split", "bert", "punctuation", "blanks")
_WHOLE = ("none", "digits", "punctuation")
_INSIDE_TAG = re.compile(
    "|".join(f"(?<={re.escape(one[0])})(?={re.escape(one[1:])})" for one in (*SPECIAL, "<objects>"))
)
_BLANKS = "a:b  c\n d.e"
MODELS = ("bpe", "bpe bytes", "bpe suffix", "unigram", "wordpiece", "wordlevel")
AROUND = ("none", "bos", "both", "trim")


@dataclass(frozen=True)
class Case:
    """A tokenizer's parts, a template and a conversation."""

    model: str
    normalizer: str
    pre_tokenizer: str
    around: str
    side: str
    template: str
    image: bool
    turns: tuple[tuple[str, str], ...]


def draw(rng: random.Random) -> Case:
    """Draw a case."""

    def words() -> str:
        kinds = (TAGS if rng.random() < 0.15 else ODD for _ in range(rng.randrange(7)))
        return "".join(rng.choice(kind) for kind in kinds)

    roles = ["user", "assistant"] * rng.randrange(1, 3)
    turns = [(role, words()) for role in roles[rng.random() < 0.1 :]]
    model, normalizer = rng.choice(MODELS), rng.choice(list(NORMALIZERS))
    whole = model in ("bpe suffix", "wordpiece", "wordlevel")
    splits = _WORDS if whole else _WHOLE if normalizer == "legacy" else list(PRE_TOKENIZERS)
    pre_tokenizer = rng.choice(splits)
    if pre_tokenizer == "scripts":  # it drops what has no script, where a text begins with it
        turns = [
            (role, text.replace("\U0010ffff", "").replace("\ufdd0", "")) for role, text in turns
        ]
    return Case(
        model=model,
        normalizer="bert" if whole and normalizer == "legacy" else normalizer,
        pre_tokenizer=pre_tokenizer,
        around=rng.choice(AROUND),
        side=rng.choice(["left", "right"]),
        template=rng.choice(list(TEMPLATES)),
        image=rng.random() < 0.3,
        turns=tuple(turns),
    )


@cache
def trained(model: str, normalizer: str, pre_tokenizer: str) -> str:
    """Train a tokenizer on the few sentences; returns its JSON, since tokenizers are changed."""
    bytes_ = [f"<0x{value:02X}>" for value in range(256)]
    fallback = model == "bpe bytes"
    kinds: dict[str, Any] = {
        "bpe": lambda: models.BPE(unk_token="<unk>", fuse_unk=True),
        "bpe bytes": lambda: models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True),
        "bpe suffix": lambda: models.BPE(unk_token="<unk>", end_of_word_suffix="</w>"),
        "unigram": models.Unigram,
        "wordpiece": lambda: models.WordPiece(unk_token="<unk>"),
        "wordlevel": lambda: models.WordLevel(unk_token="<unk>"),
    }
    core = Tokenizer(kinds[model]())
    core.normalizer = NORMALIZERS[normalizer]()
    core.pre_tokenizer = PRE_TOKENIZERS[pre_tokenizer]()
    options: dict[str, Any] = {"show_progress": False, "special_tokens": list(SPECIAL)}
    if fallback:
        options["special_tokens"] = [*SPECIAL, *bytes_]
    alphabet = pre.ByteLevel.alphabet() if pre_tokenizer.startswith("bytes") else []
    trainer: Any
    if model == "unigram":
        trainer = trainers.UnigramTrainer(
            vocab_size=300, unk_token="<unk>", initial_alphabet=alphabet, **options
        )
    elif model == "wordpiece":
        trainer = trainers.WordPieceTrainer(vocab_size=300, initial_alphabet=alphabet, **options)
    elif model == "wordlevel":
        trainer = trainers.WordLevelTrainer(vocab_size=300, **options)
    else:
        if model == "bpe suffix":
            options["end_of_word_suffix"] = "</w>"
        trainer = trainers.BpeTrainer(vocab_size=700, initial_alphabet=alphabet, **options)
    core.train_from_iterator(CORPUS, trainer)
    core.decoder = _decoder(model, normalizer, pre_tokenizer)
    content = json.loads(core.to_str())
    # A byte is a token of the model's, as sentencepiece has it, and none of control.
    kept = [one for one in content["added_tokens"] if one["content"] not in bytes_]
    return json.dumps({**content, "added_tokens": kept})


def _decoder(model: str, normalizer: str, pre_tokenizer: str) -> Any:
    if pre_tokenizer.startswith("bytes"):
        return decoders.ByteLevel()
    if model == "wordpiece":
        return decoders.WordPiece(cleanup=False)
    if model == "bpe suffix":
        return decoders.BPEDecoder(suffix="</w>")
    parts: list[Any] = []
    if normalizer == "legacy" or pre_tokenizer.startswith("metaspace"):
        parts.append(decoders.Replace("\u2581", " "))
    parts += [decoders.ByteFallback(), decoders.Fuse()]
    return decoders.Sequence(parts)


def build(case: Case) -> CollavoProcessor:
    """Make the case's processor."""
    core = Tokenizer.from_str(trained(case.model, case.normalizer, case.pre_tokenizer))
    if case.around == "trim":
        core.post_processor = processors.ByteLevel(trim_offsets=True)
    elif case.around != "none":
        ids = [(name, core.token_to_id(name)) for name in ("<s>", "</s>")]
        single = "<s> $A </s>" if case.around == "both" else "<s> $A"
        core.post_processor = processors.TemplateProcessing(single=single, special_tokens=ids)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        padding_side=case.side,
    )
    return CollavoProcessor(
        make_image_processor(8), tokenizer, grid=(2, 2), chat_template=TEMPLATES[case.template]
    )


def check(case: Case) -> None:
    """Make the case's batch and compare it with what its labels have to be.

    Raises:
        AssertionError: saying what differs.
    """
    processor = build(case)
    tokenizer = processor.tokenizer
    turns = [{"role": role, "content": text} for role, text in case.turns]
    other = [{"role": "user", "content": "What"}, {"role": "assistant", "content": "yes " * 9}]
    # LLaVA's templates leave an image in its turn, and an answer has none.
    places = case.turns[0][0] == "user" or case.template not in LLAVAS
    images = [Image.new("RGB", (8, 8))] if case.image and places else []
    if images:  # there a tag on a line of its own would be an image's place, and is refused
        turns[0]["content"] = [{"type": "image"}, {"type": "text", "text": turns[0]["content"]}]
    record = {"conversation": turns, "image": images, "object_text": False}
    batch = CrayonCollator(processor)([record, {"conversation": other}])
    kept = batch["attention_mask"][0].bool()
    ids, labels = batch["input_ids"][0][kept].tolist(), batch["labels"][0][kept].tolist()
    assert (batch["labels"][0][~kept] == -100).all(), "padding is labelled"
    cells = 4 * len(images)
    assert ids.count(processor.image_token_id) == cells, "image tokens are not the image's"
    stop = {"eval": TURN_ENDS[0], "mpt": LLAVA_ENDS[1]}.get(case.template, "</s>")
    stop_id = tokenizer.convert_tokens_to_ids(stop)
    runs = list(_runs(labels, stop_id))
    answers = [text for role, text in case.turns if role == "assistant"]
    assert len(runs) == len(answers), f"{len(runs)} stretches for {len(answers)} answers"
    control = {tokenizer.convert_tokens_to_ids(one) for one in SPECIAL} - {tokenizer.unk_token_id}
    space = "" if case.template not in ("demo", *LLAVAS[:-1]) else " "
    behind = " " if case.template in ("llama_2", "mistral_instruct") else ""
    for (start, end), answer in zip(runs, answers, strict=True):
        spoken = ids[start:end]
        assert labels[start:end] == spoken, "labels are no tokens of the sequence"
        assert spoken[-1] == stop_id, f"the last label is {spoken[-1]}, not the stop token"
        assert not (control | {stop_id}) & set(spoken[:-1]), "an answer's word is a control token"
        compare(tokenizer, ids[:start], spoken[:-1], space + answer + behind)
    first = case.turns[: 1 if case.turns[0][0] == "user" else 0]
    if not any(tag in text for _, text in first for tag in TAGS[:-2]):
        place = [{"type": "image"}] * len(images)
        asked = [{"role": r, "content": [*place, {"type": "text", "text": t}]} for r, t in first]
        prompt = processor.prompt(asked)
        inputs = {"text": prompt, "images": images if asked else None, "object_text": False}
        expected = processor(**inputs)["input_ids"][0] if prompt else []
        if case.around == "both":
            expected = expected[:-1]
        if prompt and (asked or not images):
            assert ids[: runs[0][0]] == expected, "the tokens before are not the prompt's"


def compare(tokenizer: Any, before: list[int], spoken: list[int], answer: str) -> None:
    """Hold an answer's decoded tokens against its text, as this tokenizer gives a text back."""

    def decode(ids: list[int]) -> str:
        return str(tokenizer.decode(ids, clean_up_tokenization_spaces=False))

    def there_and_back(text: str) -> str:
        return decode(tokenizer(text, add_special_tokens=False)["input_ids"])

    head, grown = decode(before), decode([*before, *spoken])
    parts = _INSIDE_TAG.split(answer)
    if there_and_back(_BLANKS) == _BLANKS and all(there_and_back(one) == one for one in parts):
        assert grown == head + answer, f"{grown[len(head) :]!r} is labelled for {answer!r}"
    elif tokenizer.unk_token_id not in (*before[-1:], *spoken):
        # What this tokenizer does not keep (blanks, case, accents) is left out.
        head, grown, same = (
            _bare(text) for text in (head, grown, "".join(map(there_and_back, parts)))
        )
        assert grown == head + same, f"{grown[-40:]!r} does not end in {same!r} ({answer!r})"


def _bare(text: str) -> str:
    return "".join(text.replace("##", "").replace("\ufffd", "").split())


def _runs(labels: list[int], stop: int) -> Iterator[tuple[int, int]]:
    """Go through the labelled stretches; a stop token ends one, where no question's token does."""
    start = None
    for position, label in enumerate([*labels, -100]):
        if start is not None and (label == -100 or labels[position - 1] == stop):
            yield start, position
            start = None
        if label != -100 and start is None:
            start = position


def main() -> int:
    """Run random cases for a time and print the faults."""
    return run_for_a_time(__doc__, draw, check)


if __name__ == "__main__":
    raise SystemExit(main())
