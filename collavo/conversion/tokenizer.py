"""The tokenizer of an official folder: ``tokenizer.json`` made of ``tokenizer.model``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import Any

import collavo._requirements  # noqa: F401  (before what it checks)

from tokenizers import AddedToken
from transformers import PreTrainedTokenizerFast

from collavo.conversion.pieces import check_ids, fast_tokenizer, read_sentencepiece
from collavo.panoptic.json_files import read_object

SENTENCEPIECE_FILE = "tokenizer.model"
# What the official class puts around a text unless its file says otherwise.
_ENDS = {"add_bos_token": True, "add_eos_token": False}


def read_official_tokenizer(folder: str | PathLike[str]) -> PreTrainedTokenizerFast | None:
    """Make the fast tokenizer of an official folder, without running its code.

    Args:
        folder: Has ``tokenizer.model``; what ``tokenizer_config.json``, ``special_tokens_map.json``
            and ``added_tokens.json`` say of special tokens is kept. Where they say nothing, the
            beginning, end and unknown token are the model's own, padding is the end token, and a
            text begins with the beginning token, as the official class has it.

    Returns:
        The tokenizer, padding on the left; None where the folder has no ``tokenizer.model``.

    Raises:
        RequirementError: if sentencepiece or protobuf is missing.
        ValueError: naming the file or setting that does not fit, or a text whose ids would differ.
    """
    file = Path(folder) / SENTENCEPIECE_FILE
    if not file.is_file():
        return None
    proto, _ = read_sentencepiece(file)
    settings = _Settings(Path(folder), [piece.piece for piece in proto.pieces])
    roles = settings.roles(proto.trainer_spec)
    special = settings.special(list(roles.values()))
    fast = fast_tokenizer(file, special)
    for token, recorded in settings.ids.items():
        if fast.token_to_id(token) != recorded:
            raise ValueError(
                f"{folder}: its tokenizer's files say that {token!r} has the id {recorded}, and "
                f"with {len(proto.pieces)} pieces it gets {fast.token_to_id(token)}"
            )
    named = set(roles.values())
    options: dict[str, Any] = dict(roles)
    if others := [token.content for token in special if token.content not in named]:
        options["additional_special_tokens"] = others
    if isinstance(longest := settings.values.get("model_max_length"), int | float):
        options["model_max_length"] = int(min(longest, 10**30))
    ends = {name: bool(settings.values.get(name, usual)) for name, usual in _ENDS.items()}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=fast,
        padding_side="left",
        clean_up_tokenization_spaces=False,
        **ends,
        **options,
    )
    check_ids(tokenizer, file)
    return tokenizer


class _Settings:
    """What the files beside a sentencepiece model say of its special tokens."""

    def __init__(self, folder: Path, pieces: Sequence[str]) -> None:
        self.folder = folder
        self.pieces = set(pieces)
        self.values = self._read("tokenizer_config.json")
        self.map = self._read("special_tokens_map.json")
        self.ids: dict[str, int] = {}
        self.entries: dict[str, Mapping[str, Any]] = {}
        for key, entry in (self.values.get("added_tokens_decoder") or {}).items():
            self._record(_word(entry), int(key), entry)
        for word, number in self._read("added_tokens.json").items():
            self._record(word, int(number), {})

    def _read(self, name: str) -> dict[str, Any]:
        path = self.folder / name
        return read_object(path, utf8=True) if path.is_file() else {}

    def _record(self, word: str, number: int, entry: Any) -> None:
        if self.ids.setdefault(word, number) != number:
            raise ValueError(
                f"{self.folder}: its tokenizer's files give {word!r} the ids {self.ids[word]} and "
                f"{number}"
            )
        self.entries.setdefault(word, entry if isinstance(entry, Mapping) else {})

    def roles(self, spec: Any) -> dict[str, str]:
        """Return the tokens that have a part to play, by its name."""
        own = {
            "unk_token": spec.unk_piece,
            "bos_token": spec.bos_piece,
            "eos_token": spec.eos_piece,
        }
        found: dict[str, str] = {}
        for role in ("unk_token", "bos_token", "eos_token", "pad_token"):
            word = _word(self.values.get(role) or self.map.get(role)) or own.get(role, "")
            if word in self.pieces or word in self.ids:
                found[role] = word
        if "eos_token" in found:
            found.setdefault("pad_token", found["eos_token"])
        return found

    def special(self, named: Sequence[str]) -> list[AddedToken]:
        """Return all special tokens: those by role first, then the others by their ids."""
        others = [
            _word(entry)
            for values in (self.values, self.map)
            for key in ("additional_special_tokens", "extra_special_tokens")
            for entry in _listed(values.get(key))
        ]
        words = [*named, *sorted(self.ids, key=lambda word: self.ids[word]), *others]
        # Those that are no pieces get their ids in this order.
        ordered = sorted(dict.fromkeys(words), key=lambda word: self.ids.get(word, -1))
        return [
            AddedToken(
                word,
                normalized=False,
                special=True,
                lstrip=bool(self.entries.get(word, {}).get("lstrip", False)),
                rstrip=bool(self.entries.get(word, {}).get("rstrip", False)),
            )
            for word in ordered
            if word
        ]


def _word(entry: Any) -> str:
    """Return a token's text, of either form that the files have."""
    found = entry.get("content") if isinstance(entry, Mapping) else entry
    return found if isinstance(found, str) else ""


def _listed(entries: Any) -> list[Any]:
    return list(entries.values()) if isinstance(entries, Mapping) else list(entries or ())
