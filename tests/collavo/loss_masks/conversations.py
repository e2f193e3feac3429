"""Conversations and templates whose right labels are known, and tokenizers that make it hard."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}"
    "{% if m['role'] == 'assistant' %}OPEN{{ m['content'] + '<|im_end|>' }}CLOSE"
    "{% else %}{{ m['content'] + '<|im_end|>' }}{% endif %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
PLAIN_CHATML = CHATML.replace("OPEN", "").replace("CLOSE", "")
MARKED_CHATML = CHATML.replace("OPEN", "{% generation %}").replace("CLOSE", "{% endgeneration %}")
# A template that is wrong on purpose: what the user says is marked too.
WRONG_CHATML = MARKED_CHATML.replace(
    "{% else %}{{ m['content'] + '<|im_end|>' }}",
    "{% else %}{% generation %}{{ m['content'] + '<|im_end|>' }}{% endgeneration %}",
)
# Another: the stop token is outside, so that no model would learn to stop.
ENDLESS_CHATML = MARKED_CHATML.replace(
    "{{ m['content'] + '<|im_end|>' }}{% endgeneration %}",
    "{{ m['content'] }}{% endgeneration %}{{ '<|im_end|>' }}",
)
# And one that marks the header with the answer.
HEADED_CHATML = (
    "{% for m in messages %}{% if m['role'] == 'assistant' %}{% generation %}"
    "{{ '<|im_start|>assistant\n' + m['content'] + '<|im_end|>' }}{% endgeneration %}{{ '\n' }}"
    "{% else %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def turns(*words: str) -> list[dict[str, Any]]:
    """Messages of a user and an assistant in turn."""
    roles = ("user", "assistant")
    return [{"role": roles[i % 2], "content": one} for i, one in enumerate(words)]


def records(*conversations: Iterable[str], image: bool = False) -> list[dict[str, Any]]:
    """Records of conversations, with or without a picture that nobody has."""
    picture = {"image": "none.png"} if image else {}
    return [{"conversation": turns(*one), **picture} for one in conversations]


TWO_TURNS = ("What is it?", "a horse", "Is it red?", "yes, red")
ONE_TURN = ("Is it red?", "no")


def characters(*merged: str, normalizer: Any = None, bos: str | None = None) -> Any:
    """A tokenizer of single characters, and of strings that it always takes together."""
    letters = [chr(code) for code in range(32, 127)] + ["\n", "é", "e\u0301", "\u0301"]
    words = ["<unk>", "</s>", "<s>", *merged, *letters]
    vocabulary = {word: i for i, word in enumerate(dict.fromkeys(words))}
    core = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    pattern = "|".join([*merged, r"[\s\S]"])
    core.pre_tokenizer = pre_tokenizers.Split(Regex(pattern), behavior="isolated")
    core.decoder = decoders.Fuse()
    if normalizer is not None:
        core.normalizer = normalizer
    made = PreTrainedTokenizerFast(
        tokenizer_object=core, unk_token="<unk>", eos_token="</s>", bos_token=bos
    )
    made.add_tokens(["<|im_start|>", "<|im_end|>"], special_tokens=True)
    return made


def composing() -> Any:
    """A tokenizer that composes an accent with the letter before it."""
    return characters(normalizer=normalizers.NFC())
