"""Small sentencepiece models, trained in a moment."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

SYMBOLS = ("[UNUSED_TOKEN_145]", "[UNUSED_TOKEN_146]")
_CORPUS = (
    "AI assistant should give helpful and detailed answers to user after understanding an image.",
    "The image includes (#1 horse) [0.06, 0.38, 0.27, 0.91], (#2 horse) [0.1, 0.5, 0.9, 1.0].",
    "the quick brown fox jumps over the lazy dog 0123456789",
    "Several   spaces,\u00a0na\u00efve caf\u00e9s and [UNUSED_TOKEN_146]user",
)


def write_sentencepiece(
    folder: Path, *, vocab_size: int = 400, name: str = "tokenizer.model", **settings: Any
) -> Path:
    """Train a model as InternLM2's and LLaMA's are (BPE with bytes, nothing normalised).

    Args:
        folder: Where to write it.
        vocab_size: Pieces; byte pieces are 256 of them.
        name: The file's.
        **settings: sentencepiece's, in place of these.
    """
    from sentencepiece import SentencePieceTrainer

    usual = {
        "model_type": "bpe",
        "byte_fallback": True,
        "add_dummy_prefix": True,
        "normalization_rule_name": "identity",
        "remove_extra_whitespaces": False,
        "user_defined_symbols": list(SYMBOLS),
        "split_digits": True,
        "allow_whitespace_only_pieces": True,
        "character_coverage": 1.0,
        "minloglevel": 2,
        "num_threads": 1,
    }
    content = io.BytesIO()
    SentencePieceTrainer.train(
        sentence_iterator=iter(_CORPUS * 20),
        model_writer=content,
        vocab_size=vocab_size,
        **usual | settings,
    )
    path = folder / name
    path.write_bytes(content.getvalue())
    return path
