"""The image token of a tokenizer, and a pad token of its own."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import collavo._requirements  # noqa: F401  (before what it checks)

from tokenizers import AddedToken

from collavo.conversion.kinds import ImageToken, Options
from collavo.processing.chat_templates import IMAGE_TOKEN

PAD_TOKEN = "<pad>"
# What no text has by itself. Image tokens that are added, or were ordinary pieces, are such words.
_MARKED = re.compile(r"""(?!<0x[0-9A-Fa-f]{2}>)[<\[{|][^\s'"\\]+""")


def find_image_token(
    tokenizer: Any, options: Options, named: int | None
) -> tuple[Options, ImageToken | None]:
    """Return the tokenizer's image token, added where it has none.

    Args:
        tokenizer: The source's, or None.
        options: Of which ``image_token`` is read; an id in words becomes a number.
        named: The id that the source's configuration has, None where it has none.

    Raises:
        ValueError: naming the option or field that the tokenizer contradicts.
    """
    asked = options.image_token
    if isinstance(asked, str) and asked.isdecimal():
        asked = int(asked)
    options = replace(options, image_token=asked)
    if tokenizer is None:
        if isinstance(asked, str):
            raise ValueError(
                f"--image-token: expected an id, since the source has no tokenizer, got {asked!r}"
            )
        return options, None
    where = "--image-token"
    if asked is None and named is not None:
        where, asked = "config.json: the image token", named
    word = IMAGE_TOKEN if asked is None else asked
    if isinstance(word, int):
        if not 0 <= word <= len(tokenizer):
            raise ValueError(
                f"{where}: expected an id from 0 to {len(tokenizer)}, the tokenizer's next one, "
                f"got {word}"
            )
        known = word < len(tokenizer)
        word = str(tokenizer.convert_ids_to_tokens(word)) if known else IMAGE_TOKEN
    if named is None:  # else only that one is taken
        _expect_image_word(tokenizer, word)
    if not stands_alone(tokenizer, word):
        tokenizer.add_tokens([AddedToken(word, special=True, normalized=False)])
    token = int(tokenizer.convert_tokens_to_ids(word))
    if isinstance(asked, int) and token != asked:
        raise ValueError(f"{where}: expected {token}, the tokenizer's {word!r}, got {asked}")
    return options, ImageToken(word, token, len(tokenizer))


def add_special_tokens(tokenizer: Any, where: str) -> dict[str, int]:
    """Give a tokenizer ``<image>`` and, where it has none of its own, a pad token.

    Padding with the unknown token or the end of a text would do where every mask comes from
    lengths, but other code takes masks and labels from the pad token's id.

    Args:
        tokenizer: A fast one; is changed, and pads on the left from then on.
        where: What it is of.

    Returns:
        The ids of the tokens that were added, by their words.

    Raises:
        ValueError: if one of them is an ordinary word.
    """
    before = tokenizer.get_vocab()
    _expect_no_word(tokenizer, IMAGE_TOKEN, where)
    if not stands_alone(tokenizer, IMAGE_TOKEN):
        tokenizer.add_tokens([AddedToken(IMAGE_TOKEN, special=True, normalized=False)])
    others = (tokenizer.unk_token, tokenizer.bos_token, tokenizer.eos_token, IMAGE_TOKEN)
    if tokenizer.pad_token is None or tokenizer.pad_token in others:
        _expect_no_word(tokenizer, PAD_TOKEN, where)
        pad = AddedToken(PAD_TOKEN, special=True, normalized=False)
        tokenizer.add_special_tokens({"pad_token": pad})
    tokenizer.padding_side = tokenizer.init_kwargs["padding_side"] = "left"  # which is saved
    words = dict.fromkeys((IMAGE_TOKEN, str(tokenizer.pad_token)))
    ids = {word: int(tokenizer.convert_tokens_to_ids(word)) for word in words}
    return {word: token for word, token in ids.items() if word not in before}


def _expect_no_word(tokenizer: Any, word: str, where: str) -> None:
    """Raise if a word that is to be a special token is an ordinary one."""
    own = (*tokenizer.get_added_vocab(), *tokenizer.all_special_tokens)
    if word in tokenizer.get_vocab() and word not in own:
        raise ValueError(
            f"{where}: its tokenizer has {word} as an ordinary word, which texts may hold; take a "
            "language model whose tokenizer has it as a special token, or not at all"
        )


def _expect_image_word(tokenizer: Any, word: str) -> None:
    """Raise unless a word can stand for images: no text has it, and it has no other part."""
    own = word in tokenizer.all_special_tokens or word in tokenizer.get_added_vocab()
    parts = (tokenizer.bos_token, tokenizer.eos_token, tokenizer.unk_token)
    if word in parts or not (own or _MARKED.fullmatch(word)):
        raise ValueError(
            "--image-token: expected a word that stands for images alone, such as <image>, got "
            f"{word!r}"
        )


def stands_alone(tokenizer: Any, word: str) -> bool:
    """Say whether a text has a word's id where it has the word, whatever is around it.

    Args:
        tokenizer: A fast tokenizer.
        word: The word.
    """
    if word not in tokenizer.get_vocab():
        return False
    ids = tokenizer(f"a{word}b", add_special_tokens=False)["input_ids"]
    return bool(ids.count(tokenizer.convert_tokens_to_ids(word)) == 1)
