"""Texts become token ids: a tokenizer without what it adds, and batches padded by lengths."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import collavo._requirements  # noqa: F401  (before what it checks)

from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

# Options of a call that say what becomes of token ids; the tokenizer's other options ask for text.
_OPTIONS = {
    "add_special_tokens",
    "padding",
    "truncation",
    "max_length",
    "pad_to_multiple_of",
    "padding_side",
    "return_attention_mask",
}


class TextEncoder:
    """A tokenizer without the special tokens that it puts around a text.

    Args:
        tokenizer: Of transformers.

    Attributes:
        frame: What it puts before and behind a text.

    Raises:
        ValueError: if a text's own tokens are not among those that it makes of it.
    """

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self.unknown: int | None = tokenizer.unk_token_id
        self.isolated: dict[int, str] = {
            number: token.content for number, token in tokenizer.added_tokens_decoder.items()
        }
        self._core = _core_of(tokenizer)
        if self._core is not None:
            # As every call through transformers sets it; a call before may have left another state.
            self._core.no_truncation()
            self._core.no_padding()
            self._core.encode_special_tokens = tokenizer.split_special_tokens
        self.frame = special_frame(self(["a"])[0], self._framed("a"))

    def __call__(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the token ids of texts, each by itself.

        Args:
            texts: Any number of them.
        """
        core = self._core
        if core is not None:
            return [core.encode(text, add_special_tokens=False).ids for text in texts]
        encoded = self.tokenizer(
            list(texts),
            add_special_tokens=False,
            return_attention_mask=False,
            return_token_type_ids=False,
            verbose=False,  # else it warns of texts that are longer than the model's
        )
        return [list(ids) for ids in encoded["input_ids"]]

    def _framed(self, text: str) -> list[int]:
        if self._core is not None:
            return list(self._core.encode(text).ids)
        return list(self.tokenizer(text, verbose=False)["input_ids"])

    def framed(self, ids: Sequence[int]) -> tuple[list[int], list[int]]:
        """Return what the tokenizer puts around the ids of a text, its start tokens once.

        Args:
            ids: A text's own. A chat template may have written the start tokens, or the last ones.
        """
        before, behind = self.frame
        counts = range(len(before), 0, -1)
        written = next((n for n in counts if [*ids[:n]] == before[-n:]), 0)
        return before[: len(before) - written], behind


def _core_of(tokenizer: Any) -> Tokenizer | None:
    """Return what encodes in a fast tokenizer, unless its class does more than that."""
    kind, plain = type(tokenizer), PreTrainedTokenizerFast
    if not isinstance(tokenizer, plain) or kind._encode_plus is not plain._encode_plus:
        return None
    return tokenizer.backend_tokenizer if kind.__call__ is plain.__call__ else None


def special_texts(tokenizer: Any) -> set[str]:
    """Return every text that a tokenizer takes for a token of control.

    Args:
        tokenizer: Of transformers.
    """
    added = tokenizer.added_tokens_decoder.values()
    return {token.content for token in added if token.special} | set(tokenizer.all_special_tokens)


def tokenizer_state(tokenizer: Any) -> Any:
    """Return what a tokenizer's token ids follow from, as JSON can say it.

    Args:
        tokenizer: Of transformers.
    """
    facts = {
        "class": type(tokenizer).__name__,
        "special": {key: str(text) for key, text in tokenizer.special_tokens_map.items()},
        "added": {k: repr(v) for k, v in tokenizer.added_tokens_decoder.items()},
        "split": tokenizer.split_special_tokens,
    }
    if (core := getattr(tokenizer, "backend_tokenizer", None)) is None:
        return {**facts, "vocabulary": tokenizer.get_vocab()}
    state = json.loads(core.to_str())
    # Of these two the last call decides.
    return {**facts, "core": {**state, "truncation": None, "padding": None}}


def special_frame(bare: Sequence[int], framed: Sequence[int]) -> tuple[list[int], list[int]]:
    """Return the special tokens that a tokenizer puts before and behind a text.

    Args:
        bare: A text's token ids without them.
        framed: The text's token ids with them.

    Raises:
        ValueError: if the text's own tokens are not among them.
    """
    bare, framed = list(bare), list(framed)
    for start in range(len(framed) - len(bare) + 1):
        if framed[start : start + len(bare)] == bare:
            return framed[:start], framed[start + len(bare) :]
    raise ValueError(
        "tokenizer: expected special tokens before and behind a text's own, got other tokens with "
        f"add_special_tokens than without: {framed[:8]}..., {bare[:8]}..."
    )


def check_options(options: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options of a call that are set.

    Args:
        options: By name; those that are None or False are as if they were not there.

    Raises:
        ValueError: naming those that ask for more than token ids.
    """
    wanted = {name: value for name, value in options.items() if value not in (None, False)}
    others = sorted(set(wanted) - _OPTIONS)
    if others:
        raise ValueError(
            f"{', '.join(others)}: expected options of {', '.join(sorted(_OPTIONS))}; what stands "
            "between images is tokenized by itself, so the tokenizer's other results do not exist"
        )
    unset = {"add_special_tokens", "return_attention_mask"} & set(options)
    return {**wanted, **{name: False for name in unset if options[name] is False}}


def shorten(ids: list[int], options: Mapping[str, Any], tokenizer: Any, added: int) -> list[int]:
    """Return a prompt's token ids, cut where a call asks for it.

    Args:
        ids: Without special tokens.
        options: Of the call: ``truncation`` and ``max_length``.
        tokenizer: It says on which side, and how long where the call does not.
        added: How many special tokens come around.
    """
    if options.get("truncation") in (None, False, "do_not_truncate"):
        return ids
    most = options.get("max_length") or tokenizer.model_max_length
    room = max(0, most - added)
    if len(ids) <= room:
        return ids
    return ids[:room] if tokenizer.truncation_side == "right" else ids[len(ids) - room :]


def pad(rows: list[list[int]], tokenizer: Any, options: Mapping[str, Any]) -> dict[str, Any]:
    """Pad rows of token ids; the mask follows from their lengths, not from what the pad token is.

    Args:
        rows: Of token ids.
        tokenizer: It says on which side and with what.
        options: ``padding`` and what else concerns lengths.

    Raises:
        ValueError: if rows are to be padded and the tokenizer has no pad token.
    """
    chosen = {k: v for k, v in options.items() if k not in ("add_special_tokens", "truncation")}
    uneven = len(set(map(len, rows))) > 1 or "pad_to_multiple_of" in chosen
    if chosen.get("padding") and tokenizer.pad_token_id is None:
        if uneven or chosen["padding"] == "max_length":
            raise ValueError(
                "tokenizer: expected a pad token, since sequences of different lengths are padded, "
                "got none; give it one of its own (tokenizer.add_special_tokens({'pad_token': "
                "'<pad>'}), and the model an embedding for it), or tokenizer.pad_token = "
                "tokenizer.eos_token"
            )
        del chosen["padding"]
    chosen = {"padding": False, "return_attention_mask": True, **chosen}
    padded = tokenizer.pad({"input_ids": rows}, verbose=False, **chosen)
    return {key: padded[key] for key in ("input_ids", "attention_mask") if key in padded}
