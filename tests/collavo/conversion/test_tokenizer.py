"""``tokenizer.json`` of a sentencepiece model gives sentencepiece's ids, or none is made."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken, normalizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from collavo.conversion.pieces import check_ids, fast_tokenizer, read_sentencepiece
from collavo.conversion.tokenizer import read_official_tokenizer
from collavo_kernels.info import RequirementError
from tests.collavo.conversion.tiny_sentencepiece import SYMBOLS, write_sentencepiece

sentencepiece = pytest.importorskip("sentencepiece", reason="the extra convert is not installed")


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"add_dummy_prefix": False},
        {"user_defined_symbols": []},
        {"byte_fallback": False, "vocab_size": 130},
        {"remove_extra_whitespaces": True, "normalization_rule_name": "nmt_nfkc"},
        {"add_dummy_prefix": False, "normalization_rule_name": "nfkc"},
        {"model_type": "unigram", "byte_fallback": False, "vocab_size": 80},
        # Control tokens beside those of every model, and ids in another order.
        {"control_symbols": ["<ctrl>"], "pad_id": 0, "unk_id": 1, "bos_id": 2, "eos_id": 3},
    ],
    ids=str,
)
def test_ids_are_sentencepieces_after_a_save_and_a_load(
    tmp_path: Path, settings: dict[str, Any]
) -> None:
    """On every piece, on texts of all kinds, alone and around every special token."""
    file = write_sentencepiece(tmp_path, **settings)
    tokenizer = read_official_tokenizer(tmp_path)
    assert tokenizer is not None
    tokenizer.add_tokens(["<image>"], special_tokens=True)
    tokenizer.save_pretrained(tmp_path / "target")
    for kind in (AutoTokenizer, PreTrainedTokenizerFast):
        loaded = kind.from_pretrained(tmp_path / "target")
        assert check_ids(loaded, file) > 250
        pieces = sentencepiece.SentencePieceProcessor(model_file=str(file))
        assert loaded.convert_tokens_to_ids("<image>") == pieces.get_piece_size()
        # The official class begins a text with its own token, and pads on the left.
        assert loaded("a").input_ids == [pieces.bos_id(), *pieces.encode("a")]
        assert loaded.padding_side == "left" and loaded.pad_token_id is not None
        for text in ("two words", "\u65e5\u672c \U0001f600\n\nx  y"):
            ids = pieces.encode(text)
            if pieces.unk_id() not in ids:  # which sentencepiece writes as a sign of its own
                assert loaded.decode(ids) == pieces.decode(ids)


def test_every_stretch_between_special_tokens_has_its_leading_space(tmp_path: Path) -> None:
    """As in the official class: behind a special token, and not behind a symbol of the model."""
    write_sentencepiece(tmp_path)
    tokenizer = read_official_tokenizer(tmp_path)
    assert tokenizer is not None
    found = tokenizer.tokenize(f"an</s>an{SYMBOLS[0]}an")
    assert found == ["\u2581an", "</s>", "\u2581an", SYMBOLS[0], "an"]


def test_a_symbol_alone_lacks_the_leading_space_and_the_log_says_so(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file = write_sentencepiece(tmp_path)
    with caplog.at_level(logging.WARNING, "collavo"):
        tokenizer = read_official_tokenizer(tmp_path)
    assert tokenizer is not None and "nothing else gets no leading" in caplog.text
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(file))
    expected = pieces.encode(SYMBOLS[0])
    assert len(expected) == 2
    assert tokenizer(SYMBOLS[0], add_special_tokens=False).input_ids == expected[1:]


def test_special_tokens_are_those_of_the_files_with_their_ids(tmp_path: Path) -> None:
    """Saved after ``add_tokens``, in the old files and in the new one."""
    size = read_sentencepiece(write_sentencepiece(tmp_path))[1].get_piece_size()
    values = {
        "bos_token": "<s>",
        "pad_token": {"content": "<unk>"},
        "add_bos_token": False,
        "model_max_length": 4096,
        "added_tokens_decoder": {str(size): {"content": "<image>", "special": True}},
    }
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(values))
    (tmp_path / "added_tokens.json").write_text(json.dumps({"<image>": size, "<extra>": size + 1}))
    special = {"eos_token": SYMBOLS[0], "additional_special_tokens": [SYMBOLS[1]]}
    (tmp_path / "special_tokens_map.json").write_text(json.dumps(special))
    tokenizer = read_official_tokenizer(tmp_path)
    assert tokenizer is not None
    assert tokenizer.convert_tokens_to_ids(["<image>", "<extra>"]) == [size, size + 1]
    assert (tokenizer.pad_token, tokenizer.eos_token) == ("<unk>", SYMBOLS[0])
    assert tokenizer.model_max_length == 4096
    # A special token of the files cuts, though the model has it for a symbol.
    assert tokenizer.tokenize(f"an{SYMBOLS[1]}an") == ["\u2581an", SYMBOLS[1], "\u2581an"]
    assert tokenizer("a").input_ids == tokenizer("a", add_special_tokens=False).input_ids


def test_ids_that_the_files_cannot_mean_are_refused(tmp_path: Path) -> None:
    write_sentencepiece(tmp_path)
    (tmp_path / "added_tokens.json").write_text(json.dumps({"<image>": 1000}))
    with pytest.raises(ValueError, match=r"'<image>' has the id 1000, and with \d+ pieces it gets"):
        read_official_tokenizer(tmp_path)


def test_a_difference_is_an_error_that_names_the_text(tmp_path: Path) -> None:
    """A stretch that lacks its leading space is what transformers' own readings give."""
    file = write_sentencepiece(tmp_path)
    core = fast_tokenizer(file, [AddedToken("<s>", normalized=False, special=True)])
    core.normalizer = normalizers.Replace(" ", "\u2581")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>")
    with pytest.raises(ValueError, match="sentencepiece differ on 'What is in the image"):
        check_ids(tokenizer, file)


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"model_type": "word", "byte_fallback": False, "vocab_size": 30}, "model_type 3"),
        ({"treat_whitespace_as_suffix": True}, "treat_whitespace_as_suffix"),
        # tokenizers takes "\r\n" for one character of the model's table.
        ({"normalization_rule_name": "nmt_nfkc"}, r"differ on 'line\\nbreaks"),
    ],
    ids=str,
)
def test_a_model_that_fast_tokenizers_cannot_follow_is_refused(
    tmp_path: Path, settings: dict[str, Any], named: str
) -> None:
    write_sentencepiece(tmp_path, **settings)
    with pytest.raises(ValueError, match=named):
        read_official_tokenizer(tmp_path)


@pytest.mark.parametrize("content", [b"", b"\x00\x01 no model", b"{}"], ids=str)
def test_another_file_is_refused_by_name(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "tokenizer.model").write_bytes(content)
    with pytest.raises(ValueError, match=r"tokenizer\.model: not a sentencepiece model"):
        read_official_tokenizer(tmp_path)


def test_a_missing_package_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_sentencepiece(tmp_path)
    monkeypatch.setattr(
        "collavo_kernels._requirements.installed_version",
        lambda package: None if package == "sentencepiece" else "99",
    )
    with pytest.raises(RequirementError, match="sentencepiece"):
        read_official_tokenizer(tmp_path)


def test_a_folder_without_a_model_has_no_tokenizer(tmp_path: Path) -> None:
    assert read_official_tokenizer(tmp_path) is None
