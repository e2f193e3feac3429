"""A sentencepiece model as a fast tokenizer, and the proof that both give the same ids."""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence
from os import PathLike
from pathlib import Path
from typing import Any

import collavo._requirements  # noqa: F401  (before what it checks)

from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers
from tokenizers.models import BPE, Unigram
from transformers.convert_slow_tokenizer import generate_merges

from collavo_kernels.info import require

logger = logging.getLogger(__name__)

SPACE = "\u2581"  # what sentencepiece writes for a space
# sentencepiece's kinds of pieces.
_NORMAL, _USER_DEFINED, _UNUSED = 1, 4, 5
_UNIGRAM, _BPE = 1, 2
_TEXTS = (
    "What is in the image?",
    " one leading space",
    "   three leading spaces",
    "two  spaces and   three",
    "trailing spaces  ",
    " ",
    "    ",
    "line\nbreaks\n\nand\ttabs\r\n",
    "\n",
    "\n\n  indented\n",
    "The image includes (#1 horse) [0.06, 0.38, 0.27, 0.91], (#12 wall-brick) [0.00, 1.00].",
    "0 1 22 333 4444 55555 3.14159 1,000,000 10% 2024-06-02",
    "don't CamelCase snake_case __init__ x=y+z; if (a<b && c>=d) { return -1; }",
    "https://example.org/a?b=c&d=%20#e",
    "na\u00efve caf\u00e9 cafe\u0301 \u00c5ngstr\u00f6m \ufb01ne \u00bd \u2460 \u2126",
    "\u65e5\u672c\u8a9e\u3068\u4e2d\u6587\uff0c\u3002 \ud55c\uad6d\uc5b4",
    "\u0440\u0443\u0441\u0441\u043a\u0438\u0439 \u0639\u0631\u0628\u064a \u0939\u093f\u0902",
    "\U0001f600 \U0001f468\u200d\U0001f469 \U0001f1e9\U0001f1ea \u2764\ufe0f \U0001f44d\U0001f3fd",
    "\u00a0no-break\u3000wide\u200bzero\u2028separators\u0085 \ufeffmark \u00ad",
    "\U00013000 \ue000 \U000f0000 \x01\x7f control",
    f"{SPACE}the{SPACE}{SPACE}sign itself",
    "<0x0A> <0xFF> is text",
    "aaaa aaaaaaaa ======== -------- ........ \t\t\t",
)


def read_sentencepiece(file: str | PathLike[str]) -> tuple[Any, Any]:
    """Read a sentencepiece model.

    Args:
        file: ``tokenizer.model``.

    Returns:
        What it holds (a ``ModelProto``), and sentencepiece's own processor of it.

    Raises:
        RequirementError: if sentencepiece or protobuf is missing.
        FileNotFoundError: if there is no such file.
        ValueError: if it is no sentencepiece model.
    """
    for package, first in (("sentencepiece", "0.2"), ("protobuf", "4.21")):
        require(package, first, "the conversion of tokenizer.model")
    from google.protobuf.message import DecodeError
    from sentencepiece import SentencePieceProcessor, sentencepiece_model_pb2

    content = Path(file).read_bytes()
    model = sentencepiece_model_pb2.ModelProto()
    try:
        model.ParseFromString(content)
        processor = SentencePieceProcessor(model_proto=content)
    except (DecodeError, RuntimeError) as error:
        raise ValueError(f"{file}: not a sentencepiece model ({error})") from error
    if not model.pieces:
        raise ValueError(f"{file}: not a sentencepiece model (it has no pieces)")
    return model, processor


def fast_tokenizer(file: str | PathLike[str], special: Sequence[AddedToken]) -> Tokenizer:
    """Build the fast tokenizer of a sentencepiece model.

    As in transformers' sentencepiece tokenizers, the special tokens cut a text into stretches, and
    each stretch is tokenized for itself: with sentencepiece's leading space, where the model adds
    one, behind every special token.

    Args:
        file: ``tokenizer.model``, of kind BPE or unigram.
        special: The special tokens. Those that are no pieces get the ids that follow.

    Returns:
        The tokenizer, without a post-processor.

    Raises:
        ValueError: naming what fast tokenizers cannot do.
    """
    proto, _ = read_sentencepiece(file)
    _refuse(proto, file)
    fast = Tokenizer(_model(proto))
    symbols = [piece.piece for piece in proto.pieces if piece.type == _USER_DEFINED]
    own = {token.content for token in special}
    symbols = [symbol for symbol in symbols if symbol not in own]
    fast.normalizer = normalizers.Sequence(_normalizers(proto.normalizer_spec, symbols))
    steps: list[Any] = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    if proto.normalizer_spec.add_dummy_prefix:
        steps.append(decoders.Strip(" ", 1, 0))
        if symbols:
            logger.warning(
                "%s: a text, or a stretch between special tokens, that is %r and nothing else gets "
                "no leading %r, which sentencepiece would give it",
                file,
                symbols[0],
                SPACE,
            )
    fast.decoder = decoders.Sequence(steps)
    fast.add_special_tokens(list(special))
    # Found in the normalised stretch, so that what follows them is no new stretch.
    fast.add_tokens([AddedToken(symbol, normalized=True, special=False) for symbol in symbols])
    return fast


