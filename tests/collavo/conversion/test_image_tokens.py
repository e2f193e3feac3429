"""Which id is the image token's: the tokenizer's own, or the next one with a row added."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast

from collavo.conversion.kinds import ImageToken, Options
from collavo.conversion.official import plan_official
from collavo.conversion.official_layout import EMBEDDING, OWN_EMBEDDING
from collavo.conversion.plan import Header
from collavo.conversion.special_tokens import find_image_token
from tests.collavo.conversion.official_folder import Sizes, official_config, official_shapes

WORDS = 50


def plan(rows: int, head: int, token: ImageToken | None) -> tuple[int, int]:
    """Return the image token and the embedding's rows of the converted model."""
    sizes = replace(Sizes(layers=1), vocabulary=head, rows=rows)
    headers = {n: Header(s, torch.float16) for n, s in official_shapes(sizes).items()}
    config, made = plan_official("folder", headers, official_config(sizes), Options(), token)
    return config.image_token_index, made.outputs()[OWN_EMBEDDING].shape[0]


@pytest.mark.parametrize(
    ("rows", "head", "token", "found"),
    [
        (50, 50, ImageToken("<image>", 50, 51), (50, 51)),  # as released: the row is added
        (51, 50, ImageToken("<image>", 50, 51), (50, 51)),  # saved after the official loader
        (51, 51, ImageToken("<image>", 50, 51), (50, 51)),  # whose head was resized too
        (50, 50, ImageToken("<image>", 7, 50), (7, 50)),  # a tokenizer that always had it
        (52, 50, ImageToken("<image>", 50, 51), (50, 52)),  # a padded embedding
        (50, 50, None, (50, 51)),
        (51, 50, None, (50, 51)),
    ],
)
def test_the_token_and_its_row(
    rows: int, head: int, token: ImageToken | None, found: tuple[int, int]
) -> None:
    assert plan(rows, head, token) == found


@pytest.mark.parametrize("ids", [40, 49, 52, 60])
def test_a_tokenizer_of_another_vocabulary_is_refused(ids: int) -> None:
    """One id fewer than the head has words is the tokenizer before the head was resized."""
    token = ImageToken("<image>", ids, ids + 1)
    if ids == 49:
        assert plan(50, 50, token) == (49, 50)
        return
    with pytest.raises(ValueError, match=rf"has {ids} ids beside '<image>'.*output\.weight 50"):
        plan(50, 50, token)


def _tokenizer(*more: str) -> Any:
    words = {f"w{index}": index for index in range(WORDS)}
    words |= {word: WORDS + index for index, word in enumerate(more)}
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(WordLevel(words, unk_token="w0")), unk_token="w0"
    )


@pytest.mark.parametrize(
    ("more", "asked", "found"),
    [
        ((), None, ("<image>", 50, 51)),
        (("<image>", "last"), None, ("<image>", 50, 52)),
        (("<im>",), "<im>", ("<im>", 50, 51)),
        (("<im>",), "<picture>", ("<picture>", 51, 52)),
        ((), "50", ("<image>", 50, 51)),
        (("<im>",), 50, ("<im>", 50, 51)),
    ],
)
def test_words_and_ids_that_can_be_asked_for(
    more: tuple[str, ...], asked: str | int | None, found: tuple[str, int, int]
) -> None:
    tokenizer = _tokenizer(*more)
    _, token = find_image_token(tokenizer, Options(image_token=asked), None)
    assert token == ImageToken(*found)
    assert tokenizer.convert_tokens_to_ids(token.word) == token.token_id
    assert len(tokenizer) == token.vocabulary


@pytest.mark.parametrize("asked", ["w7", 7, "the", "", " ", "-1", "<a b>", "w0", "<0x41>", "'"])
def test_a_word_that_texts_have_is_refused(asked: str | int) -> None:
    """Each such word of a question would be a place for an image, or none would be found."""
    with pytest.raises(ValueError, match="expected a word that stands for images alone"):
        find_image_token(_tokenizer("<0x41>"), Options(image_token=asked), None)


def test_a_piece_that_no_text_gives_becomes_a_token_of_its_own() -> None:
    tokenizer = _tokenizer("<image>", "last")
    assert 50 not in tokenizer("a<image>b")["input_ids"]
    find_image_token(tokenizer, Options(), None)
    assert tokenizer("a<image>b")["input_ids"].count(50) == 1


@pytest.mark.parametrize("asked", [51, -1])
def test_an_id_beyond_the_next_one_is_refused(asked: int) -> None:
    with pytest.raises(ValueError, match=rf"--image-token: expected an id .*to 50.*got {asked}"):
        find_image_token(_tokenizer(), Options(image_token=asked), None)
    with pytest.raises(ValueError, match=r"--image-token: expected 50, .*'<image>', got 51"):
        find_image_token(_tokenizer("<image>"), Options(image_token=51), None)


def test_the_embedding_has_the_heads_words_at_least() -> None:
    with pytest.raises(ValueError, match=rf"the head's 50 rows in {EMBEDDING}, got 49"):
        plan(49, 50, None)