def _refuse(proto: Any, file: str | PathLike[str]) -> None:
    """Raise for what sentencepiece does and fast tokenizers do not."""
    kind, spec = proto.trainer_spec.model_type, proto.normalizer_spec
    if kind not in (_UNIGRAM, _BPE):
        raise ValueError(f"{file}: expected a BPE or unigram model, got model_type {kind}")
    refused = {
        "treat_whitespace_as_suffix": proto.trainer_spec.treat_whitespace_as_suffix,
        "escape_whitespaces (off)": not spec.escape_whitespaces,
        "unused pieces": any(piece.type == _UNUSED for piece in proto.pieces),
    }
    for setting, asked in refused.items():
        if asked:
            raise ValueError(f"{file}: {setting}: not supported by fast tokenizers")


def _model(proto: Any) -> BPE | Unigram:
    spec = proto.trainer_spec
    unknown = next((i for i, piece in enumerate(proto.pieces) if piece.type == 2), spec.unk_id)
    if spec.model_type == _UNIGRAM:
        # A piece that text never gives is one that no path can afford.
        never = min(piece.score for piece in proto.pieces) - 1e4
        paths = [
            (piece.piece, piece.score if piece.type == _NORMAL else never) for piece in proto.pieces
        ]
        return Unigram(paths, unk_id=unknown, byte_fallback=spec.byte_fallback)
    vocabulary = {piece.piece: index for index, piece in enumerate(proto.pieces)}
    # Only normal pieces are joined of others: bytes, control tokens and symbols are not.
    scores = {piece.piece: piece.score for piece in proto.pieces if piece.type == _NORMAL}
    parts = {name: vocabulary[name] for name in scores}
    return BPE(
        vocabulary,
        generate_merges(parts, scores),
        unk_token=proto.pieces[unknown].piece,
        fuse_unk=True,
        byte_fallback=spec.byte_fallback,
    )


def _normalizers(spec: Any, symbols: Sequence[str]) -> list[Any]:
    steps: list[Any] = []
    if spec.precompiled_charsmap:
        steps.append(normalizers.Precompiled(spec.precompiled_charsmap))
    if spec.remove_extra_whitespaces:
        steps += [
            normalizers.Replace(Regex(" {2,}"), " "),
            normalizers.Replace(Regex(r"\A | \z"), ""),
        ]
    if spec.add_dummy_prefix:
        # A symbol itself is normalised too, to be sought for, and must not change.
        whole = "|".join(re.escape(symbol) for symbol in symbols)
        but = rf"(?!(?:{whole})\z)" if symbols else ""
        steps.append(normalizers.Replace(Regex(rf"\A{but}(?=.|\n)"), SPACE))
    steps.append(normalizers.Replace(" ", SPACE))
    return steps


def check_ids(tokenizer: Any, file: str | PathLike[str], texts: Sequence[str] = _TEXTS) -> int:
    """Check that a fast tokenizer gives sentencepiece's ids, stretch by stretch.

    Every piece of the vocabulary is tried, and every text alone and around every special token and
    symbol.

    Args:
        tokenizer: transformers' fast tokenizer, e.g. read back from the folder it was saved in.
        file: The ``tokenizer.model`` that it was made of.
        texts: What to try beside the pieces.

    Returns:
        How many texts were compared.

    Raises:
        ValueError: naming the first text whose ids differ, with both.
    """
    proto, processor = read_sentencepiece(file)
    special = [t for t in tokenizer.added_tokens_decoder.values() if t.special]
    symbols = [piece.piece for piece in proto.pieces if piece.type == _USER_DEFINED]
    tried = list(texts)
    for mark in [token.content for token in special] + symbols:
        tried += [f"{mark}{text}" for text in texts] + [f"{text}{mark}" for text in texts]
        tried += [f"word{mark}word", f"word {mark} word", f"{mark}{mark}", f" {mark}\n{mark} "]
    pieces = [piece.piece.replace(SPACE, " ") for piece in proto.pieces]
    tried += pieces + [f"a{piece}" for piece in pieces]  # also as a word goes on
    lone = set(symbols) if proto.normalizer_spec.add_dummy_prefix else set()
    reference = _Stretches(processor, special, tokenizer, lone)
    found = tokenizer(tried, add_special_tokens=False, verbose=False)["input_ids"]
    for text, ids in zip(tried, found, strict=True):
        expected = reference.ids(text)
        if list(ids) != expected:
            names = [tokenizer.convert_ids_to_tokens(each) for each in (list(ids), expected)]
            raise ValueError(
                f"{file}: the fast tokenizer and sentencepiece differ on {text!r}: "
                f"{names[0]} and {names[1]}"
            )
    return len(tried)


class _Stretches:
    """What sentencepiece gives for a text that special tokens cut into stretches."""

    def __init__(
        self, processor: Any, special: Sequence[AddedToken], tokenizer: Any, lone: set[str]
    ) -> None:
        self.processor = processor
        self.lone = lone
        self.special = {t.content: tokenizer.convert_tokens_to_ids(t.content) for t in special}
        longest_first = sorted(special, key=lambda token: -len(token.content))
        names = [
            (r"\s*" if token.lstrip else "")
            + f"({re.escape(token.content)})"
            + (r"\s*" if token.rstrip else "")
            for token in longest_first
        ]
        self.cut = re.compile("|".join(names)) if names else None

    def ids(self, text: str) -> list[int]:
        found: list[int] = []
        place = 0
        for match in self.cut.finditer(text) if self.cut is not None else ():
            found += self._stretch(text[place : match.start()])
            found.append(self.special[match[match.lastindex or 0]])
            place = match.end()
        return found + self._stretch(text[place:])

    def _stretch(self, text: str) -> list[int]:
        ids = [int(i) for i in self.processor.encode(text)]
        alone = len(ids) == 2 and self.processor.id_to_piece(ids[0]) == SPACE
        # The one known difference, which is logged.
        return ids[1:] if alone and self.processor.id_to_piece(ids[1]) in self.lone else ids
